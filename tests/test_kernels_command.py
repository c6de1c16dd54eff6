"""kvcli kernels: costs, kernels compiled for cards, times beside a copy, and what it refuses."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from multiprocessing import active_children
from typing import Any

import pytest
import torch
from card import CARD, OneCard
from torch import Tensor

from kvcli.cli import kernels as cli
from kvcli.cli import run
from kvcli.errors import UsageError
from kvcli.kernels import build, launch, matrix, table, timing
from kvcli.kernels.build import SHARED, Built
from kvcli.kernels.launch import Kernel, tl
from kvcli.kernels.op import Fn, Op
from kvcli.kernels.table import OPS
from kvcli.kernels.take import take_rows

needs_triton = pytest.mark.skipif(launch.triton is None, reason="no Triton for this system")
USING = ("prefill x", "compress x -m random -b 9", "resume x -p y", "eval x", "bench x", "diff x y", "kernels")


@pytest.fixture(autouse=True)
def no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def found(capsys: pytest.CaptureFixture[str], line: str, code: int = 0) -> tuple[dict[str, Any], str]:
    """The object on stdout, and stderr."""
    capsys.readouterr()
    assert run(["kernels", *line.split(), "--json"]) == code
    seen = capsys.readouterr()
    assert "Traceback" not in seen.err
    return json.loads(seen.out), seen.err


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process, one size, and few runs."""
    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    monkeypatch.setattr(matrix, "SIZES", (64,))
    monkeypatch.setattr(timing, "SECONDS", 0.0)


@Kernel
def _nonsense(x, D: tl.constexpr):  # type: ignore[no-untyped-def]
    tl.store(x, nowhere + D)  # type: ignore[name-defined]  # noqa: F821


def _start_nonsense(k: Tensor, v: Tensor, index: Tensor) -> None:
    _nonsense[1,](k, D=k.shape[-1], enable_fp_fusion=True)


def _endless(*args: Any) -> None:
    time.sleep(120)


def _raise(*args: Any) -> None:
    raise RuntimeError("half\nway")


def _off(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    new_k, new_v = take_rows.ref(k, v, index)
    new_k[-1] = 0  # the last row is not written
    return new_k, new_v


def use(monkeypatch: pytest.MonkeyPatch, *ops: Op) -> None:
    monkeypatch.setattr(table, "OPS", ops)


def test_bandwidths() -> None:
    for text, speed in {"3.35TB/s": 3.35e12, "900 GB/s": 9e11, " 1kb/S": 1e3, "7 b/s": 7, "0.5MB/s": 5e5}.items():
        assert cli.bandwidth(text) == pytest.approx(speed)
    for text in ("", "3.35", "3.35TB", "TB/s", "0TB/s", "-1GB/s", "1e3GB/s", "5GiB/s", "1,5GB/s", "9" * 400 + "TB/s"):
        with pytest.raises(UsageError, match="is not a bandwidth"):
            cli.bandwidth(text)
    assert run(["kernels", "--bandwidth", "fast"]) == 2


def test_floors_are_bytes_over_bandwidth(capsys: pytest.CaptureFixture[str]) -> None:
    facts, _ = found(capsys, "--bandwidth 2TB/s --tokens 4096")
    assert facts["schema"] == "kvcli.kernels/1" and [row["op"] for row in facts["rows"]] == [op.name for op in OPS]
    for op, row in zip(OPS, facts["rows"], strict=True):
        assert row["case"] == op.usual | ({"T": 4096} if "T" in op.usual else {})
        assert (row["bytes"], row["flops"]) == op.cost(row["case"], 2)
        assert row["floor_s"] == row["bytes"] / 2e12 and row["path"] in ("ref", "cpu")
    assert run(["kernels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    floor = take_rows.cost(take_rows.usual, 2)[0] / 3.35e12
    (line,) = [line for line in lines if line.startswith("take_rows")]
    assert line.split()[-4:] == [f"{floor * 1e6:.1f}", "µs", f"{floor * 32e3:.2f}", "ms"]
    assert run(["kernels", "nothing"]) == 2
    assert "take_rows" in capsys.readouterr().err


def test_targets_are_those_that_can_be_compiled_for() -> None:
    assert tuple(build.TARGETS) == cli.TARGETS == tuple(SHARED)


@needs_triton
def test_one_kernel_for_one_target(capsys: pytest.CaptureFixture[str], quick: None) -> None:
    facts, err = found(capsys, "take_rows --compile --target sm_90")
    assert facts.keys() == {"schema", "rows"} and not err
    assert [row["case"] for row in facts["rows"]] == ["D=64 bf16", "D=64 fp32"]
    for row in facts["rows"]:
        assert list(row) == [field.name for field in fields(Built)]
        assert (row["op"], row["kernel"], row["target"], row["spills"]) == ("take_rows", "copy_rows", "sm_90", 0)
        assert 0 < row["registers"] <= 255
    for line, name in (("", "2 cases"), ("--all", "D=64 fp32")):
        assert run(f"kernels take_rows --compile --target sm_90 {line}".split()) == 0
        assert name in capsys.readouterr().out


@needs_triton
@pytest.mark.parametrize(("spills", "shared"), [(8, 0), (0, SHARED["gfx942"] + 1)])
def test_kernels_that_do_not_fit_are_named(
    spills: int, shared: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    monkeypatch.setattr(
        matrix, "build", lambda op, label, one, target: Built(op.name, "it", label, target, 9, spills, shared, "")
    )
    facts, err = found(capsys, "take_rows --compile --target gfx942 --target sm_100", 7)
    assert [row["spills"] for row in facts["rows"]] == [spills] * 4
    assert "take_rows it on gfx942" in err and "D=64 bf16, D=64 fp32" in err
    assert ("sm_100" in err) == bool(spills)
    assert run("kernels take_rows --compile --target gfx942".split()) == 7
    assert f" {2 * spills} " in capsys.readouterr().out


@needs_triton
def test_what_cannot_be_compiled_leaves_the_rest_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    broken = replace(take_rows, name="broken", fused=_start_nonsense)
    use(monkeypatch, broken, replace(broken, name="raises", fused=_raise), take_rows)
    facts, err = found(capsys, "--compile --target sm_90", 1)
    failed = {row["op"]: row for row in facts["rows"] if "failed" in row}
    assert "nowhere" in failed["broken"]["failed"] and failed["broken"]["kernel"] == "nonsense"
    assert failed["raises"]["failed"] == "RuntimeError: half\nway" and failed["raises"]["kernel"] == ""
    assert [row["op"] for row in facts["rows"] if "spills" in row] == ["take_rows"] * 2
    assert "broken nonsense on sm_90" in err and "way" in err
    assert run("kernels --compile --target sm_90".split()) == 1
    assert "failed" in capsys.readouterr().out


@needs_triton
@pytest.mark.slow
def test_processes_give_the_same_rows_in_order_and_end_when_they_are_not_wanted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(matrix, "SIZES", (64,))
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    todo = matrix.tasks([take_rows], ["sm_80", "sm_90"])
    running = matrix.compile_all(todo)
    first = next(running)
    assert [first, *running] == [matrix.compile_one(task) for task in todo]
    endless = replace(todo[0], op=replace(take_rows, fused=_endless))
    running, start = matrix.compile_all([todo[0], endless]), time.monotonic()
    next(running)
    with pytest.raises(KeyboardInterrupt):
        running.throw(KeyboardInterrupt)
    assert not active_children() and time.monotonic() - start < 60


def test_jobs_that_make_no_sense(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert run(["kernels", "--compile", "--bench"]) == run(["kernels", "--target", "sm_90"]) == 2
    assert run(["kernels", "--compile", "--target", "sm_70"]) == 2
    if launch.triton:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert run(["kernels", "--compile"]) == run(["kernels", "--bench"]) == 2
        assert "TRITON_INTERPRET" in capsys.readouterr().err
    monkeypatch.setattr(launch, "triton", None)
    assert run(["kernels", "--compile"]) == 6
    assert "Triton is not installed" in capsys.readouterr().err


def test_times_of_what_is_its_reference(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    planted = replace(take_rows, name="planted", cpu=_off)
    use(monkeypatch, planted, replace(planted, name="raises", cpu=_raise), take_rows)
    facts, err = found(capsys, "--bench --tokens 65", 7)
    missed, failed, sound = facts["rows"]
    assert missed["error"] > 4e-3 and "ms" not in missed and "planted (cpu) is not its reference" in err
    assert failed["failed"] == "RuntimeError: half\nway" and "raises failed: RuntimeError: half" in err
    assert sound["error"] == 0 and (sound["path"], sound["dtype"], sound["tokens"]) == ("cpu", "bf16", 65)
    assert 0 < sound["ms"]["p20"] <= sound["ms"]["p50"] <= sound["ms"]["p80"]
    moved = take_rows.cost(take_rows.at(65), 2)[0]
    assert sound["gb_s"] == pytest.approx(moved / sound["ms"]["p50"] / 1e6)
    assert sound["of_copy"] == pytest.approx(sound["gb_s"] / sound["copy_gb_s"])
    assert {"torch", "triton", "processor", "commit"} <= sound.keys()
    assert run("kernels --bench --tokens 65".split()) == 7
    assert "not timed" in capsys.readouterr().out
    assert run("kernels raises --bench --tokens 65".split()) == 1
    assert run("kernels take_rows --bench --tokens 65".split()) == 0


def test_a_copy_moves_every_byte_once() -> None:
    assert timing._copy(10, torch.device("cpu"))().numel() == 5


@pytest.mark.parametrize(
    "twin",
    [lambda k, v, index: take_rows.ref(k, v, index[1:]), lambda k, v, index: take_rows.ref(k, v * torch.nan, index)],
    ids=["another shape", "NaN"],
)
def test_no_number_says_how_far_off_these_are(
    twin: Fn, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, quick: None
) -> None:
    use(monkeypatch, replace(take_rows, cpu=twin))
    facts, _ = found(capsys, "--bench --tokens 65", 7)
    assert facts["rows"][0]["error"] is None and "ms" not in facts["rows"][0]


class Event:
    """Time on a card that has none: a millisecond from each record to the next."""

    now = 0

    def __init__(self, enable_timing: bool) -> None:
        self.at = 0

    def record(self) -> None:
        Event.now += 1
        self.at = Event.now

    def synchronize(self) -> None:
        assert self.at

    def elapsed_time(self, end: Event) -> float:
        return float(end.at - self.at)


@needs_triton
def test_on_a_card_its_kernels_are_timed_by_its_own_clock(
    monkeypatch: pytest.MonkeyPatch, interpreted: None, quick: None
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(timing, "FLUSH", 1 << 10)
    seen: list[Mapping[str, Any]] = []
    with OneCard():
        for op in (take_rows, replace(take_rows, fused=None), replace(take_rows, fused=_off)):
            seen.append(timing.timed(op, CARD, 3))
    assert [row["path"] for row in seen] == ["triton", "ref", "triton"]
    assert [row.get("ms") for row in seen] == [{"p20": 1.0, "p50": 1.0, "p80": 1.0}] * 2 + [None]


@pytest.mark.parametrize("line", USING)
def test_a_path_that_is_not_to_be_had_is_refused(
    line: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", "foo")
    assert run(line.split()) == 2
    assert "KVCLI_KERNELS=foo: write ref, cpu or triton" in capsys.readouterr().err
    assert run([line.split()[0], "--help"]) == 0
    monkeypatch.setenv("KVCLI_KERNELS", "triton")
    assert run(line.split()) == 2
    assert "write ref or cpu" in capsys.readouterr().err


def test_the_path_that_is_asked_for_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", "ref")
    assert {row["path"] for row in found(capsys, "")[0]["rows"]} == {"ref"}
    if launch.triton:
        monkeypatch.setenv("KVCLI_KERNELS", "triton")
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        assert found(capsys, "take_rows")[0]["rows"][0]["path"] == "triton"
