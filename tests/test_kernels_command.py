"""kvcli kernels: floors, what is compiled and timed, what is refused; and KVCLI_KERNELS, which forces a path."""

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from card import CARD, OneCard
from torch import Tensor

from kvcli.cli import run
from kvcli.cli.compiled import TARGETS
from kvcli.cli.kernels import read_bandwidth
from kvcli.errors import UsageError
from kvcli.kernels import build, matrix, timing
from kvcli.kernels.adjacent import adjacent_cosine
from kvcli.kernels.op import Op
from kvcli.kernels.table import OPS
from kvcli.kernels.take import take_rows
from kvcli.kernels.window import window_scores

NAMES = {"op", "kernel", "case", "target", "registers", "spills", "shared", "dot"}
GOOD = build.Built("take_rows", "copy_rows", "D=64 bf16", "sm_90", 40, 0, 0, "")
Seen = tuple[dict[str, Any], str]


@pytest.fixture
def asked(capsys: pytest.CaptureFixture[str]) -> Callable[..., Seen]:
    """Runs `kvcli kernels`; gives the JSON and what is said on stderr."""

    def ask(line: str, code: int = 0) -> Seen:
        capsys.readouterr()
        assert run(["kernels", "--json", *line.split()]) == code
        seen = capsys.readouterr()
        assert "Traceback" not in seen.err
        return json.loads(seen.out), seen.err

    return ask


@pytest.fixture
def only(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """As if there were no other ops, and no time to waste on them."""
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    return lambda *ops: monkeypatch.setattr("kvcli.kernels.table.OPS", ops)


def test_floors_are_bytes_by_bandwidth(asked: Callable[..., Seen], capsys: pytest.CaptureFixture[str]) -> None:
    facts, _ = asked("--bandwidth 2TB/s")
    assert facts["schema"] == "kvcli.kernels/1" and [row["op"] for row in facts["rows"]] == [op.name for op in OPS]
    for row, op in zip(facts["rows"], OPS, strict=True):
        assert (row["bytes"], row["flops"]) == op.cost(op.usual, 2)
        assert row["floor_s"] == row["bytes"] / 2e12
        assert row["path"] in ("ref", "cpu", "triton")
    assert run(["kernels", "--bandwidth", "2TB/s"]) == 0
    assert "window_scores" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("text", "speed"), [("3.35TB/s", 3.35e12), ("900 GB/s", 9e11), ("1kb", 1e3), ("7B/s", 7.0), ("0.5MB/s", 5e5)]
)
def test_bandwidths(text: str, speed: float) -> None:
    assert read_bandwidth(text) == pytest.approx(speed)


@pytest.mark.parametrize("text", ["", "3.35", "TB/s", "0GB/s", "-1GB/s", "nanTB/s", "1GiB/s", "1GB/h", "1e9B/s"])
def test_what_is_no_bandwidth(text: str) -> None:
    with pytest.raises(UsageError, match="bandwidth"):
        read_bandwidth(text)


@pytest.mark.parametrize(
    "line", ["--compile --bench", "--all", "--target sm_90", "--tokens 9", "--compile --target sm_1", "--bandwidth x"]
)
def test_options_that_do_not_fit(asked: Callable[..., Seen], line: str) -> None:
    assert asked(line, 2)[0]["error"]["code"] == 2


def test_targets_are_those_that_can_be_built() -> None:
    assert set(TARGETS) == build.TARGETS.keys() == build.SHARED.keys()


@pytest.mark.slow
def test_one_op_is_compiled_in_processes(
    asked: Callable[..., Seen], only: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")
    only(take_rows)
    monkeypatch.setattr(matrix, "SIZES", (64,))
    rows = asked("--compile --target sm_90")[0]["rows"]
    assert [row["case"] for row in rows] == ["D=64 bf16", "D=64 fp32"]
    for row in rows:
        assert row.keys() == NAMES and row["kernel"] == "copy_rows" and row["registers"] > 0 == row["spills"]


@pytest.mark.parametrize(
    ("row", "code", "says"),
    [
        (GOOD, 0, ""),
        (replace(GOOD, spills=8), 7, "spilled by take_rows: copy_rows for sm_90"),
        (replace(GOOD, target="gfx942", shared=65537), 7, "shared memory than there is by take_rows: copy_rows"),
        (matrix.Failed("take_rows", "copy_rows", "D=64 bf16", "sm_80", "Sad: no"), 1, "copy_rows for sm_80 does not"),
    ],
)
def test_the_verdict_on_what_was_built(
    asked: Callable[..., Seen],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    row: Any,
    code: int,
    says: str,
) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(matrix, "matrix", lambda ops, targets, tick: [GOOD, row])
    facts, told = asked("--compile", code)
    assert len(facts["rows"]) == 2 and facts["rows"][0].keys() == NAMES
    assert says in told if says else not told
    for more in ([], ["--all"]):
        assert run(["kernels", "--compile", *more]) == code
        assert "copy_rows" in capsys.readouterr().out


def test_a_kernel_that_does_not_compile_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")

    def built(op: Op, label: str, launch: Any, target: str) -> build.Built:
        if launch.kernel.name == "slice_lse":
            raise RuntimeError("no such instruction\nand more")
        return GOOD

    monkeypatch.setattr(matrix, "build", built)
    rows = matrix.compile_cell(window_scores, 64, torch.bfloat16, "sm_90")
    failed = [row for row in rows if isinstance(row, matrix.Failed)]
    assert len(failed) == len(window_scores.variants) and GOOD in rows
    assert {row.failed for row in failed} == {"RuntimeError: no such instruction"}


def test_nothing_is_compiled_without_triton(asked: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("kvcli.kernels.launch.triton", None)
    assert "Triton is not installed" in asked("--compile", 6)[1]


def test_nothing_is_compiled_in_the_interpreter(asked: Callable[..., Seen], monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert "unset it" in asked("--compile", 2)[1]


def test_ops_are_timed_beside_a_copy(
    asked: Callable[..., Seen], only: Callable[..., None], capsys: pytest.CaptureFixture[str]
) -> None:
    only(adjacent_cosine, take_rows)
    facts, _ = asked("--bench --tokens 65")
    assert {"torch", "triton", "device", "processor", "commit"} <= facts["config"].keys()
    for row, op in zip(facts["rows"], (adjacent_cosine, take_rows), strict=True):
        moved, _ = op.cost({**op.usual, "T": 65}, 2)
        assert (row["op"], row["dtype"], row["tokens"]) == (op.name, "bf16", 65) and row["error"] <= 4e-3
        assert 0 < row["ms"]["p20"] <= row["ms"]["p50"] <= row["ms"]["p80"]
        assert row["gb_s"] == pytest.approx(moved / row["ms"]["p50"] / 1e6)
        assert row["of_copy"] == pytest.approx(row["gb_s"] / row["copy_gb_s"])
    assert run("kernels --bench --tokens 65".split()) == 0
    assert "adjacent_cosine" in capsys.readouterr().out


def last_is_wrong(k: Tensor) -> Tensor:
    out: Tensor = adjacent_cosine.ref(k)
    out[:, -1] += 0.01
    return out


def too_short(k: Tensor) -> Tensor:
    out: Tensor = adjacent_cosine.ref(k)
    return out[:, 1:]


def not_a_number(k: Tensor) -> Tensor:
    return torch.full_like(adjacent_cosine.ref(k), torch.nan)


@pytest.mark.parametrize("twin", [last_is_wrong, too_short, not_a_number])
def test_what_differs_from_its_reference_is_not_timed(
    asked: Callable[..., Seen], only: Callable[..., None], twin: Callable[[Tensor], Tensor]
) -> None:
    only(replace(adjacent_cosine, cpu=twin), take_rows)
    facts, told = asked("--bench --tokens 65", 7)
    wrong, right = facts["rows"]
    assert wrong["matches"] is False and "ms" not in wrong and "ms" in right
    assert "adjacent_cosine was not timed" in told
    assert (wrong["error"] is None) == (twin is not last_is_wrong)


def test_an_op_that_fails_is_a_row(asked: Callable[..., Seen], only: Callable[..., None]) -> None:
    def fails(*args: Any) -> None:
        raise RuntimeError("no memory left")

    only(replace(take_rows, cpu=fails), adjacent_cosine)
    facts, told = asked("--bench --tokens 65", 1)
    assert facts["rows"][0] == {"op": "take_rows", "failed": "RuntimeError: no memory left"}
    assert "ms" in facts["rows"][1] and "take_rows was not timed" in told


class Event:
    """One of a card's, on the clock of this machine."""

    clock = 0.0

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 1.0
        self.at = Event.clock

    def elapsed_time(self, other: "Event") -> float:
        return (other.at - self.at) * 1e3


def test_a_card_is_timed_between_events(monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    pytest.importorskip("triton")
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
    monkeypatch.setattr(timing, "SECONDS", 0.0)
    monkeypatch.setattr(timing, "FLUSH", 64)
    small = replace(take_rows, usual={**take_rows.usual, "H": 2})
    with torch.inference_mode(), OneCard():
        row = timing.timed(small, 33, CARD)
    assert row["path"] == "triton" and row["matches"] and row["error"] == 0.0
    assert row["ms"] == {"p20": 1000.0, "p50": 1000.0, "p80": 1000.0} and row["of_copy"] == 1.0


LINES = [
    "prefill doc.txt --model none",
    "compress none -m snapkv -b 20% -o x",
    "resume none -p x",
    "eval doc.txt --model none",
    "bench doc.txt --model none",
    "diff none none",
    "kernels",
]


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("forced", ["fast", "triton"])
def test_a_path_that_cannot_be_taken_is_refused(
    line: str, forced: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "doc.txt").write_text("The ferry sailed.")
    monkeypatch.setenv("KVCLI_KERNELS", forced)
    assert run(line.split()) == 2
    told = capsys.readouterr().err
    assert f"KVCLI_KERNELS={forced}" in told and "unset it" in told


@pytest.mark.parametrize("forced", ["", "ref", "cpu"])
def test_other_paths_are_taken(forced: str, monkeypatch: pytest.MonkeyPatch, asked: Callable[..., Seen]) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", forced)
    paths = {row["path"] for row in asked("")[0]["rows"]}
    assert paths <= {"ref", "cpu"} and (forced != "ref" or paths == {"ref"})


def test_triton_is_taken_in_the_interpreter(monkeypatch: pytest.MonkeyPatch, asked: Callable[..., Seen]) -> None:
    pytest.importorskip("triton")
    monkeypatch.setenv("KVCLI_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    paths = {row["op"]: row["path"] for row in asked("")[0]["rows"]}
    assert paths["take_rows"] == paths["window_scores"] == "triton"
