"""Rows of a benchmark for a terminal: one table a document, with bars of size and speed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import TYPE_CHECKING, Any

from .ui import clean, size

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.table import Table

    from ..ledger import Row

WIDE, USUAL, BAR = 100, 80, 6  # columns of a terminal that has room for everything, for bars, and those of a bar
STYLE = "cyan"


@dataclass(frozen=True)
class Column:
    """One number of a row, in words and perhaps as a bar beside the largest of its table."""

    title: str
    field: str
    words: Callable[[Any], str]
    bar: bool = False
    wide: bool = False  # left out where the terminal is narrow


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"


def _error(found: dict[str, float]) -> str:
    """The median, over the document where that is known."""
    return f"{found.get('q_probe_median', found.get('q_last_median', 0.0)):.3f}"


COLUMNS = (
    Column("keep", "keep", "{:.1%}".format),
    Column("file", "file_bytes", size, bar=True),
    Column("compress", "seconds", _seconds),
    Column("GB/s", "bytes_per_second", lambda value: f"{value / 1e9:.3f}", wide=True),
    Column("memory", "peak_memory", size, wide=True),
    Column("load", "load_seconds", _seconds),
    Column("1st token", "first_token_seconds", _seconds, wide=True),
    Column("tokens/s", "tokens_per_second", "{:.1f}".format, bar=True),
    Column("error", "output_error", _error),
)


def draw(rows: "Sequence[Row]", console: "Console") -> None:
    """A table for each document, in their order."""
    columns = [
        replace(column, bar=column.bar and console.width >= USUAL)
        for column in COLUMNS
        if console.width >= WIDE or not column.wide
    ]
    flat = [row | {name: found["value"] for name, found in row.get("metrics", {}).items()} for row in rows]
    first = {name.rpartition(" ")[0]: name for row in rows for name in reversed(row.get("metrics", {}))}
    columns += [Column(name, name, "{:.3f}".format) for name in first.values()]
    for _, some in groupby(flat, key=lambda row: row["document"]):
        console.print(_table(list(some), columns))


def _table(rows: "Sequence[Row]", columns: Sequence[Column]) -> "Table":
    from rich.table import Table
    from rich.text import Text

    title = Text(clean(f"{rows[0]['document']}: {rows[0]['tokens']:,} tokens, {rows[0]['model']}"))
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1, 0, 0))
    table.add_column("method", overflow="fold")
    for column in columns:
        table.add_column(Text(clean(column.title)), justify="right", no_wrap=True)
        if column.bar:
            table.add_column("", width=BAR)
    for row in rows:
        name = Text(clean(f"{row['method']} {row['budget'] or ''}"))
        table.add_row(name, *(cell for column in columns for cell in _cells(column, row, rows)))
    return table


def _cells(column: Column, row: "Row", rows: "Sequence[Row]") -> "list[RenderableType]":
    from rich.progress_bar import ProgressBar

    value = row.get(column.field)
    failed = "failed" if "error" in row and column.field == COLUMNS[0].field else ""
    words = failed if value is None else column.words(value)
    if not column.bar:
        return [words]
    most = max(other.get(column.field, 0) for other in rows)
    return [words, "" if value is None else ProgressBar(most, value, BAR, complete_style=STYLE, finished_style=STYLE)]
