"""Every command that reads a snapshot, given what is none, cut off from its streams, or stopped while it writes."""

import errno
import io
import os
import pty
import resource
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make import make_snapshot, opened, packed
from safetensors.torch import save_file
from test_storage import rebuilt
from tiny import tiny_model
from xxhash import xxh3_128_hexdigest

from kvcli.cli import main, run
from kvcli.storage import Writer

READERS = {
    "compress": "compress FILE -m random -b 50% -o out",
    "inspect": "inspect FILE",
    "verify": "verify FILE",
    "resume": "resume FILE -p x -n 2",
    "diff, first": "diff FILE a",
    "diff, second": "diff a FILE",
    "resume, against": "resume a -p x -n 2 --against FILE",
}
WHOLE = packed(make_snapshot())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model and a snapshot of its own."""
    folder = tmp_path_factory.mktemp("streams")
    (folder / "doc.txt").write_text("The harbour opened at six. " * 6)
    tiny_model(folder / "model")
    assert run(["prefill", f"{folder}/doc.txt", "--model", f"{folder}/model", "-q", "-o", f"{folder}/a"]) == 0
    return folder


@pytest.fixture
def work(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The same as the current folder, which no test may change."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("KVCLI_MODEL", str(folder / "model"))
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    yield folder
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before


def foreign(path: Path) -> None:
    save_file({"weight": torch.zeros(3)}, path)


def says(content: bytes) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(content)


NEWER = {"kvcli.format": "2.0"}, {"kvcli.requires": '["time-travel"]'}, {"kvcli.requires": '["encode:magic/1"]'}
BAD: dict[str, tuple[Callable[[Path], Any], int, str]] = {
    "missing": (lambda path: None, 3, "No such file"),
    "a directory": (lambda path: path.mkdir(), 3, "directory"),
    "empty": (says(b""), 4, "empty"),
    "a few bytes": (says(b"kv"), 4, "too short"),
    "text": (says(b"The harbour opened at six.\n" * 40), 4, "not a snapshot"),
    "safetensors of others": (foreign, 4, "not a kvcli snapshot"),
    "a header of 2^60 bytes": (says((2**60).to_bytes(8, "little") + WHOLE[8:]), 4, str(2**60)),
    "cut in the header": (says(WHOLE[:500]), 4, "cut short"),
    "cut in the data": (says(WHOLE[:-1]), 4, "1 bytes are missing"),
    "trailing bytes": (says(WHOLE + b"\n"), 4, "more bytes follow"),
    "a later format": (says(rebuilt(WHOLE, NEWER[0])), 4, "2.0"),
    "an unknown feature": (says(rebuilt(WHOLE, NEWER[1])), 4, "time-travel"),
    "an unknown encoding": (says(rebuilt(WHOLE, NEWER[2])), 4, "magic"),
}


def refused(capsys: pytest.CaptureFixture[str], line: str, code: int, words: str) -> None:
    """The command ends with this code and a message with these words, and with nothing on stdout."""
    capsys.readouterr()
    assert run(line.split()) == code
    seen = capsys.readouterr()
    assert words in seen.err and "Traceback" not in seen.err and not seen.out
    assert len([line for line in seen.err.splitlines() if line.startswith("kvcli: ")]) == 1


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("case", BAD)
def test_what_is_no_snapshot_is_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str, reader: str
) -> None:
    make, code, words = BAD[case]
    make(tmp_path / "bad")
    refused(capsys, READERS[reader].replace("FILE", str(tmp_path / "bad")), code, words)


@pytest.mark.parametrize("reader", [name for name in READERS if name != "inspect"])  # which reads no numbers
def test_numbers_that_are_none_are_refused_by_layer(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], reader: str
) -> None:
    raw = (work / "a").read_bytes()
    values = opened(io.BytesIO(raw)).layer(1).v.clone()
    values[1, 7, 3] = torch.inf
    (tmp_path / "bad").write_bytes(rebuilt(raw, {}, **{"L001.v": values}))
    refused(capsys, READERS[reader].replace("FILE", str(tmp_path / "bad")), 4, "layer 1: v holds NaN or infinity")


def test_tokens_the_model_does_not_know_are_refused(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    raw = (work / "a").read_bytes()
    snapshot = opened(io.BytesIO(raw))
    ids = snapshot.ids.clone()
    ids[3] = 300
    meta = snapshot.meta
    seq = replace(meta.seq, ids_hash=xxh3_128_hexdigest(ids.numpy().tobytes()))
    # Stored in another precision, so that the first tokens decide.
    strings = replace(meta, seq=seq, model={**meta.model, "weights": "0", "weights_dtype": "F16"}).to_strings()
    (tmp_path / "bad").write_bytes(rebuilt(raw, strings, ids=ids))
    refused(capsys, f"resume {tmp_path}/bad -p x -n 2", 5, "token 300")


@pytest.mark.parametrize("reader", READERS)
def test_what_may_not_be_read_is_refused(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    real = Path.open

    def guarded(path: Path, *args: Any, **options: Any) -> Any:
        if path.name == "locked":  # the superuser may read whatever its mode
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path, *args, **options)

    monkeypatch.setattr(Path, "open", guarded)
    refused(capsys, READERS[reader].replace("FILE", "locked"), 3, "Permission denied")


@contextmanager
def stdin(monkeypatch: pytest.MonkeyPatch, data: bytes) -> Iterator[None]:
    r, w = os.pipe()
    os.write(w, data)
    os.close(w)
    with os.fdopen(r) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        yield


@pytest.mark.parametrize("reader", [name for name in READERS if "against" not in name])
def test_an_empty_pipe_is_refused_and_a_slow_one_told(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, reader: str
) -> None:
    class Impatient(threading.Timer):
        def start(self) -> None:
            assert self.interval == 1.0
            self.function()

    monkeypatch.setattr(threading, "Timer", Impatient)
    for data, words in ((b"", "empty"), (WHOLE[:100], "cut short"), (WHOLE[:-1], "1 bytes are missing")):
        with stdin(monkeypatch, data):
            refused(capsys, READERS[reader].replace("FILE", "-"), 4, words)
        with stdin(monkeypatch, data):
            run(READERS[reader].replace("FILE", "-").split())
        assert capsys.readouterr().err.startswith("reading a snapshot from stdin\n")


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_waiting_for_stdin_is_told_and_can_be_ended(number: int, code: int) -> None:
    command = [sys.executable, "-m", "kvcli", "inspect", "-"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
        assert waiting.stderr and waiting.stderr.readline() == "reading a snapshot from stdin\n"
        waiting.send_signal(number)
        assert waiting.wait() == code
        assert waiting.stderr.read() == ("kvcli: interrupted\n" if code == 130 else "")


WRITERS = [
    *("inspect a", "verify a", "diff a a", "methods", "completion zsh", "doctor", "--help", "resume a -p x -n 2"),
    *("compress a -m random -b 50% -o -", "prefill doc.txt -o -"),
]


@pytest.mark.parametrize("line", WRITERS)
@pytest.mark.parametrize("json", [False, True])
def test_a_reader_that_has_gone_is_141(work: Path, line: str, json: bool) -> None:
    if json and line.split()[0] in ("completion", "--help"):
        pytest.skip("there is no --json")
    r, w = os.pipe()
    os.close(r)
    old = os.dup(1)
    os.dup2(w, 1)
    os.close(w)
    try:
        with open(1, "w", closefd=False) as stdout, redirect_stdout(stdout):
            code = run([*line.split(), *(["--json"] if json else [])])
    finally:
        os.dup2(old, 1)
        os.close(old)
    assert code == 141


@pytest.mark.parametrize(
    ("line", "stream"),
    [
        ("prefill doc.txt -o -", "stdout"),
        ("compress a -m random -b 50% -o -", "stdout"),
        *((line.replace("FILE", "-"), "stdin") for name, line in READERS.items() if "against" not in name),
    ],
)
def test_snapshots_neither_go_to_terminals_nor_come_from_them(
    work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, line: str, stream: str
) -> None:
    ours, theirs = pty.openpty()
    mode = "w" if stream == "stdout" else "r"
    # The context ends before capsys takes its own stream away.
    with os.fdopen(ours, "rb"), os.fdopen(theirs, mode) as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, stream, terminal)
        code = run(line.split())
    assert code == 2
    assert "terminal" in capsys.readouterr().err


@pytest.fixture
def old(tmp_path: Path) -> Iterator[Path]:
    """A file that must survive whatever happens to the command that is to replace it, and stay alone."""
    path = tmp_path / "old"
    path.write_bytes(b"old")
    yield path
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


REPLACE = ["compress a -m random -b 50% -f -o", "prefill doc.txt -f -o"]


@pytest.mark.parametrize("line", REPLACE)
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_writing_leaves_the_old_file(
    work: Path, old: Path, monkeypatch: pytest.MonkeyPatch, line: str, number: int, code: int
) -> None:
    put, left = Writer.put, iter(range(3))

    def interrupted(self: Writer, name: str, tensor: torch.Tensor) -> None:
        put(self, name, tensor)
        if next(left, None) is None:
            assert len(list(old.parent.iterdir())) == 2
            os.kill(os.getpid(), number)

    monkeypatch.setattr(Writer, "put", interrupted)
    before = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as ended:
            main([*line.split(), str(old)])
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == code


@pytest.mark.parametrize("reserved", [True, False])
@pytest.mark.parametrize("line", REPLACE)
def test_a_full_disk_leaves_the_old_file(
    work: Path,
    old: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    line: str,
    reserved: bool,
) -> None:
    if not reserved:
        monkeypatch.delattr(os, "posix_fallocate")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        refused(capsys, f"{line} {old}", 3, "cannot write")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
