"""Every example of the README runs: its shell lines in order, those of the commands' help, and its Python."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from tiny import tiny_model

from kvcli.cli import COMMANDS, run

README = (Path(__file__).parent.parent / "README.md").read_text()
PROSE, REFERENCE = README.split("<!-- commands -->")
BLOCKS = re.findall(r"^```\n(.*?)^```", PROSE, re.MULTILINE | re.DOTALL)
GUIDE = [[line for line in block.splitlines() if "kvcli " in line] for block in BLOCKS]
HELP = [
    line.strip() for part in re.findall(r"Examples:\n(.*?)\n\n", REFERENCE, re.DOTALL) for line in part.splitlines()
]
PYTHON = re.findall(r"^```python\n(.*?)^```", PROSE, re.MULTILINE | re.DOTALL)
DOCUMENTS = ("report", "notes", "appendix", "monday", "tuesday", "a", "b", "c")
SHELLS = r"(source <\()?kvcli completion"  # tried in tests of their own


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("model") / "tiny", max_position_embeddings=8192)


@pytest.fixture
def desk(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Path:
    """A folder with the documents the examples speak of; stdout is no file, as at a terminal."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("KVCLI_MODEL", str(model))
    monkeypatch.setattr("kvcli.process.apart", here)  # processes of its own are tried in test_bench
    (tmp_path / "memory").mkdir()
    for name in DOCUMENTS:
        (tmp_path / f"{name}.txt").write_text(f"This is the {name}. The ferry sailed in Q3 as well. " * 24)
    asked = {"prompt": "Who?", "prefix": "It is", "answer": "x"}
    (tmp_path / "q.jsonl").write_text(json.dumps(asked) + "\n")
    (tmp_path / "tests.jsonl").write_text(json.dumps({"context": "The ferry sailed.", "questions": [asked]}) + "\n")
    return tmp_path


def here(args: Sequence[str]) -> tuple[int, str]:
    """Exit code and stdout of kvcli, in this process."""
    with redirect_stdout(io.StringIO()) as out:
        code = run([*args])
    return code, out.getvalue()


def runs(line: str) -> None:
    """The line ends with exit code 0, in this process where no shell is needed."""
    words = shlex.split(line, comments=True)
    if words[0] == "kvcli" and "|" not in words:
        assert run(words[1:]) == 0, line
    else:
        shell = f'set -eo pipefail; kvcli() {{ "{sys.executable}" -m kvcli "$@"; }}; {line}'
        done = subprocess.run(
            ["bash", "-c", shell], capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL
        )
        assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_first_lines(desk: Path) -> None:
    for line in GUIDE[0]:
        runs(line)


@pytest.mark.slow
def test_the_guide(desk: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line for block in GUIDE[1:] for line in block]
    assert len(lines) > 18
    for line in lines:
        runs(line)
    assert "Traceback" not in capsys.readouterr().err
    made = {path.name.removesuffix(".kv.safetensors") for path in desk.glob("*.kv.safetensors")}
    assert {"week-monday", "both", "aimed", "raw", "merged", "talk", "report.snapkv+adakv-20%"} <= made


@pytest.mark.slow
@pytest.mark.parametrize("line", [line for line in HELP if not re.match(SHELLS, line)])
def test_the_examples_of_help(line: str, desk: Path) -> None:
    words = shlex.split(line)
    read = [
        word
        for i, word in enumerate(words)
        if word.endswith(".kv.safetensors") and words[i - 1] not in ("-o", "--save")
    ]
    if not read and words[0] == "kvcli" and words[1] in ("compress", "resume", "inspect", "verify"):
        read = ["report.kv.safetensors"]  # the newest here
    for name in {*read}:
        assert run(["prefill", "report.txt", "-o", name]) == 0
    runs(line)


@pytest.mark.slow
def test_python(desk: Path, model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in PYTHON:
        exec(block.replace("kvcli.load()", f"kvcli.load({str(model)!r}, dtype='float32')"), names)
    assert capsys.readouterr().out.strip()
    assert (desk / "small.kv.safetensors").stat().st_size < (desk / "full.kv.safetensors").stat().st_size
    assert names["snapshot"].ids.shape == names["ids"][0].shape  # type: ignore[attr-defined]


def test_every_command_is_in_the_guide() -> None:
    told = " ".join(line for block in GUIDE for line in block)
    assert [name for name in COMMANDS if f"kvcli {name}" not in told] == []
