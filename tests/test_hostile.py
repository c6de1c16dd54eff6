"""What an unkind user tries at the command line: outputs that cannot be, words that have no token, odd terminals."""

import io
import json
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import pytest
from make import make_snapshot
from tiny import tiny_model
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvcli.cli import main, run
from kvcli.model import load as loading
from kvcli.storage import write_snapshot


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hostile")
    tiny_model(folder / "model")
    (folder / "doc.txt").write_text("The harbour opened at six. " * 6)
    (folder / "long.txt").write_text("The harbour opened at six. " * 60)
    write_snapshot(make_snapshot(tokens=40), folder / "a")
    (folder / "dir").mkdir()
    return folder


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KVCLI_MODEL", str(folder / "model"))
    before = {*folder.rglob("*")}
    yield folder
    assert {*folder.rglob("*")} == before


@pytest.mark.parametrize(
    "output", ["-o x", "-ox", "-fox", "--output=x", "--output x", "-o -", "-qo-", "--output=-", ""]
)
@pytest.mark.parametrize("line", ["compress a -m random -b 300%", "prefill missing.txt"])
def test_an_error_as_json_goes_where_no_snapshot_was_to_go(
    work: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, line: str, output: str
) -> None:
    with (tmp_path / "out").open("w") as stdout, redirect_stdout(stdout):
        assert run([*line.split(), "--json", *output.split()]) in (2, 3)
    shown, down_the_pipe = capsys.readouterr().err, (tmp_path / "out").read_text()
    here, there = (down_the_pipe, shown) if "x" in output else (shown, down_the_pipe)
    assert json.loads(here.splitlines()[-1])["error"]["code"] in (2, 3) and "schema" not in there


@pytest.mark.parametrize(
    "line", ["prefill doc.txt -o dir", "compress a -m random -b 50% -f -o dir", "resume a -p x --save dir"]
)
def test_a_folder_as_output_is_refused_before_any_work(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str
) -> None:
    monkeypatch.delattr(loading, "_open")  # no model is loaded
    assert run(line.split()) == 3
    assert "it is a folder\n       name a file in it" in capsys.readouterr().err


def test_an_answer_goes_to_a_terminal_that_lacks_its_letters(
    work: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full, ascii_only = str(tmp_path / "full"), io.TextIOWrapper(io.BytesIO(), "ascii")
    assert run(["prefill", "doc.txt", "-o", full]) == 0
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit) as ended:
        main(["resume", full, "-p", "x", "-n", "1", "--prefix", "café"])
    assert ended.value.code == 0 and ascii_only.buffer.getvalue().startswith(b"caf\\xe9")


@pytest.fixture(scope="module")
def few_letters(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose tokenizer leaves out every letter but those of the document."""
    path = tmp_path_factory.mktemp("few") / "few"
    shutil.copytree(folder / "model", path)
    letters = {letter: i for i, letter in enumerate(sorted({*(folder / "doc.txt").read_text()} - {" "}))}
    core = Tokenizer(models.BPE(vocab=letters, merges=[]))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    for file in (*path.glob("*token*"), *path.glob("chat*")):
        file.unlink()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(path)
    return path


def test_a_probe_is_read_or_refused_or_told_to_be_half_read(
    work: Path, few_letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefill = [*"prefill doc.txt -o".split(), str(tmp_path / "x"), "--probe"]
    assert run([*prefill, "zzz", "--model", str(few_letters)]) == 6
    assert "no token for anything in the probe" in capsys.readouterr().err and not (tmp_path / "x").exists()
    assert run([*prefill, "the zoo", "--model", str(few_letters)]) == 0
    assert "warning: doc.txt: the probe: the tokenizer has no token for some of the text (z)" in capsys.readouterr().err


@pytest.mark.parametrize("extra", ["", "--truncate"])
def test_a_probe_that_is_too_long_is_what_has_to_be_shorter(
    work: Path, capsys: pytest.CaptureFixture[str], extra: str
) -> None:
    assert run([*"prefill doc.txt -o x --probe".split(), "Who is it? " * 60, *extra.split()]) == 6
    told = capsys.readouterr().err
    assert "no room for a probe of 6" in told and "shorten the probe" in told and "--truncate" not in told


def test_a_tokenizer_that_cannot_take_any_text_is_no_traceback(
    work: Path, few_letters: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    strict = tmp_path / "strict"
    shutil.copytree(few_letters, strict)
    core = Tokenizer(models.WordLevel(vocab={"The": 0, "harbour": 1}))  # and no word for others
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core).save_pretrained(strict)
    (tmp_path / "known.txt").write_text("The harbour")
    assert run(["prefill", str(tmp_path / "known.txt"), "--model", str(strict), "-o", str(tmp_path / "x")]) == 6
    assert "tokenizer cannot encode" in capsys.readouterr().err


def test_keeping_all_of_a_compressed_file_is_said(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    half, rest = str(tmp_path / "half"), str(tmp_path / "rest")
    assert run(f"compress a -m random -b 50% -o {half}".split()) == 0
    assert "everything" not in capsys.readouterr().err
    assert run(f"compress {half} -m knorm -b 70% -o {rest}".split()) == 0
    assert "everything was kept: the budget is no smaller than what the snapshot holds" in capsys.readouterr().err
    assert run(f"compress {half} -m knorm -b 30% -f -o {rest}".split()) == 0
    assert "everything" not in capsys.readouterr().err


def test_the_error_at_the_end_is_told_where_that_is_all_that_is_known(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    full, half, saved, small = (str(tmp_path / name) for name in ("full", "half", "saved", "small"))
    for line in (f"prefill doc.txt -o {full}", f"compress {full} -m random -b 50% -o {half}"):
        assert run(line.split()) == 0
    assert run(f"resume {half} -p Who? -n 3 --save {saved}".split()) == 0
    capsys.readouterr()
    assert run(f"compress {saved} -m snapkv -b 30% -o {small} --json".split()) == 0
    seen = capsys.readouterr()
    found = json.loads(seen.out)["rows"][0]["output_error"]
    assert found.keys() == {"q_last_median", "q_last_p95"} and 0 < found["q_last_median"] < found["q_last_p95"]
    assert f"{found['q_last_median']:.3f} and {found['q_last_p95']:.3f} at its end" in seen.err
    assert "over the document" not in seen.err


@pytest.mark.parametrize(
    ("recipe", "says"),
    [
        ("kvmerger:sigma=1e308", "a number above 0"),
        ("kvmerger:sigma=1e-300", "a number above 0"),  # in float32 it is 0, which would mean endlessly wide
        ("kvmerger:epsilon=-1e39", "a number or none"),
        ("snapkv:sink=1+adakv:sink=9", "option sink is given twice"),
        ("SnapKV", "did you mean snapkv?"),
    ],
)
def test_recipes_that_cannot_be_meant(work: Path, capsys: pytest.CaptureFixture[str], recipe: str, says: str) -> None:
    assert run(["compress", "a", "-m", recipe, "-b", "50%", "-o", "x"]) == 2
    assert says in capsys.readouterr().err
