"""Ledgers: rows survive whatever ends their writer, and no file of another kind is touched."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import StorageError
from kvcli.ledger import Ledger, line

ROWS: list[dict[str, Any]] = [{"a": 1}, {"b": "words \u2028 \n \r \x85 \u00e9"}, {}, {"c": [{"d": None}], "e": 0.25}]


def written(path: Path, rows: list[dict[str, Any]], **options: Any) -> list[dict[str, Any]]:
    """The rows that were there before these."""
    with Ledger(path, "rows/1", **options) as ledger:
        for row in rows:
            ledger.put(row)
    return ledger.rows


def test_rows_come_back(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    assert written(path, ROWS[:2]) == [] and written(path, ROWS[2:]) == ROWS[:2] and written(path, []) == ROWS
    assert all(json.loads(text)["schema"] == "rows/1" for text in path.read_text().split("\n")[:-1])
    assert written(path, ROWS[:1], force=True) == [] and written(path, []) == ROWS[:1]


def test_a_file_cut_anywhere_keeps_its_whole_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    written(path, ROWS)
    data = path.read_bytes()
    for end in range(len(data) + 1):
        path.write_bytes(data[:end])
        whole = data[:end].count(b"\n")
        assert written(path, ROWS[whole:]) == ROWS[:whole]
        assert path.read_bytes() == data


def test_a_row_is_in_the_file_when_it_was_put(tmp_path: Path) -> None:
    path, child = tmp_path / "rows", os.fork()
    if child == 0:
        ledger = Ledger(path, "rows/1")
        ledger.put(ROWS[0])
        os._exit(9)  # nothing is flushed
    os.waitpid(child, 0)
    assert written(path, []) == ROWS[:1]


OURS = line("rows/1", {"a": 1})


@pytest.mark.parametrize(
    "text",
    [
        "A diary without an end of line",
        "A diary.\n",
        "{",
        "[1]\n",
        f"{OURS}\n\n",
        f"{OURS}\nx",
        f"{OURS[:-3]}\n{OURS}\n",
        f"{OURS} {OURS}\n",
        OURS.replace("rows/1", "rows/2"),
        f"{line('other/1', {})}\n",
        '{"schema": "rows/10"',
    ],
)
def test_another_file_is_refused_and_left_alone(tmp_path: Path, text: str) -> None:
    path = tmp_path / "rows"
    path.write_text(text)
    if text == "{":  # how a row begins: nothing is lost with it
        assert written(path, []) == []
        return
    with pytest.raises(StorageError, match="no row of rows/1") as caught:
        Ledger(path, "rows/1")
    assert path.read_text() == text and "another file" in caught.value.fix
    assert written(path, ROWS, force=True) == [] and written(path, []) == ROWS


def test_what_cannot_be_written_is_said(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="none"):
        Ledger(tmp_path / "none" / "rows", "rows/1")
    with pytest.raises(StorageError, match="cannot write"):
        Ledger(tmp_path, "rows/1")


def test_two_runs_do_not_share_a_file(tmp_path: Path) -> None:
    with Ledger(tmp_path / "rows", "rows/1") as ledger:
        ledger.put(ROWS[0])
        for force in (False, True):
            with pytest.raises(StorageError, match="in use"):
                Ledger(tmp_path / "rows", "rows/1", force=force)
    assert written(tmp_path / "rows", []) == ROWS[:1]
