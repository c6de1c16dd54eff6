"""Files and pipes: a file is there whole or not at all, and nothing else in its folder changes."""

import errno
import io
import os
import resource
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from make import make_snapshot, opened, packed, same_snapshot

from kvcli.errors import FormatError, StorageError
from kvcli.header import Spec, encode_header
from kvcli.layers import spec_of
from kvcli.spool import header_of, is_snapshot, scratch
from kvcli.storage import Writer, verify, write_snapshot


def test_a_pipe_carries_a_snapshot() -> None:
    snapshot = make_snapshot(ragged=True, bias=True, tokens=200)
    r, w = os.pipe()

    def send() -> None:
        with os.fdopen(w, "wb") as out:
            write_snapshot(snapshot, out)

    thread = threading.Thread(target=send)
    thread.start()
    with os.fdopen(r, "rb") as source:
        same_snapshot(snapshot, opened(source))
    thread.join()


def test_an_open_file_is_read_from_its_beginning(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_snapshot(make_snapshot(), path)
    with path.open("rb") as f:
        f.read(10)
        verify(f)


def test_a_pipe_is_never_sought() -> None:
    class Pipe(io.RawIOBase):
        data = b""

        def writable(self) -> bool:
            return True

        def write(self, block: Any) -> int:
            self.data += bytes(block[:1000])
            return min(len(block), 1000)

    pipe = Pipe()
    write_snapshot(make_snapshot(), pipe)
    assert pipe.data == packed(make_snapshot())


def test_a_header_alone(tmp_path: Path) -> None:
    write_snapshot(make_snapshot(), tmp_path / "a")
    assert header_of(tmp_path / "a") == header_of(io.BytesIO(packed(make_snapshot())))
    with pytest.raises(FormatError, match="missing"):
        header_of(io.BytesIO(packed(make_snapshot())[:-1]))


def test_a_named_pipe_is_written_to_and_stays(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    thread = threading.Thread(target=write_snapshot, args=(make_snapshot(), fifo))
    thread.start()
    verify(fifo)
    thread.join()
    assert fifo.is_fifo() and list(tmp_path.iterdir()) == [fifo]


def test_a_broken_pipe_passes_through() -> None:
    r, w = os.pipe()
    os.close(r)
    with os.fdopen(w, "wb", buffering=0) as out, pytest.raises(BrokenPipeError):
        write_snapshot(make_snapshot(), out)


def test_a_foreign_pipe_is_refused_at_once() -> None:
    head = encode_header([Spec("weight", "U8", (10**12,))], {"format": "pt"})
    with pytest.raises(FormatError, match="not a kvcli snapshot"):
        opened(io.BytesIO(head))


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    def count() -> int:
        return len(list(Path("/dev/fd").iterdir()))

    before, raw = count(), packed(make_snapshot())
    (tmp_path / "a").write_bytes(raw)
    (tmp_path / "b").write_bytes(raw[:-1])
    for source in (tmp_path / "a", tmp_path / "b", tmp_path, tmp_path / "c", io.BytesIO(raw), io.BytesIO(raw[:-1])):
        with suppress(FormatError, StorageError):
            _ = opened(source).rows[0]
    assert count() == before


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none\n", tmp_path, tmp_path / "file" / "x", str(tmp_path / "none")):
        with pytest.raises(StorageError) as caught:
            opened(path)
        assert tmp_path.name in caught.value.what and caught.value.what.isprintable() and caught.value.why


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path in (tmp_path / "none" / "x", tmp_path, tmp_path / "file" / "x", tmp_path / ("x" * 300)):
        with pytest.raises(StorageError) as caught:
            write_snapshot(make_snapshot(), path, force=True)
        assert tmp_path.name in caught.value.what
    assert [left.name for left in tmp_path.iterdir()] == ["file"]


def test_an_existing_file_is_replaced_only_by_force(tmp_path: Path) -> None:
    path, link = tmp_path / "a", tmp_path / "link"
    path.write_text("mine")
    link.symlink_to(path)
    for target in (path, link, str(path)):
        with pytest.raises(StorageError, match="exists already"):
            Writer(target, [], make_snapshot().meta).__enter__()  # before any work is done
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2
    write_snapshot(make_snapshot(), link, force=True)
    assert link.is_symlink() and path.read_bytes() == packed(make_snapshot())


@pytest.mark.parametrize("links", [True, False])
def test_a_file_that_appears_meanwhile_is_kept(tmp_path: Path, links: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError(errno.EPERM, "no hard links")

    if not links:
        monkeypatch.setattr(Path, "hardlink_to", no_links)
    write_snapshot(make_snapshot(), tmp_path / "free")
    path, ids = tmp_path / "a", make_snapshot().ids
    with pytest.raises(StorageError, match=str(path)), Writer(path, [spec_of("ids", ids)], make_snapshot().meta) as out:
        out.put("ids", ids)
        path.write_text("theirs")
    assert path.read_text() == "theirs" and len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt, SystemExit, OSError])
def test_an_exception_leaves_nothing_behind(tmp_path: Path, error: type[BaseException]) -> None:
    path, ids = tmp_path / "a", make_snapshot().ids
    path.write_text("old")
    with pytest.raises(error), Writer(path, [spec_of("ids", ids)], make_snapshot().meta, force=True) as out:
        out.put("ids", ids)
        assert len(list(tmp_path.iterdir())) == 2
        raise error
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_leftovers_of_dead_writers_are_swept(tmp_path: Path) -> None:
    dead = [tmp_path / ".a.99999999.0a1b.tmp", tmp_path / ".a.99999999999999999999.0a1b.tmp"]
    alive = [tmp_path / f".a.{os.getpid()}.0a1b.tmp", tmp_path / ".b.99999999.0a1b.tmp", tmp_path / ".a.x.tmp"]
    for path in dead + alive:
        path.touch()
    write_snapshot(make_snapshot(), tmp_path / "a")
    assert set(tmp_path.iterdir()) == {*alive, tmp_path / "a"}


def test_the_mode_follows_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_snapshot(make_snapshot(), tmp_path / "a")
    finally:
        os.umask(old)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(("code", "words"), [(errno.ENOSPC, "bytes"), (errno.EIO, "Input"), (errno.EOPNOTSUPP, "")])
def test_no_space(tmp_path: Path, code: int, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def reserve(fd: int, start: int, size: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", reserve)
    if not words:
        write_snapshot(make_snapshot(), tmp_path / "a")
        return
    with pytest.raises(StorageError) as caught:
        write_snapshot(make_snapshot(), tmp_path / "a")
    assert words in caught.value.why and not list(tmp_path.iterdir())


def test_a_limit_met_while_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = packed(make_snapshot())
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3000, hard))
    try:
        with pytest.raises(StorageError, match="cannot write"):
            write_snapshot(make_snapshot(), tmp_path / "a")
        with pytest.raises(StorageError, match="copy") as caught:
            opened(io.BytesIO(raw))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "TMPDIR" in caught.value.fix and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        b"A text of words.\n",
        "Ein Übergang".encode(),
        b"\xef\xbb\xbfmarked",
        "wide".encode("utf-16"),
        "wider".encode("utf-32-le"),
        b"\n" * 9,
        b"\x01" * 8,
        b"\x7f" * 8,
    ],
)
def test_texts_are_no_snapshots(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a").write_bytes(data)
    assert not is_snapshot(tmp_path / "a")


@pytest.mark.parametrize("layers", [1, 2, 40])
def test_snapshots_are_known_by_how_they_begin(tmp_path: Path, layers: int) -> None:
    data = packed(make_snapshot(layers=layers, stats=False))
    for name, found in (("whole", data), ("cut", data[:8])):
        (tmp_path / name).write_bytes(found)
        assert is_snapshot(tmp_path / name)
    with pytest.raises(StorageError, match="none"):
        is_snapshot(tmp_path / "none")


def test_scratch_folders_go_and_those_of_the_dead_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    child = os.fork()
    if child == 0:
        with scratch() as mine:
            (mine / "a").write_text("left")
            os._exit(9)
    os.waitpid(child, 0)
    kept = {tmp_path / "kvcli-notes", tmp_path / f"kvcli-{os.getppid()}-alive"}
    for path in kept:
        path.mkdir()
    (left,) = {*tmp_path.iterdir()} - kept
    with scratch() as folder:
        assert (left / "a").exists() is False and {*tmp_path.iterdir()} == kept | {folder}
    assert {*tmp_path.iterdir()} == kept
