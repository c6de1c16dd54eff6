"""kvcli score: what prefill would have recorded is added, bit for bit, and nothing else changes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import opened
from test_architectures import build
from test_readme import here
from tiny import nudge, tiny_model

import kvcli
from kvcli import registry
from kvcli.cli import run
from kvcli.errors import InfeasibleError
from kvcli.model.load import Model
from kvcli.model.score import collect, divide
from kvcli.registry import Ask, Scored, Stage
from kvcli.snapshot import LayerKV, Stats

TEXT = "The harbour opened at six.\n\n" * 12 + "The new ferry is called Kestrel.\n"
ADDED = ["score", "a.kv.safetensors", "--collect", "norms,moments"]


@pytest.fixture
def desk(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCLI_MODEL", str(folder))
    (tmp_path / "a.txt").write_text(TEXT)
    assert run(["prefill", "a.txt", "-o", "a.kv.safetensors"]) == 0
    return tmp_path


@pytest.mark.parametrize("options", [[], ["--dtype", "float32"], ["--raw"]])
def test_it_adds_what_prefill_would_have_recorded(desk: Path, options: list[str]) -> None:
    read = ["prefill", "a.txt", *options, "-o"]
    assert run([*read, "a.kv.safetensors", "-f"]) == 0 and run([*ADDED, "-o", "b"]) == 0
    assert run([*read, "c", "--collect", "norms", "--collect", "moments"]) == 0
    assert (desk / "b").read_bytes() == (desk / "c").read_bytes() != (desk / "a.kv.safetensors").read_bytes()
    assert run(["score", "b", "--collect", "moments", "-o", "d"]) == 0
    assert (desk / "d").read_bytes() == (desk / "c").read_bytes()


def test_all_else_stays_that_of_a_probe_too(desk: Path) -> None:
    assert run(["prefill", "a.txt", "--probe", "Which ferry?", "-f", "-o", "a.kv.safetensors"]) == 0
    assert run([*ADDED, "--chunk", "50", "-o", "b"]) == 0
    before, after = opened(desk / "a.kv.safetensors"), opened(desk / "b")
    assert list(before.extra) == list(after.extra)
    for i, stats in enumerate(before.stats):
        for name, part in stats.present().items():
            assert torch.equal(part, getattr(after.stats[i], name)), name
        assert torch.equal(before.rows[i].k, after.rows[i].k) and torch.equal(before.rows[i].v, after.rows[i].v)
    assert before.meta == after.meta and run(["verify", "b"]) == 0


def test_over_itself_only_by_force(desk: Path) -> None:
    path = desk / "a.kv.safetensors"
    plain = path.read_bytes()
    assert run([*ADDED, "-o", path.name]) == 3 and path.read_bytes() == plain
    assert run([*ADDED, "-f", "-o", path.name]) == 0 and run(["verify", path.name]) == 0
    assert opened(path).stats[0].q_cov is not None
    assert [one.name for one in desk.iterdir() if one.name.startswith(".")] == []


def test_pipes_and_the_newest_here(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = f'"{sys.executable}" -m kvcli'
    shell = f"set -o pipefail; cat a.kv.safetensors | {line} score --collect norms | {line} verify -"
    subprocess.run(["bash", "-c", shell], check=True, capture_output=True)
    capsys.readouterr()
    assert run(["score", "--collect", "norms", "-o", "b", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "kvcli.score/1" and found["file_bytes"] == (desk / "b").stat().st_size
    assert found["collect"] == ["norms"] and not found["warnings"]


def test_what_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compress", "a.kv.safetensors", "-m", "snapkv", "-b", "50%", "-o", "small"]) == 0
    nudge(tiny_model(desk / "other"))
    for line, code, says in (
        ("score small --collect norms -o b", 6, "score the full snapshot"),
        ("score a.kv.safetensors -o b", 2, "nothing is asked for"),
        ("score a.kv.safetensors --collect moment -o b", 2, "did you mean moments?"),
        ("score none --collect norms -o b", 3, "none"),
        ("score a.txt --collect norms -o b", 4, "not a snapshot"),
        ("score a.kv.safetensors --collect norms --model other -o b", 5, "resume also takes --trust-model"),
        ("prefill a.txt --collect norm -o b", 2, "did you mean norms?"),
    ):
        assert run(line.split()) == code, line
        assert says in capsys.readouterr().err, line
    assert not (desk / "b").exists()


def test_segments_of_a_snapshot_whose_text_is_that_of_its_ids(desk: Path, model: Model) -> None:
    full = opened(desk / "a.kv.safetensors")
    wanted = full.extra["stat.segments"]
    bare = replace(full, extra={name: part for name, part in full.extra.items() if name != "stat.segments"})
    assert torch.equal(divide(model, bare).extra["stat.segments"], wanted) and len(wanted) == 13
    rows = [{"start": 4, "end": 11, "type": "frame", "group": 3}]
    begin, end, kind, group = divide(model, full, rows).extra["stat.segments"][0].tolist()
    assert model.tokenizer.decode(full.ids[begin:end]) == "harbour" and (kind, group) == (3, 3)
    chat = kvcli.prefill([{"role": "user", "content": "Who?"}], model)
    with pytest.raises(InfeasibleError, match="cannot be divided"):
        divide(model, chat)


def test_what_a_model_does_not_allow_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """GPT-2 has no rotation to take back; where no decoder layers are found either, nothing is added at all."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCLI_MODEL", str(build("gpt2", tmp_path / "m")))
    (tmp_path / "a.txt").write_text(TEXT[:150])
    assert run(["prefill", "a.txt", "-o", "a.kv.safetensors", "--collect", "moments"]) == 0
    assert "not recorded: q_mean, q_cov" in capsys.readouterr().err
    assert opened(tmp_path / "a.kv.safetensors").stats[0].mass_sq is not None
    assert run([*ADDED, "-o", "b"]) == 0 and "q_mean, q_cov" in capsys.readouterr().err
    monkeypatch.setattr("kvcli.model.collect._blocks", lambda *_: {})
    assert run(["score", "a.kv.safetensors", "--collect", "norms", "-o", "c"]) == 6
    assert "resid_norm" in capsys.readouterr().err and not (tmp_path / "c").exists()


def test_what_is_appended_cannot_begin_to_collect(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "b.txt").write_text("It sails at noon.\n")
    assert run("prefill b.txt --onto a.kv.safetensors --collect norms -o b".split()) == 0
    assert "the snapshot did not have what came before" in capsys.readouterr().err
    assert run(["score", "b", "--collect", "norms", "-o", "c"]) == 0
    assert run("prefill b.txt --onto c -o d".split()) == 0  # goes on unasked
    assert len(opened(desk / "d").stats[0].resid_norm) == len(opened(desk / "d").ids)  # type: ignore[arg-type]


def test_a_snapshot_in_memory(model: Model) -> None:
    plain, asked = kvcli.prefill(TEXT, model), kvcli.prefill(TEXT, model, collect="norms,moments")
    added = collect(model, plain, ["norms", "moments"])
    for stats, want in zip(added.stats, asked.stats, strict=True):
        for name, part in want.present().items():
            assert torch.equal(getattr(stats, name), part), name


def test_eval_and_bench_record_what_their_methods_need(desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that would find nothing without them, on a text and on its snapshot."""
    seen: list[bool] = []

    def squares(kv: LayerKV, stats: Stats, ask: Ask) -> Scored:
        """By squares of the attention received."""
        assert stats.mass_sq is not None
        seen.append(ask.segments is not None)
        return Scored(stats.mass_sq.gather(1, kv.pos.clamp(min=0).long()))

    stage = Stage("score", "squares", squares, needs=("mass_sq",))
    monkeypatch.setitem(registry._table, ("score", "squares"), stage)
    monkeypatch.setattr("kvcli.process.apart", here)
    grid = ["-m", "squares", "-b", "50%"]
    assert run(["eval", "a.txt", *grid, "--task", "ppl", "-o", "e.json"]) == 0
    assert run(["bench", "a.txt", *grid, "--runs", "1", "-o", "rows.jsonl"]) == 0
    assert seen and all(seen)
    plain = json.loads((desk / "e.json").read_text())["rows"]
    assert run(["eval", "a.txt", "-m", "knorm", "-b", "50%", "--task", "ppl", "-o", "f.json"]) == 0
    other = json.loads((desk / "f.json").read_text())["rows"]
    sizes = [{row["bytes"] for row in rows if row["method"] == "full"} for rows in (plain, other)]
    assert sizes[0] == sizes[1]
    (desk / "q.jsonl").write_text('{"prompt": "Who?", "answer": "x"}')
    assert run(["eval", "a.kv.safetensors", *grid, "--questions", "q.jsonl"]) == 6  # it says what records them
