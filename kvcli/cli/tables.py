"""Rows of eval as tables for people: one a task, a line a method and budget, numbers with their standard errors."""

import sys
from collections.abc import Iterator, Sequence
from typing import Any

from .ui import clean, size

Row = dict[str, Any]


def print_tables(rows: Sequence[Row], markdown: bool) -> None:
    """To stdout; recovery is that of the first metric."""
    for task in dict.fromkeys(row["task"] for row in rows):
        mine = [row for row in rows if row["task"] == task]
        counts = sorted({row["n"] for row in mine})
        title = clean(f"{task}, n = {' to '.join(f'{n:,}' for n in dict.fromkeys((counts[0], counts[-1])))}")
        cells = [[clean(cell) for cell in line] for line in _cells(mine)]
        if markdown:
            _markdown(title, cells)
        else:
            plain(title, cells)


def _cells(rows: Sequence[Row]) -> Iterator[list[str]]:
    """The head and a line for each method and budget."""
    metrics = list(dict.fromkeys(row["metric"] for row in rows))
    uneven = len({row["n"] for row in rows}) > 1
    yield ["method", "budget", *["n"] * uneven, *metrics, "recovery", "size"]
    for name in dict.fromkeys((row["method"], row["budget"]) for row in rows):
        mine = {row["metric"]: row for row in rows if (row["method"], row["budget"]) == name}
        first = mine[metrics[0]]
        recovery = "" if first["recovery"] is None else f"{first['recovery']:.0%}"
        shown = [_number(mine[metric]) if metric in mine else "" for metric in metrics]
        count = [f"{first['n']:,}"] * uneven
        yield [name[0], name[1] or f"{first['keep']:.0%}", *count, *shown, recovery, size(first["bytes"])]


def _number(row: Row) -> str:
    places = 2 if abs(row["value"]) >= 10 else 3
    return f"{row['value']:.{places}f} ± {row['stderr']:.{places}f}"


def _markdown(title: str, cells: Sequence[Sequence[str]]) -> None:
    head, *lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in cells]
    print(f"**{title}**", "", head, "| --- | --- |" + " ---: |" * (len(cells[0]) - 2), *lines, "", sep="\n")


def plain(title: str, cells: Sequence[Sequence[str]], left: int = 2) -> None:
    """One table to stdout, its first line the head, all columns but the first `left` of numbers."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title), title_justify="left", box=None, pad_edge=False)
    for i, name in enumerate(cells[0]):
        table.add_column(Text(name), justify="right" if i >= left else "left", no_wrap=True)
    for line in cells[1:]:
        table.add_row(*(Text(cell, "dim" if line[0] in ("full", "none") else "") for cell in line))
    # A number that is cut off is none: a narrow terminal wraps lines by itself.
    console = Console(file=sys.stdout, width=1000, highlight=False)
    console.print(table)
    console.print()
