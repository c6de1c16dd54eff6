"""Rows of JSON in a file, a line each as it is finished: what a run that was killed goes on from; knows no tensors."""

import fcntl
import json
from pathlib import Path
from types import TracebackType
from typing import Any

from .errors import StorageError
from .spool import blaming, shown

Row = dict[str, Any]


def line(schema: str, row: Row) -> str:
    """A row that says what it is, without the end of the line."""
    return json.dumps({"schema": schema, **row})


class Ledger:
    """The rows in a file, and further ones behind them: `with Ledger(path, schema) as ledger: ledger.put(row)`.

    A last line that was cut by the end of its writer is dropped. `force` begins the file anew, whatever it holds.
    Raises StorageError for a file with anything else than rows of this schema in it, which is left as it is.
    """

    def __init__(self, path: Path, schema: str, *, force: bool = False) -> None:
        self._path, self._schema = path, schema
        with blaming("read", path):
            data = path.read_bytes() if path.is_file() and not force else b""
        whole = data.rfind(b"\n") + 1
        self.rows = [self._row(text, number) for number, text in enumerate(data[:whole].splitlines(), 1)]
        self._check_start(data[whole:], len(self.rows) + 1)
        with blaming("write", path):
            self._file = path.open("ab")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as cause:
            self._file.close()
            raise StorageError(f"{shown(path)} is in use by another run", fix="wait for it, or name another") from cause
        with blaming("write", path):
            if whole < len(data) or force:
                self._file.truncate(whole)

    def put(self, *rows: Row) -> None:
        """Write rows, which from then on no end of this process can take away."""
        with blaming("write", self._path):
            self._file.write("".join(line(self._schema, row) + "\n" for row in rows).encode())
            self._file.flush()

    def __enter__(self) -> "Ledger":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with blaming("write", self._path):
            self._file.close()

    def _row(self, text: bytes, number: int) -> Row:
        self._check_start(text, number)
        try:
            row = json.loads(text)
        except (ValueError, RecursionError) as cause:
            raise self._strange(number) from cause
        if not isinstance(row, dict):
            raise self._strange(number)
        return {name: value for name, value in row.items() if name != "schema"}

    def _check_start(self, text: bytes, number: int) -> None:
        """Even of half a line it must be sure that it is ours to drop."""
        start = line(self._schema, {}).encode()[:-1]
        if text[: len(start)] != start[: len(text)]:
            raise self._strange(number)

    def _strange(self, number: int) -> StorageError:
        what = f"{shown(self._path)}:{number} is no row of {self._schema}"
        return StorageError(what, "the file holds something else", "name another file, or delete this one")
