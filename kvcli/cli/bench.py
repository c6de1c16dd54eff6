"""kvcli bench: recipes and budgets measured on documents, as rows of JSON or as tables with bars."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from . import streams
from .documents import documents
from .inputs import of_texts, on_texts, tasks_of
from .ui import Ui, complain, current, grid_options, model_options, output_options, size, uses_kernels

if TYPE_CHECKING:
    from ..bench import Bench
    from ..document import Document, Given
    from ..evaluate import Work
    from ..ledger import Row
    from ..model.load import Model
    from ..recipe import Cell

METHODS, BUDGETS = "snapkv+adakv,keydiff,kvmerger", "50%,20%"


@click.command("bench", short_help="Measure recipes and budgets on documents.")
@click.argument("docs", nargs=-1, metavar="[DOC|SNAP|-]...")
@grid_options(METHODS, BUDGETS)
@click.option(
    "-o", "--output", metavar="FILE.jsonl|-", help="A line of JSON a row; what FILE has already is not measured again."
)
@click.option("-f", "--force", is_flag=True, help="Begin FILE anew, whatever it holds.")
@click.option("-t", "--task", multiple=True, metavar="TASK,...", help="Also what these tasks of eval find.")
@click.option("--known", is_flag=True, help="Tasks compress for each question anew, with the question known.")
@click.option("--runs", type=click.IntRange(1), default=3, show_default=True, help="Times are medians of so many.")
@model_options
@output_options
@uses_kernels
def command(docs: tuple[str, ...], method: tuple[str, ...], budget: tuple[str, ...], **options: Any) -> None:
    """Compress documents by every recipe to every budget, and say what each takes and what it costs.

    A document is a text, which is read once, or its full snapshot. A row has what stays in entries and bytes, seconds
    and peak memory of compressing (in a process of its own), the time to load the result and to answer a question from
    it, the output error, and what tasks of eval find. Rows are a table on a terminal, else lines of JSON. A run that
    was interrupted goes on from its FILE.

    \b
    Examples:
      kvcli bench report.txt
      kvcli bench report.txt notes.txt -m snapkv:window=16,kernel=5,h2o -b 50%,20% -o rows.jsonl
      kvcli bench report.txt -m h2o -b 35% --task ppl --runs 1
      kvcli bench report.kv.safetensors -m kvmerger -b 35% --runs 5 --json
    """
    ui = current()
    if ui.as_json and options["output"] == "-":
        raise UsageError("--json is one object, -o - is one a line", fix="give one of them")
    from ..spool import scratch

    cells = _cells(ui, method or (METHODS,), budget)
    with scratch() as folder:
        given = documents(ui, docs or (streams.shown(streams.source(None, ui, full=True)),), folder)
        bench, opened = _ready(ui, given, cells, folder, options)
        rows = _measure(ui, bench, opened, options)
    _show(ui, rows, bench, options)
    if codes := [row["error"]["code"] for row in rows if "error" in row]:
        raise click.exceptions.Exit(codes[0])


def _cells(ui: Ui, methods: Sequence[str], budgets: Sequence[str]) -> "list[Cell]":
    with ui.phases() as phase:
        phase("loading torch")
        from ..recipe import grid

    return grid(methods, budgets, BUDGETS)


def _ready(
    ui: Ui, given: "Sequence[Given]", cells: "Sequence[Cell]", folder: Path, options: dict[str, Any]
) -> "tuple[Bench, list[Document]]":
    """All that can be wrong is found before anything is measured."""
    with ui.phases() as phase:
        phase("loading transformers")
        from ..bench import Bench
        from ..document import model_of, open_document
        from ..recipe import collect_of

        how = {name: options[name] for name in ("device", "dtype")}
        model = model_of(given, options["model"], **how, tick=phase)
        options["collect"] = collect_of(cells)
        works = dict(_works(ui, model, given, options))
        shared = {name: options[name] for name in ("runs", "seed", "raw", "known")}
        bench = Bench(model, cells, folder, works=works, **shared)
        reading = {"raw": options["raw"], "collect": options["collect"], "warn": ui.warn}
        documents = [open_document(each, model, **reading) for each in given]
        for document in documents:
            bench.check(document)
    return bench, documents


def _works(
    ui: Ui, model: "Model", given: "Sequence[Given]", options: dict[str, Any]
) -> "Iterator[tuple[str, Sequence[Work]]]":
    """By document, what the tasks measure."""
    tasks = tasks_of(options["task"])
    for name, source in given:
        if isinstance(source, Path) and (needy := [spec for spec in tasks if of_texts(spec)]):
            why = "a snapshot's document cannot be changed or held out"
            raise UsageError(f"--task {needy[0]} on {name}", why, "name the text")
        yield name, on_texts(ui, model, tasks, [(name, source)] if isinstance(source, str) else [], options)


def _measure(ui: Ui, bench: "Bench", documents: "Sequence[Document]", options: dict[str, Any]) -> "list[Row]":
    """Every row, written and told as soon as it is there."""
    from ..bench import SCHEMA
    from ..ledger import Ledger

    rows, taken, output = [], 0, options["output"]
    with ExitStack() as stack:
        to_file = output not in (None, "-")
        ledger = stack.enter_context(Ledger(Path(output), SCHEMA, force=options["force"])) if to_file else None
        phase = stack.enter_context(ui.phases())
        for row, fresh in bench.rows(documents, ledger.rows if ledger else (), tick=phase):
            rows.append(row)
            taken += not fresh
            if ledger and fresh:
                ledger.put(row)
            _tell(ui, row, output)
    if taken:
        ui.say(f"{taken} of {len(rows)} rows were in {output} already")
    return rows


def _tell(ui: Ui, row: "Row", output: str | None) -> None:
    from ..bench import SCHEMA, title
    from ..ledger import line

    if not ui.as_json and (output == "-" or (output is None and not sys.stdout.isatty())):
        print(line(SCHEMA, row), flush=True)
    if error := row.get("error"):
        complain(f"{title(row)}: {error['what']}", error["why"], error["fix"])
    elif not _is_table(ui, output):
        speed = f"{row['tokens_per_second']:.1f} tokens/s"
        time = f", compressed in {row['seconds']:.2f} s" if "seconds" in row else ""
        ui.say(f"{title(row)}: {size(row['file_bytes'])}{time}, {speed}")


def _is_table(ui: Ui, output: str | None) -> bool:
    return sys.stdout.isatty() and output != "-" and not ui.as_json


def _show(ui: Ui, rows: "Sequence[Row]", bench: "Bench", options: dict[str, Any]) -> None:
    if ui.as_json:
        from ..bench import SCHEMA

        ui.result(SCHEMA, {"config": bench.config, "rows": rows})
    elif _is_table(ui, options["output"]):
        from rich.console import Console

        from .chart import draw

        draw(rows, Console())
