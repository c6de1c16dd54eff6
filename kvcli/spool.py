"""Files and pipes: input that can be read at any place, output that appears whole or not at all; knows no tensors."""

import errno
import io
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory, TemporaryFile, gettempdir
from typing import BinaryIO

from xxhash import xxh3_128

from .errors import FormatError, StorageError
from .header import LIMIT, Header, check_snapshot, read_header

BLOCK = 1 << 20  # bytes read, hashed or written at once: what stays in the processor's cache
Source = str | Path | BinaryIO
Stream = BinaryIO | io.FileIO
Write = Callable[[bytes | memoryview], None]


def open_input(source: Source) -> int:
    """A descriptor of a regular file, the caller's to close: the source itself, or a copy of what a pipe brings.

    The copy has no name and goes with its descriptor. A pipe that does not begin like a snapshot is refused at once.
    Raises StorageError, FormatError.
    """
    if not isinstance(source, str | Path):
        return _settle(source)
    with ExitStack() as stack:
        with blaming("read", source):
            f = stack.enter_context(Path(source).open("rb", buffering=0))
        return _settle(f)


def header_at(fd: int) -> Header:
    """The header of the regular file `fd`, held against the size of the file and its digest; moves its position."""
    with blaming("read", "the snapshot"), open(fd, "rb", buffering=0, closefd=False) as f:
        f.seek(0)
        header = read_header(f, os.fstat(fd).st_size)
        check_snapshot(header)
        f.seek(header.size - 16)
        if xxh3_128(header.raw).digest() != f.read(16):
            raise FormatError("the snapshot's header is damaged", "its digest does not match")
        return header


def header_of(source: Source) -> Header:
    """The header of a file or pipe, for those who need no tensors; a pipe is read to its end."""
    fd = open_input(source)
    try:
        return header_at(fd)
    finally:
        os.close(fd)


def is_snapshot(source: Source) -> bool:
    """Whether a file, or what a pipe brings, begins as a safetensors file does, with the length of its header.

    Its highest bytes are zero, which stands in no text. Raises StorageError for a file that cannot be read.
    """
    if isinstance(source, str | Path):
        with blaming("read", source), Path(source).open("rb") as f:
            start = f.read(8)
    else:
        start = source.peek(8)[:8] if isinstance(source, io.BufferedReader) else b""
    return len(start) == 8 and int.from_bytes(start, "little") <= LIMIT


def _settle(stream: Stream) -> int:
    try:
        fd = stream.fileno()
    except io.UnsupportedOperation:  # bytes in memory
        return _spool(stream)
    return os.dup(fd) if stat.S_ISREG(os.fstat(fd).st_mode) else _spool(stream)


def _spool(stream: Stream) -> int:
    with blaming("read", "the piped snapshot"):
        header = read_header(stream)
        check_snapshot(header)
    try:
        with TemporaryFile(buffering=0) as copy:
            _pour(copy.write, header.raw)
            # One byte more than announced shows that more would follow.
            left = header.size + 1 - len(header.raw)
            while left and (block := stream.read(min(left, BLOCK))):
                _pour(copy.write, block)
                left -= len(block)
            return os.dup(copy.fileno())
    except OSError as cause:
        fix = "set TMPDIR to a folder with more room"
        raise StorageError("cannot keep a copy of the piped snapshot", cause.strerror or str(cause), fix) from cause


@contextmanager
def open_output(target: Source, size: int, force: bool = False) -> Iterator[Write]:
    """A function that writes blocks to `target`, `size` bytes in all.

    A file appears under its name when all is written, and replaces another only by `force`; after any exception
    nothing is left of it. A pipe is never sought, and its BrokenPipeError passes through. Raises StorageError.
    """
    if not isinstance(target, str | Path):
        with _writing(target, target) as write:
            yield write
        return
    with blaming("write", target):
        path = Path(target).resolve()
        regular = path.is_file() or not path.exists()
        # A named pipe or a device cannot be replaced by a file.
        pipe = None if regular else path.open("wb", buffering=0)
    if pipe is None:
        with _into_file(path, size, force) as write:
            yield write
    else:
        with pipe, _writing(pipe, target) as write:
            yield write


@contextmanager
def _writing(stream: Stream, name: object) -> Iterator[Write]:
    def write(data: bytes | memoryview) -> None:
        with blaming("write", name):
            _pour(stream.write, data)

    yield write
    with blaming("write", name):
        stream.flush()


@contextmanager
def _into_file(path: Path, size: int, force: bool) -> Iterator[Write]:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{token_hex(4)}.tmp")
    with ExitStack() as stack:
        with blaming("write", path):
            if path.exists() and not force:
                raise exists(path)
            _sweep(path)
            f = stack.enter_context(temporary.open("xb", buffering=0))
            stack.callback(temporary.unlink, missing_ok=True)
            _reserve(f.fileno(), size, path)
        with _writing(f, path) as write:
            yield write
        with blaming("write", path):
            os.fsync(f.fileno())
            _publish(temporary, path, force)


def _reserve(fd: int, size: int, path: Path) -> None:
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    try:
        os.posix_fallocate(fd, 0, size)
    except OSError as cause:
        if cause.errno in (errno.ENOSPC, errno.EDQUOT):
            room = f"it takes {size} bytes, {shutil.disk_usage(path.parent).free} are free"
            raise StorageError(f"no space for {shown(path)}", room, "free some, or name another folder") from cause
        if cause.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _publish(temporary: Path, path: Path, force: bool) -> None:
    if force:
        temporary.replace(path)
    else:
        try:
            path.hardlink_to(temporary)  # unlike a rename it never replaces
        except FileExistsError as cause:
            raise exists(path) from cause
        except OSError:  # a file system without hard links
            if path.exists():
                raise
            temporary.replace(path)
    # The file is whole already; where a folder cannot be synced there is nothing better to do.
    with suppress(OSError):
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sweep(path: Path) -> None:
    """Remove what writers of the same file left behind when they were killed."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.([0-9]+)\.[0-9a-f]+\.tmp")
    with suppress(OSError):  # whatever stands in the way of sweeping need not stand in the way of writing
        for left in path.parent.iterdir():
            if (match := pattern.fullmatch(left.name)) and not _alive(int(match[1])):
                left.unlink()


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder for files that nobody keeps: it goes at the end, and those go whose processes were killed."""
    for left in Path(gettempdir()).glob("kvcli-*"):
        if (match := re.fullmatch(r"kvcli-([0-9]+)-\w+", left.name)) and not _alive(int(match[1])):
            shutil.rmtree(left, ignore_errors=True)
    with TemporaryDirectory(prefix=f"kvcli-{os.getpid()}-") as folder:
        yield Path(folder)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:  # another user's
        return True
    return True


def _pour(write: Callable[[memoryview], int | None], data: bytes | memoryview) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[write(rest) :]


def exists(path: Path) -> StorageError:
    """The error for a file that is not to be replaced."""
    return StorageError(f"{shown(path)} exists already", fix="use -f to replace it, or name another file")


def shown(source: object) -> str:
    """The name of a file or stream as it can be printed."""
    text = str(getattr(source, "name", "the stream") if isinstance(source, io.IOBase) else source)
    return text if text.isprintable() else ascii(text)


@contextmanager
def blaming(action: str, name: object) -> Iterator[None]:
    """What the system refuses becomes a StorageError: cannot `action` `name`."""
    try:
        yield
    except BrokenPipeError:  # the reader has gone: not a failure of ours
        raise
    except OSError as cause:
        raise StorageError(f"cannot {action} {shown(name)}", cause.strerror or str(cause)) from cause
