"""kvcli resume at the command line: several prompts, JSON lines, continuations, stop texts, interruptions."""

import io
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tiny import tiny_model

from kvcli.cli import run
from kvcli.cli.answers import Talk, judge
from kvcli.cli.ui import Ui
from kvcli.errors import InfeasibleError

TEXT = "The harbour opened at six. " * 12 + "The new ferry is called Kestrel.\n"
LONG = "zebra " * 200  # a random model hears no difference between short questions
KVCLI = [sys.executable, "-m", "kvcli"]
PREFILL = "prefill doc.txt --model model --dtype float32 -o"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A full snapshot of a chat, a raw one, and a small one of the first."""
    folder = tmp_path_factory.mktemp("work")
    (folder / "doc.txt").write_text(TEXT)
    tiny_model(folder / "model", max_position_embeddings=4096)
    (folder / "more.txt").write_text("It left at noon. " * 20)
    (folder / "void.txt").write_text("")
    (folder / "long.txt").write_text("word " * 2000)
    (folder / "q.jsonl").write_text('{"prompt": "Who?", "prefix": "It is", "answer": "x"}\n{"prompt": "What?"}\n')
    os.environ["KVCLI_HOME"] = str(folder / "home")
    there = Path.cwd()
    os.chdir(folder)
    assert run(f"{PREFILL} full".split()) == 0 == run(f"{PREFILL} raw --raw".split())
    assert run("compress full -m snapkv+adakv -b 35% -o small".split()) == 0
    os.chdir(there)
    return folder


@pytest.fixture(autouse=True)
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("KVCLI_HOME", str(folder / "home"))
    monkeypatch.chdir(folder)
    return folder


def told(capsys: pytest.CaptureFixture[str], line: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run([*line.split(), "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def said(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    capsys.readouterr()
    assert run(["resume", *args]) == 0
    return capsys.readouterr().out


def test_every_prompt_is_asked_on_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (said(capsys, "small", "-n", "40", "-p", text) for text in ("Who?", LONG))
    assert one != two
    assert said(capsys, "small", "-n", "40", "-p", "Who?", "-p", LONG, "-p", "Who?") == one + two + one


def test_jsonl_gives_each_answer_a_line_as_json_gives_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    line = "resume small --questions q.jsonl -n 6 --against full"
    facts = told(capsys, line)
    assert run([*line.split(), "--jsonl"]) == 0
    seen = capsys.readouterr()
    rows = [json.loads(row) for row in seen.out.splitlines()]
    for mine, other in zip(rows, facts["answers"], strict=True):
        assert all(mine[name] == other[name] for name in mine if "second" not in name)
        assert 0 < mine["kl_mean"] <= mine["kl_p95"] and 0 <= mine["top1"] <= 1
    assert [("hit" in row, row["prompt"]) for row in rows] == [(True, "Who?"), (False, "What?")]
    assert facts["kl_mean"] == pytest.approx(sum(row["kl_mean"] for row in rows) / 2)
    assert "tokens reused" in seen.err and "KL" in seen.err


def test_a_continuation_is_measured_under_both(capsys: pytest.CaptureFixture[str]) -> None:
    facts = told(capsys, "resume small --continuation more.txt --against full")
    found, alone = facts["continuation"], told(capsys, "resume full --continuation more.txt")["continuation"]
    assert found["nll_against"] == pytest.approx(alone["nll"]) and found["tokens"] == alone["tokens"]
    assert found["perplexity"] == pytest.approx(2.718281828 ** found["nll"]) and found["nll"] != alone["nll"]
    assert 0 < found["kl_mean"] < found["kl_p95"] and facts["answers"] == [] and "kl_mean" not in alone
    assert facts["tokens_computed"] == found["tokens"] - 1
    shown = said(capsys, *"small --continuation more.txt --against full".split())
    assert f"perplexity {found['perplexity']:.4f}" in shown and f"{found['perplexity_against']:.4f}" in shown


def test_an_empty_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    for file, computed in (("raw", 0), ("full", 20)):
        assert run(["resume", file, "-p", "", "-n", "4", "--against", file, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert (facts["tokens_computed"] > 0) == (computed > 0) and facts["answers"][0]["generated"] == 4
        assert abs(facts["kl_mean"]) < 1e-6


def test_a_stop_text_is_never_shown(capsys: pytest.CaptureFixture[str]) -> None:
    free = told(capsys, "resume small -p Who? -n 40")["answers"][0]["text"]
    stop = next(char for char in free[8:] if char.isprintable() and char not in "\ufffd ")
    line = ["small", "-p", "Who?", "-n", "40", "--stop", "never\n", "--stop", stop]
    assert said(capsys, *line) == free[: free.index(stop)] + "\n"


REFUSED = [
    (f"full -p {'zebra' * 900}", 6, "no room"),
    ("full -p x --continuation more.txt", 2, "one of them"),
    ("full --continuation void.txt", 2, "empty"),
    ("full --continuation none.txt", 3, "none.txt"),
    ("full --continuation long.txt", 6, "no room"),
    ("full --continuation more.txt --stop x", 2, "--stop"),
    ("full --continuation more.txt --jsonl", 2, "--jsonl"),
    ("full -p x --jsonl --json", 2, "--jsonl"),
    ("full -p - -p -", 2, "stdin"),
    ("- -p -", 2, "stdin"),
    ("- --questions -", 2, "stdin"),
    ("full -p x -n 0", 2, "-n"),
    ("full -p x --temperature nan", 2, "--temperature"),
    ("full -p x --top-p nan", 2, "--top-p"),
    ("full -p x --against raw", 5, "raw is a snapshot of another document than full"),
]


@pytest.mark.parametrize(("line", "code", "says"), REFUSED, ids=[line[:40] for line, *_ in REFUSED])
def test_bad_input(capsys: pytest.CaptureFixture[str], line: str, code: int, says: str) -> None:
    assert run(["resume", *line.split()]) == code
    seen = capsys.readouterr()
    assert says in seen.err and "Traceback" not in seen.err and ("--json" in line or seen.out == "")


def test_what_the_tokenizer_cannot_say_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["resume", "small", "-p", "☃", "-n", "1"]) == 0
    assert "warning" not in capsys.readouterr().err
    monkeypatch.setattr("kvcli.model.text.lost", lambda tokenizer, text, ids: f"{text} of {len(ids)}")
    assert run(["resume", "small", "-p", "☃", "--prefix", "It", "-n", "1"]) == 0
    assert "warning: the question: ☃It of 5" in capsys.readouterr().err


def test_a_text_without_tokens_is_refused() -> None:
    model: Any = SimpleNamespace(tokenizer=SimpleNamespace(encode=lambda text, **_: []))
    nothing: Any = None
    with pytest.raises(InfeasibleError, match="no token"):
        judge(Talk(Ui(), model, nothing, None, nothing, False, False), "text")


def test_an_empty_stop_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["resume", "full", "-p", "x", "--stop", ""]) == 2
    assert "--stop" in capsys.readouterr().err


def test_a_prompt_from_stdin(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = said(capsys, "small", "-p", "Who?", "-n", "5")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"Who?\n")))
    assert said(capsys, "small", "-p", "-", "-n", "5") == expected


@pytest.mark.slow
def test_a_reader_that_leaves_is_141() -> None:
    line = f"{' '.join(KVCLI)} resume small -p Who? -n 50 | true; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 141 and "Traceback" not in done.stderr and "kvcli:" not in done.stderr


@pytest.mark.slow
def test_what_was_said_before_an_interruption_stays() -> None:
    line = [*KVCLI, *"resume small -p Who? -n 3000".split()]
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate()
    assert first and process.returncode == 130 and b"interrupted" in errors and b"Traceback" not in errors
