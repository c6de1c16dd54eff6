"""JSON lines: one object a line, read one at a time; whatever is wrong is told with the file and the line."""

import codecs
import json
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import FormatError
from ..spool import blaming, shown

LIMIT = 64 << 20  # bytes of a line
LONGEST = 30_000  # characters of an accepted answer: what scores a text is quadratic in its length

Row = dict[str, Any]


def rows(path: str, stream: BinaryIO | None = None) -> Iterator[tuple[str, Row]]:
    """The objects of a file, or of a stream called `path`, each with its place as FILE:LINE; empty lines are skipped.

    Raises StorageError for a file that cannot be read, FormatError for a line that is no object and a file of none.
    """
    found = False
    for number, line in _lines(path, stream):
        where = f"{shown(path)}:{number}"
        text = _decoded(line, where, number == 1)
        if text.strip():
            found = True
            yield where, _object(text, where)
    if not found:
        raise FormatError(f"{shown(path)} is empty", "one JSON object a line is expected")


def text_of(row: Row, key: str, where: str, *, default: str | None = None) -> str:
    """The text under a key; raises FormatError where it is missing without a default, or no text."""
    value = row.get(key, default)
    if not isinstance(value, str):
        raise FormatError(f'{where}: "{key}" {"is missing" if value is None else "must be a text"}')
    return value


def answers_of(row: Row, key: str, where: str) -> tuple[str, ...]:
    """The accepted answers under a key, a text or several, blank ones left out; FormatError where none is left."""
    value: Any = row.get(key)
    texts = value if isinstance(value, list) else [value]
    if not all(isinstance(one, str) for one in texts):
        raise FormatError(f'{where}: "{key}" {"is missing" if value is None else "must be a text or a list of texts"}')
    texts = [one for one in texts if one.strip()]
    if not texts:
        raise FormatError(f'{where}: "{key}" is empty', "without an answer nothing can be judged")
    if max(map(len, texts)) > LONGEST:
        raise FormatError(f'{where}: "{key}" is too long', f"an accepted answer has {LONGEST:,} characters at most")
    return tuple(texts)


def _lines(path: str, stream: BinaryIO | None) -> Iterator[tuple[int, bytes]]:
    with ExitStack() as stack:
        with blaming("read", path):
            source = stream or stack.enter_context(Path(path).open("rb"))
        for number in count(1):
            with blaming("read", path):
                line = source.readline(LIMIT + 1)
            if not line:
                return
            if len(line) > LIMIT:
                raise FormatError(f"{shown(path)}:{number} is too long", f"a line has {LIMIT >> 20} MiB at most")
            yield number, line


def _decoded(line: bytes, where: str, first: bool) -> str:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as cause:
        marked = first and line[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        why = "it is UTF-16" if marked else f"byte {cause.start} of the line cannot be decoded"
        raise FormatError(f"{where} is not UTF-8 text", why, "convert it first") from cause


def _object(text: str, where: str) -> Row:
    try:
        row = json.loads(text)
        if "\\ud" in text.lower():  # half a surrogate pair is JSON, but no text that could be encoded
            json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as cause:
        raise FormatError(f"{where} holds half a character", f"{cause.object[cause.start]!a} stands alone") from cause
    except json.JSONDecodeError as cause:
        raise FormatError(f"{where} is not JSON", f"{cause.msg} at character {cause.pos + 1}") from cause
    except (ValueError, RecursionError) as cause:
        why = "it is nested too deeply" if isinstance(cause, RecursionError) else str(cause)
        raise FormatError(f"{where} is not JSON", why) from cause
    if not isinstance(row, dict):
        raise FormatError(f"{where} is not a JSON object", "each line is one, in braces")
    return row
