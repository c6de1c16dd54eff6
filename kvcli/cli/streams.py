"""Where a command reads and writes: FILE or -, pipes, the newest snapshot, derived names. Imports no torch."""

import codecs
import os
import re
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from ..errors import FormatError, KvError, StorageError, UsageError
from .ui import Ui

SUFFIX = ".kv.safetensors"
Source = Path | BinaryIO


def source(file: str | None, ui: Ui, *, full: bool = False) -> Source:
    """The snapshot to read: FILE, `-`, a pipe on stdin, else the newest in this folder (`full`: uncompressed)."""
    if file == "-" or (file is None and is_piped(sys.stdin)):
        if sys.stdin.isatty():
            raise UsageError("no snapshot on stdin", "it is a terminal", "name a FILE or pipe a snapshot in")
        return sys.stdin.buffer
    if file is not None:
        return Path(file)
    newest = next(_newest(full), None)
    if newest is None:
        kind = "uncompressed snapshot" if full else "snapshot"
        raise UsageError(f"no FILE given and no {kind} (*{SUFFIX}) in this folder", fix="name a FILE or pipe one in")
    ui.say(f"reading {newest}, the newest {'full ' if full else ''}snapshot here")
    return newest


def _newest(full: bool) -> Iterator[Path]:
    from ..spool import header_of

    found = [path for path in Path().glob(f"*{SUFFIX}") if path.is_file()]  # not a link to nowhere, nor a pipe
    for path in sorted(found, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            meta = header_of(path).meta
        except KvError:
            continue
        if not (full and meta.history):
            yield path


def target(file: str | None, derived: str, force: bool) -> Source:
    """Where the snapshot goes: -o FILE, `-`, stdout when it is a pipe or a file, else the derived name.

    Raises UsageError for bytes to a terminal, StorageError early for a file that exists without `force`.
    """
    if file == "-" or (file is None and is_piped(sys.stdout)):
        if sys.stdout.isatty():
            raise UsageError("a snapshot is bytes, and stdout is a terminal", fix="use -o FILE or a pipe")
        return sys.stdout.buffer
    from ..spool import exists

    path = Path(file or derived)
    if path.is_dir():
        raise StorageError(f"cannot write {path}", "it is a folder", "name a file in it")
    if path.is_file() and not force:
        raise exists(path)
    if not os.access(path.parent, os.W_OK):
        raise StorageError(f"cannot write {path}", f"{path.parent} is not a folder that can be written to")
    return path


def is_piped(stream: IO[str]) -> bool:
    """Whether stdin or stdout is a pipe, a socket or a plain file."""
    try:
        mode = os.fstat(stream.fileno()).st_mode
    except (OSError, ValueError, AttributeError):
        return False
    return stat.S_ISFIFO(mode) or stat.S_ISREG(mode) or stat.S_ISSOCK(mode)


def stem(origin: Source | str) -> str:
    """The name a derived file starts with; `stdin` for a pipe."""
    if isinstance(origin, (str, Path)):
        name = Path(origin).name
        return name.removesuffix(SUFFIX) if name.endswith(SUFFIX) else Path(name).stem or "document"
    return "stdin"


def safe(text: str) -> str:
    """A recipe or budget as a part of a file name."""
    return re.sub(r"[^A-Za-z0-9.+%=,-]", "-", text)


def shown(origin: Source) -> str:
    """What to call a source or target in a message."""
    return str(origin) if isinstance(origin, Path) else "-"


def titled(origin: Source) -> str:
    """The same at the start of a line for people."""
    return str(origin) if isinstance(origin, Path) else "snapshot"


@contextmanager
def waiting(origin: Source, ui: Ui, what: str = "a snapshot") -> Iterator[None]:
    """Say after one second that stdin is being waited for."""
    timer = threading.Timer(1.0, lambda: ui.say(f"reading {what} from stdin"))
    timer.daemon = True
    if not isinstance(origin, Path):
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


def write_text(path: Path, text: str, force: bool) -> None:
    """A file that is there when all of it is."""
    from ..spool import open_output

    data = text.encode()
    with open_output(path, len(data), force) as write:
        write(data)


def text_of(path: str) -> str:
    """The UTF-8 text of a file, or of stdin for `-`; raises StorageError, FormatError for what is no text."""
    from ..spool import blaming

    name = "stdin" if path == "-" else path
    with blaming("read", name):
        data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as cause:
        marked = data[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        why = "it is UTF-16" if marked else f"byte {cause.start} cannot be decoded"
        raise FormatError(f"{name} is not UTF-8 text", why, "convert it first") from cause
    if (zero := data.find(0)) >= 0:  # UTF-16 without its mark, or no text at all
        raise FormatError(f"{name} is not UTF-8 text", f"byte {zero} is zero", "convert it first")
    return text
