"""kvcli compress: a snapshot becomes a smaller snapshot. No model is needed."""

import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from . import streams
from .names import METHODS
from .ui import Ui, complete_after, current, device_option, output_options, peak_memory, size, uses_kernels

if TYPE_CHECKING:
    import torch

    from ..budget import Budget
    from ..plan import Plan
    from ..recipe import Recipe
    from ..storage import Reader


@click.command(
    "compress",
    short_help="Make a snapshot smaller; no model is needed.",
    epilog="Methods: " + ", ".join(METHODS) + ". `kvcli methods` says more.",
)
@click.argument("file", required=False, metavar="[FILE|-]", type=click.Path())
@click.option(
    "-m",
    "--method",
    metavar="RECIPE",
    shell_complete=complete_after("+"),
    help="Methods joined by +, with options: snapkv:window=16+adakv [the best for what the snapshot holds].",
)
@click.option(
    "-b",
    "--budget",
    multiple=True,
    metavar="SIZE",
    help="35%, 0.35, 512 (entries a head) or 64MiB; several give several files.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE|-",
    help="Where it goes [stdout in a pipe, else a derived name]; {budget} is filled in.",
)
@click.option("-f", "--force", is_flag=True, help="Overwrite existing files.")
@click.option(
    "--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="For methods that draw by lot."
)
@click.option("--keep-stats", is_flag=True, help="Keep the statistics, so that the result can be compressed further.")
@click.option("--dry-run", is_flag=True, help="Say what would be kept and its size; write nothing.")
@device_option
@output_options
@uses_kernels
def command(file: str | None, method: str | None, budget: tuple[str, ...], **options: Any) -> None:
    """Keep the entries that matter, merge or drop the rest, and say what it cost.

    \b
    Examples:
      kvcli compress report.kv.safetensors --budget 20%
      kvcli compress --method kvmerger --budget 0.35
      kvcli compress report.kv.safetensors -m snapkv+adakv -b 50% -b 35% -b 20%
      kvcli compress report.kv.safetensors -m keydiff -b 35% --device cpu -o small.kv.safetensors
    """
    ui = current()
    with ui.phases() as phase:
        phase("loading torch")
        from ..device import find_device
        from ..storage import Reader
        from ..usual import usual_recipe

    device = find_device(options.pop("device"))
    origin = streams.source(file, ui, full=True)
    job = _early(origin, method, budget, options)
    with streams.waiting(origin, ui):
        reader = Reader(origin)
    with reader:
        if method is None:
            recipe = usual_recipe(reader.snapshot())
            ui.say(f"method: {recipe}")
            job = _job(origin, recipe, budget, options)
        rows = _compress(ui, reader, job, device=device, **options)
    for row in rows:
        _show(ui, row, f"{row['budget']}: " if len(rows) > 1 else "")
    ui.result("kvcli.compress/1", {"rows": rows}, to_stderr=any(not isinstance(target, Path) for target in job.targets))


@dataclass(frozen=True)
class Job:
    """A recipe, its budgets, and where the file of each goes; nowhere in a dry run."""

    recipe: "Recipe"
    budgets: "list[Budget | None]"
    targets: list[streams.Source]


def _early(origin: streams.Source, method: str | None, budget: tuple[str, ...], options: dict[str, Any]) -> Job:
    """The job before anything is read, so that what cannot be is refused; without a method its recipe is any."""
    from ..recipe import Recipe
    from ..usual import RECIPES

    if method is not None:
        return _job(origin, Recipe.parse(method), budget, options)
    if not budget:
        raise UsageError("compress needs a --budget", fix="35%, 0.35, 512 (entries a head) or 64MiB")
    named = options["output"]  # else the name derives from the recipe
    return _job(origin, Recipe.parse(RECIPES[-1]), budget, options if named else {**options, "force": True})


def _job(origin: streams.Source, recipe: "Recipe", budget: tuple[str, ...], options: dict[str, Any]) -> Job:
    budgets = recipe.budgets(budget)
    return Job(recipe, budgets, [] if options["dry_run"] else _targets(origin, recipe, budgets, options))


def _targets(
    origin: streams.Source, recipe: "Recipe", budgets: "list[Budget | None]", options: dict[str, Any]
) -> list[streams.Source]:
    output = options["output"]
    if output and len(budgets) > 1 and "{budget}" not in output:
        raise UsageError("several budgets cannot go to one output", fix="write {budget} in its name, or leave -o out")
    if len(budgets) > 1 and not output and streams.is_piped(sys.stdout):
        raise UsageError(
            "several budgets cannot go down one pipe", fix="name the files with -o 'x-{budget}.kv.safetensors'"
        )
    targets = []
    for budget in budgets:
        text = streams.safe(budget.text if budget else str(recipe))
        made_by = f"{streams.safe(str(recipe))}-{text}" if budget else text
        derived = f"{streams.stem(origin)}.{made_by}{streams.SUFFIX}"
        targets.append(streams.target(output and output.replace("{budget}", text), derived, options["force"]))
    return targets


def _compress(
    ui: Ui,
    reader: "Reader",
    job: Job,
    *,
    device: "torch.device",
    seed: int,
    keep_stats: bool,
    dry_run: bool,
    force: bool,
    **_: Any,
) -> list[dict[str, Any]]:
    from ..header import summary
    from ..pipeline import carry_out, make_plans

    start, snapshot = time.perf_counter(), reader.snapshot()
    how: dict[str, Any] = {"seed": seed, "parent": reader.digest, "keep_stats": keep_stats, "device": device}
    with ui.progress("scoring") as tick:
        plans = make_plans(snapshot, job.recipe, job.budgets, **how, tick=tick)
    rows = [_row(plan, budget) for plan, budget in zip(plans, job.budgets, strict=True)]
    if not dry_run:
        with ui.progress("writing") as tick:
            reports = carry_out(snapshot, plans, job.targets, force=force, tick=tick)
        for row, report, target in zip(rows, reports, job.targets, strict=True):
            row |= {"file": streams.shown(target), "output_error": _errors(report.nanmean(0).tolist())}
    before = {"bytes_before": reader.header.size, "entries_before": summary(reader.header, reader.meta)["entries"]}
    return [{**row, "seconds": time.perf_counter() - start, "peak_memory": peak_memory(), **before} for row in rows]


def _errors(numbers: list[float]) -> dict[str, float] | None:
    """Those that are known: a snapshot may have its last queries only."""
    found = {name: number for name, number in zip(ERRORS, numbers, strict=True) if not math.isnan(number)}
    return found or None


ERRORS = ("q_last_median", "q_last_p95", "q_probe_median", "q_probe_p95")


def _row(plan: "Plan", budget: "Budget | None") -> dict[str, Any]:
    outline = plan.outline
    return {
        "recipe": str(plan.recipe),
        "budget": budget.text if budget else None,
        "entries": outline.entries,
        "of": outline.total,
        "keep": outline.entries / outline.total,
        "kv_bytes": outline.kv_bytes,
        "file_bytes": outline.file_bytes,
        "notes": plan.notes,
    }


def _show(ui: Ui, row: dict[str, Any], which: str) -> None:
    name = {None: "dry run", "-": "snapshot"}.get(row.get("file"), row.get("file"))
    ui.say(
        f"{name}: {row['entries']:,} of {row['of']:,} entries ({row['keep']:.1%}), {size(row['file_bytes'])} "
        f"of {size(row['bytes_before'])} in {row['seconds']:.1f} s"
    )
    for note in row["notes"]:
        ui.warn(which + note)
    if row["entries"] == row["entries_before"]:
        held = "the document" if row["entries"] == row["of"] else "what the snapshot holds"
        ui.say("everything was kept" + (f": the budget is no smaller than {held}" if row["budget"] else ""))
    if error := row.get("output_error"):
        places = {"q_probe": "over the document", "q_last": "at its end"}
        known = [
            f"{error[f'{name}_median']:.3f} and {error[f'{name}_p95']:.3f} {place}"
            for name, place in places.items()
            if f"{name}_median" in error
        ]
        ui.say(f"attention output error, median and 95th percentile: {', '.join(known)}")
    elif "file" in row:
        ui.say("the output error is not known: this snapshot has no saved queries")
