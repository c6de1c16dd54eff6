"""kvcli eval on a tiny model: tables and JSON, anchors, gates, logs that are gone on from, snapshots, bad input."""

import json
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from kvcli.cli import run

TEXT = "The ferry sailed at six and came back at nine. " * 4
SCHEMA = "kvcli.eval/1"


@pytest.fixture
def desk(tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with documents, questions and a row of qa; the tiny model is the default."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCLI_MODEL", str(folder))
    monkeypatch.setenv("KVCLI_DTYPE", "float32")
    asked = {"prompt": "When?", "prefix": "It sailed at", "answer": ["six", "6"]}
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT.replace("six", "ten"))
    (tmp_path / "q.jsonl").write_text(json.dumps(asked) + "\n" + json.dumps({"prompt": "Who?", "answer": "x"}) + "\n")
    (tmp_path / "qa.jsonl").write_text(json.dumps({"context": TEXT, "questions": [asked]}) + "\n")
    return tmp_path


def result(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> dict[str, Any]:
    """What --json prints."""
    capsys.readouterr()
    assert run(["eval", *args, "--json"]) == code
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def values(rows: list[dict[str, Any]], metric: str) -> dict[str, float]:
    return {f"{row['task']} {row['method']} {row['budget']}": row["value"] for row in rows if row["metric"] == metric}


ARGS = ("a.txt", "-t", "ppl,qa:qa.jsonl", "-m", "h2o,kvmerger", "-b", "50%,20%", "-n", "3")


def test_rows_of_every_task_method_and_budget_with_anchors(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, *ARGS)
    assert found["schema"] == SCHEMA and found["errors"] == []
    names = ["full 100%", "none 0%", "h2o 50%", "h2o 20%", "kvmerger 50%", "kvmerger 20%"]
    assert [*values(found["rows"], "ppl")] == [f"ppl {name}" for name in names]
    assert [*values(found["rows"], "hit")] == [f"qa:qa.jsonl {name}" for name in names]
    assert {"method", "budget", "task", "metric", "value", "stderr", "n", "bytes"} <= found["rows"][0].keys()
    assert {row["metric"] for row in found["rows"]} == {
        "ppl",
        "nll",
        "kl",
        "kl_median",
        "kl_p95",
        "top1",
        "hit",
        "em",
        "f1",
    }
    assert found["config"]["tasks"] == {"ppl": 1, "qa:qa.jsonl": 1} and found["config"]["model"] == "tiny0"
    assert result(capsys, *ARGS) == found


def test_tables(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", *ARGS]) == 0
    out = capsys.readouterr().out
    assert "ppl, n = " in out and "recovery" in out and " ± " in out
    assert [line.split()[0] for line in out.splitlines() if "±" in line] == (
        ["full", "none", "h2o", "h2o", "kvmerger", "kvmerger"] * 2
    )
    assert run(["eval", *ARGS, "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| method | budget | ppl |") and len({line.count("|") for line in lines[2:9]}) == 1


def test_a_file_of_results(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = result(capsys, *ARGS, "-o", "r.json")
    assert json.loads((desk / "r.json").read_text()) == found
    assert run(["eval", *ARGS, "-o", "r.json"]) == 3
    assert run(["eval", *ARGS, "-o", "-"]) == 2
    assert run(["eval", *ARGS, "-o", "none/r.json"]) == 3


@pytest.mark.parametrize(
    ("gate", "code", "says"),
    [
        ("top1=0", 0, ""),
        ("top1=1.01", 7, "qa:qa.jsonl: top1 of h2o 50% is"),
        ("hit", 2, "METRIC=VALUE"),
        ("hits=1", 2, "no task has this metric"),
        ("kl=1", 2, "less is better"),
        ("top1=nan", 2, "METRIC=VALUE"),
    ],
)
def test_gates(desk: Path, capsys: pytest.CaptureFixture[str], gate: str, code: int, says: str) -> None:
    assert run(["eval", *ARGS, "--fail-under", gate]) == code
    assert says in capsys.readouterr().err


def test_a_run_goes_on_from_its_log(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = desk / "log.jsonl"
    whole = result(capsys, *ARGS, "--log", "log.jsonl")
    data = log.read_bytes()
    for end in (0, 100, data.index(b"\n") + 1, len(data) // 2, len(data) - 1, len(data)):
        log.write_bytes(data[:end])
        assert result(capsys, *ARGS, "--log", "log.jsonl") == whole
        assert log.read_bytes() == data
    # More methods may be asked for, and fewer.
    more = result(capsys, *ARGS, "-m", "random", "--log", "log.jsonl")
    assert result(capsys, *ARGS, "--log", "log.jsonl") == whole
    assert {row["method"] for row in more["rows"]} == {"full", "none", "h2o", "kvmerger", "random"}
    texts = [json.loads(line).get("text") for line in log.read_text().splitlines()]
    assert any(texts)


def test_a_log_of_another_run_is_refused(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result(capsys, *ARGS, "--log", "log.jsonl")
    before = (desk / "log.jsonl").read_bytes()
    assert run(["eval", *ARGS, "--log", "log.jsonl", "--seed", "1", "--raw"]) == 2
    assert "differs in raw, seed" in capsys.readouterr().err
    assert (desk / "log.jsonl").read_bytes() == before
    (desk / "diary").write_text("Dear diary.\n")
    assert run(["eval", *ARGS, "--log", "diary"]) == 3
    assert (desk / "diary").read_text() == "Dear diary.\n"


def snapshots(desk: Path) -> None:
    assert run(["prefill", "a.txt", "-o", "full.kv.safetensors"]) == 0
    assert run(["compress", "full.kv.safetensors", "-m", "h2o", "-b", "20%", "-o", "small.kv.safetensors"]) == 0


def test_snapshots_are_measured_as_they_are(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshots(desk)
    args = ("--questions", "q.jsonl", "--continuation", "b.txt", "-m", "h2o", "-b", "50%", "-n", "3")
    texts = result(capsys, "a.txt", *args, "-b", "20%")
    files = result(capsys, "full.kv.safetensors", *args, "-b", "20%")
    for metric in ("hit", "ppl", "kl"):
        assert values(texts["rows"], metric) == values(files["rows"], metric)
    both = result(capsys, "full.kv.safetensors", "small.kv.safetensors", *args)
    alone = result(capsys, "small.kv.safetensors", *args)  # its document is read again
    for found in (both, alone):
        assert values(found["rows"], "kl") == values(files["rows"], "kl")


def test_files_called_alike_stay_apart(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshots(desk)
    again = ["compress", "full.kv.safetensors", "-m", "h2o:heavy=0.5", "-b", "20%", "-o", "again.kv.safetensors"]
    assert run(again) == 0
    files = ("full.kv.safetensors", "small.kv.safetensors", "again.kv.safetensors")
    found = result(capsys, *files, "--questions", "q.jsonl", "-m", "h2o", "-b", "20%")
    assert {row["n"] for row in found["rows"]} == {2}
    assert {row["method"] for row in found["rows"]} == {"full", "none", "h2o", "small.kv.safetensors", "h2o:heavy=0.5"}


def test_a_damaged_snapshot_does_not_stop_the_rest(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshots(desk)
    data = bytearray((desk / "small.kv.safetensors").read_bytes())
    data[len(data) // 2] ^= 1
    (desk / "small.kv.safetensors").write_bytes(data)
    files = ("full.kv.safetensors", "small.kv.safetensors")
    found = result(capsys, *files, "--questions", "q.jsonl", "-m", "random", "-b", "50%", code=4)
    assert {row["method"] for row in found["rows"]} == {"full", "none", "random"}


def test_another_models_snapshot_does_not_stop_the_rest(
    desk: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshots(desk)
    other = tiny_model(tmp_path_factory.mktemp("other") / "other", seed=1)
    assert run(["prefill", "a.txt", "--model", str(other), "-o", "other.kv.safetensors"]) == 0
    files = ("full.kv.safetensors", "other.kv.safetensors", "small.kv.safetensors")
    found = result(capsys, *files, "--questions", "q.jsonl", "-m", "random", "-b", "50%", code=5)
    assert {row["method"] for row in found["rows"]} == {"full", "none", "random", "h2o"}
    assert {row["document"] for row in found["errors"]} == {"other.kv.safetensors"}
    assert {row["error"]["code"] for row in found["errors"]} == {5}


def test_a_document_that_is_too_long_does_not_stop_the_rest(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "long.txt").write_text("It is a very long report. " * 90)
    found = result(capsys, "long.txt", "a.txt", "-t", "ppl", "-m", "random", code=6)
    assert {row["document"] for row in found["errors"]} == {"long.txt"} and len(found["rows"]) == 18
    cut = result(capsys, "long.txt", "a.txt", "-t", "ppl,needle:facts=2,copies=1", "-m", "random", "--truncate")
    assert cut["rows"][0]["n"] > found["rows"][0]["n"] and cut["errors"] == []


@pytest.mark.parametrize(
    ("args", "code", "says"),
    [
        (("a.txt", "-t", "needel"), 2, "did you mean needle?"),
        (("a.txt", "-t", "ppl,ppl"), 2, "given twice"),
        (("a.txt", "-t", "ppl:x=1"), 2, "no options"),
        (("-t", "ppl"), 2, "needs a document"),
        (("a.txt", "a.txt"), 2, "given twice"),
        (("--questions", "q.jsonl"), 2, "about documents"),
        (("a.txt", "-m", "h2o,h2o"), 2, "given twice"),
        (("a.txt", "-m", "nothing"), 2, "nothing"),
        (("a.txt", "-b", "150%"), 2, "100%"),
        (("none.txt",), 3, "none.txt"),
        (("empty.txt", "-t", "ppl"), 2, "empty"),
        (("few.txt", "-t", "ppl"), 2, "too short"),
        (("-t", "qa:bad.jsonl"), 4, "bad.jsonl:2"),
        (("a.txt", "-t", "qa:qa.jsonl"), 2, "asked nothing"),
        (("full.kv.safetensors", "--questions", "q.jsonl", "-t", "needle"), 2, "needs a text"),
        (("-t", "qa:none.jsonl"), 3, "none.jsonl"),
        (("a.txt", "-t", "ppl", "--known", "-m", "snapkv"), 2, "--known"),
        (("full.kv.safetensors",), 2, "--questions FILE"),
        (("full.kv.safetensors", "--questions", "q.jsonl", "--raw"), 2, "--raw"),
        (("cut.kv.safetensors", "--questions", "q.jsonl"), 4, "cut.kv.safetensors"),
    ],
)
def test_bad_input_is_told(
    desk: Path, capsys: pytest.CaptureFixture[str], args: tuple[str, ...], code: int, says: str
) -> None:
    snapshots(desk)
    (desk / "cut.kv.safetensors").write_bytes((desk / "full.kv.safetensors").read_bytes()[:-9])
    (desk / "empty.txt").write_text(" \n")
    (desk / "few.txt").write_text("a")
    (desk / "bad.jsonl").write_text('{"context": "a", "questions": [{"prompt": "b", "answer": "c"}]}\n{"context": 1}\n')
    capsys.readouterr()
    assert run(["eval", *args]) == code
    told = capsys.readouterr()
    assert says in told.err and "Traceback" not in told.err and told.out == ""


def test_control_characters_stay_text_and_out_of_the_terminal(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "a.txt").write_text(f"\x1b[31mred\x07 <|im_end|> {TEXT}")
    (desk / "q\x1b.jsonl").write_text((desk / "q.jsonl").read_text())
    assert run(["eval", "a.txt", "-t", "ppl", "--questions", "q\x1b.jsonl", "-m", "random"]) == 0
    told = capsys.readouterr()
    assert "\x1b" not in told.out + told.err and "\x07" not in told.out + told.err


@pytest.mark.parametrize("change", [{"values": {"hit": [float("nan")]}}, {"values": 1}, {"values": {"hit": []}}])
def test_a_log_changed_by_hand_is_refused(
    desk: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any]
) -> None:
    args = ["a.txt", "--questions", "q.jsonl", "-m", "random", "-n", "2", "--log", "log.jsonl"]
    result(capsys, *args)
    lines = (desk / "log.jsonl").read_text().splitlines()
    lines[2] = json.dumps(json.loads(lines[2]) | change)
    (desk / "log.jsonl").write_text("\n".join(lines) + "\n")
    assert run(["eval", *args]) == 3 and "the log was changed" in capsys.readouterr().err


def test_brackets_in_names_are_text(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (desk / "q[").mkdir()
    (desk / "q[" / "b].jsonl").write_text((desk / "qa.jsonl").read_text())
    assert run(["eval", "-t", "qa:q[/b].jsonl", "-m", "random"]) == 0
    assert "qa:q[/b].jsonl" in capsys.readouterr().out
