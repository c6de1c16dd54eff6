"""kvcli prefill: several documents, appended ones, likely questions, documents that are too long or no text."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from make import opened
from tiny import tiny_model, tiny_tokenizer
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from kvcli.cli import run

TEXT = "The harbour opened at six. " * 12 + "The new ferry is called Kestrel.\n"
PREFILL = ["prefill", "--model", "model"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    tiny_model(folder / "model")
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text("A second document.")
    (folder / "c.txt").write_text("A third, with no end")
    return folder


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(folder)
    for left in folder.glob("*.kv.safetensors"):
        left.unlink()
    return folder


def rows(capsys: pytest.CaptureFixture[str], *args: str, code: int = 0) -> list[dict[str, object]]:
    capsys.readouterr()
    assert run([*PREFILL, *args, "--json"]) == code
    facts = json.loads(capsys.readouterr().out)
    assert facts["schema"] == "kvcli.prefill/1"
    return list(facts["rows"])


def test_several_documents_each_to_its_own_file(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = rows(capsys, "a.txt", "b.txt", "c.txt", "-o", "{name}.kv.safetensors")
    assert [row["file"] for row in found] == [f"{name}.kv.safetensors" for name in "abc"]
    for row in found:
        assert row["file_bytes"] == (work / str(row["file"])).stat().st_size
        assert run([*PREFILL, str(row["document"]), "-o", "alone.kv.safetensors", "-f"]) == 0
        assert (work / str(row["file"])).read_bytes() == (work / "alone.kv.safetensors").read_bytes()


def test_a_bad_document_does_not_keep_the_others(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "bad.txt").write_bytes(b"caf\xe9")
    (work / "long.txt").write_text(TEXT * 8)
    assert run([*PREFILL, "bad.txt", "a.txt", "long.txt", "none.txt", "b.txt", "-o", "{name}.kv.safetensors"]) == 4
    seen = capsys.readouterr().err
    assert sorted(path.name for path in work.glob("*.kv.safetensors")) == ["a.kv.safetensors", "b.kv.safetensors"]
    assert all(f"kvcli: {name}.txt" in seen for name in ("bad", "long", "none")) and "Traceback" not in seen
    found = rows(capsys, "b.txt", "long.txt", "-o", "{name}.kv.safetensors", code=3)
    assert [row["error"]["code"] for row in found] == [3, 6]  # type: ignore[index]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("a.txt ./a.txt -o {name}.kv.safetensors", "both become"),
        ("a.txt a.md", "a.txt and a.md would both become a.kv.safetensors"),
        ("a.txt b.txt -o x.kv.safetensors", "{name}"),
        ("a.txt b.txt -o -", "{name}"),
        ("a.txt b.txt --onto a.kv.safetensors", "one document"),
        ("- --onto - -o x.kv.safetensors", "stdin"),
        ("a.txt --onto a.kv.safetensors --raw -o x.kv.safetensors", "--raw"),
        ("a.txt --probe  -o x.kv.safetensors", "--probe is empty"),
    ],
)
def test_what_cannot_be_meant(work: Path, capsys: pytest.CaptureFixture[str], line: str, says: str) -> None:
    assert run([*PREFILL, *line.split(" ")]) == 2
    seen = capsys.readouterr().err
    assert says in seen and "\n" in seen and not list(work.glob("*.kv.safetensors"))


def test_several_documents_down_one_pipe_are_refused(work: Path) -> None:
    line = [sys.executable, "-m", "kvcli", *PREFILL, "a.txt", "b.txt"]
    done = subprocess.run(line, capture_output=True, check=False)
    assert done.returncode == 2 and b"one pipe" in done.stderr and not done.stdout


def test_a_document_appended(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PREFILL, "a.txt", "-o", "a.kv.safetensors"]) == 0
    assert run("compress a.kv.safetensors -m kvmerger -b 40% -o small.kv.safetensors".split()) == 0
    for onto in ("a.kv.safetensors", "small.kv.safetensors"):
        capsys.readouterr()
        line = ["prefill", "b.txt", "--onto", onto, "--model", "model", "-o", "ab.kv.safetensors", "-f"]
        (row,) = rows(capsys, *line[1:3], onto, *line[6:])
        before, after = opened(onto), opened("ab.kv.safetensors")
        assert row["tokens_reused"] == before.meta.seq.tokens < row["tokens"] == after.meta.seq.tokens
        added = after.ids[before.meta.seq.tokens :].tolist()
        assert bytes(after.ids[: len(before.ids)].numpy()) == bytes(before.ids.numpy()) and len(added) > 5
        assert after.meta.layout == before.meta.layout and after.meta.history == before.meta.history
        assert run(["verify", "ab.kv.safetensors"]) == 0
        assert run(["resume", "ab.kv.safetensors", "--model", "model", "-p", "Who?", "-n", "2"]) == 0


def test_another_model_appends_nothing(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*PREFILL, "a.txt", "-o", "a.kv.safetensors"]) == 0
    tiny_model(work / "other", seed=1)
    line = "prefill b.txt --onto a.kv.safetensors --model other -o x.kv.safetensors".split()
    assert run(line) == 5 and "weights differ" in capsys.readouterr().err
    assert not (work / "x.kv.safetensors").exists()


def test_a_likely_question(work: Path) -> None:
    assert run([*PREFILL, "a.txt", "-o", "a.kv.safetensors"]) == 0
    assert run([*PREFILL, "a.txt", "--probe", "Who?", "-o", "aimed.kv.safetensors"]) == 0
    plain, aimed = opened("a.kv.safetensors"), opened("aimed.kv.safetensors")
    assert aimed.meta == plain.meta
    N, positions = plain.meta.seq.tokens, aimed.stats[0].q_last_pos
    assert positions is not None and positions[0] == N and len(positions) > len("Who?")  # the template's tail follows
    assert run("compress aimed.kv.safetensors -m snapkv -b 20% -o small.kv.safetensors".split()) == 0


def test_a_document_that_is_too_long(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "long.txt").write_text(TEXT * 8)
    assert run([*PREFILL, "long.txt", "-o", "x.kv.safetensors"]) == 6
    seen = capsys.readouterr().err
    assert "512" in seen and "--truncate" in seen
    assert run([*PREFILL, "long.txt", "--truncate", "-o", "x.kv.safetensors"]) == 0
    seen = capsys.readouterr().err
    assert "warning: long.txt: cut to 448 tokens" in seen and "harbour" in seen
    assert opened("x.kv.safetensors").meta.seq.tokens == 448
    assert run([*PREFILL, "b.txt", "--truncate", "-o", "y.kv.safetensors"]) == 0
    assert "cut" not in capsys.readouterr().err


ODD_TEXT = {
    "one token": "a",
    "special names": "<|im_end|>\n<|endoftext|> <|im_start|>system",
    "windows lines": "one\r\ntwo\r\n\r\nthree",
    "no spaces": "x" * 300,
    "emoji": "a 👩‍👩‍👧 e\u0301 \u200b \ufeff ٣",
    "controls": "a\x01\x1b[31m\x7fb",
}


@pytest.mark.parametrize("name", ODD_TEXT)
def test_odd_text_is_read_to_the_letter(work: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    (work / "odd.txt").write_bytes(b"\xef\xbb\xbf" + ODD_TEXT[name].encode())
    assert run([*PREFILL, "odd.txt", "--raw", "-o", "x.kv.safetensors"]) == 0
    assert "warning" not in capsys.readouterr().err
    ids = opened("x.kv.safetensors").ids.tolist()
    assert tiny_tokenizer().decode(ids) == ODD_TEXT[name] + "\n"


def test_characters_without_a_token_are_named(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    vocab = {"<unk>": 0, **{char: i for i, char in enumerate("abc \n", 1)}}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(tiny_model(work / "ascii"))
    (work / "odd.txt").write_text("abc ☃☃ cab")
    assert run(["prefill", "odd.txt", "--model", "ascii", "-q", "-o", "x.kv.safetensors"]) == 0
    seen = capsys.readouterr().err
    assert "odd.txt: the tokenizer has no token" in seen and "(☃): unknown tokens, 2 in all" in seen


NO_TEXT = {
    "latin": (b"caf\xe9 au lait", "byte 3"),
    "utf16": ("text".encode("utf-16"), "UTF-16"),
    "utf16le": ("text".encode("utf-16-le"), "byte 1 is zero"),
    "nul": (b"some\0text", "byte 4 is zero"),
    "surrogate": (b"a\xed\xa0\x80", "byte 1"),
}


@pytest.mark.parametrize("name", NO_TEXT)
def test_what_is_no_text(work: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    data, says = NO_TEXT[name]
    (work / "bad.txt").write_bytes(data)
    assert run([*PREFILL, "bad.txt", "-o", "x.kv.safetensors"]) == 4
    seen = capsys.readouterr().err
    assert "bad.txt is not UTF-8 text" in seen and says in seen and not (work / "x.kv.safetensors").exists()


def test_little_room_left_is_said(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "wide.txt").write_text("ab " * 155)
    assert run([*PREFILL, "wide.txt", "-o", "x.kv.safetensors"]) == 0
    assert "little room" in capsys.readouterr().err
