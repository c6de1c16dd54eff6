"""Documents as commands take them: texts and snapshots, told apart by how they begin, from files and from pipes."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from shutil import copyfileobj
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING

from ..errors import UsageError
from . import streams
from .ui import Ui

if TYPE_CHECKING:
    from ..document import Given


def documents(ui: Ui, names: Sequence[str], folder: Path) -> "list[Given]":
    """The text or the snapshot's file of each name; what comes through a pipe is kept in the folder."""
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        raise UsageError(f"{twice} is given twice")
    return [_document(ui, name, folder) for name in names]


def _document(ui: Ui, name: str, folder: Path) -> "Given":
    from ..spool import blaming, is_snapshot

    path = Path(name)
    if name == "-" or not path.is_file():
        origin: streams.Source = sys.stdin.buffer if name == "-" else path
        with streams.waiting(origin, ui, "a document"), blaming("read", name), ExitStack() as stack:
            copy = stack.enter_context(NamedTemporaryFile(dir=folder, delete=False))
            copyfileobj(stack.enter_context(origin.open("rb")) if isinstance(origin, Path) else origin, copy)
        path = Path(copy.name)
    return name, path if is_snapshot(path) else _text(ui, name, path)


def _text(ui: Ui, name: str, path: Path) -> str:
    from ..model.chat import FILES, messages

    text = streams.text_of(str(path))
    if name.lower().endswith(FILES) and messages(text):
        ui.warn(
            f"{name}: the chat is read as a text, and not by turns as kvcli prefill does; its snapshot can be named"
        )
    return text
