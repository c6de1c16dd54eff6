"""kvcli calibrate: what a method has to know of a model, measured once and kept as its profile."""

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from . import streams
from .names import CALIBRATED
from .ui import Ui, clean, complete_after, current, model_options, output_options, uses_kernels

if TYPE_CHECKING:
    from ..snapshot import Snapshot

SHOWN = 8  # heads, and layers at either end


@click.command("calibrate", short_help="Measure what a method has to know of a model.")
@click.argument("files", nargs=-1, metavar="[SNAPSHOT|-]...", type=click.Path())
@click.option(
    "--for",
    "method",
    required=True,
    metavar="METHOD",
    help="Whose profile: " + ", ".join(CALIBRATED) + ".",
    shell_complete=complete_after("+", CALIBRATED),
)
@click.option("--tokens", type=click.IntRange(1), help="Of a document the model answers questions about [1000].")
@click.option("--documents", type=click.IntRange(1), default=6, show_default=True, help="How many, six facts in each.")
@model_options
@output_options
@uses_kernels
def command(files: tuple[str, ...], method: str, **options: Any) -> None:
    """Measure what METHOD has to know of a model and keep it as its profile, for compress to use from then on.

    Some methods learn it from questions that the model answers about documents made for that, which takes minutes;
    others from SNAPSHOTs of the model, and need no model. A profile is one file for the weights it was measured on,
    under KVCLI_HOME; that of the default model is there from the start.

    \b
    Examples:
      kvcli calibrate --for hack report.kv.safetensors
    """
    ui = current()
    with ui.phases() as phase:
        phase("loading torch")
        from ..profiles import save_profile
        from ..registry import named

        kind = next((stage.profile for stage in named(method).values() if stage.profile), "")
    if not kind:
        raise UsageError(f"{method} needs no profile", "it knows all it has to of any model", "leave the command out")
    profile = (_from_snapshots if kind == "snapshots" else _from_answers)(ui, method, files, options)
    path = save_profile(profile)
    ui.result("kvcli.calibrate/1", {"file": str(path), **profile})
    if not ui.as_json:
        click.echo("\n".join(f"{name:<10} {clean(text)}" for name, text in [("file", str(path)), *_lines(profile)]))


def _from_answers(ui: Ui, method: str, files: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    if files:
        raise UsageError(f"{method} is calibrated on answers of the model", "it takes no snapshots", "leave them out")
    with ui.phases() as phase:
        phase("loading torch and transformers")
        from ..calibrate import from_answers
        from ..model.load import load

        given = {"device": options["device"], "dtype": options["dtype"] or "bfloat16"}
        model = load(options["model"], **given, tick=phase)
    with ui.progress("asking") as tick:
        sizes = {name: options[name] for name in ("tokens", "documents")}
        return dict(from_answers(model, method, **sizes, tick=tick))


def _from_snapshots(ui: Ui, method: str, files: Sequence[str], options: dict[str, Any]) -> dict[str, Any]:
    origins = [streams.source(file, ui, full=True) for file in files or (None,)]
    with ui.phases() as phase:
        phase("reading snapshots")
        from ..calibrate import from_snapshots

        return dict(from_snapshots(method, _opened(ui, origins)))


def _opened(ui: Ui, origins: Sequence[streams.Source]) -> "Iterator[tuple[str, Snapshot]]":
    from ..document import naming
    from ..storage import Reader

    for origin in origins:
        with naming(streams.shown(origin)), streams.waiting(origin, ui):
            reader = Reader(origin)
        with reader:
            yield streams.shown(origin), reader.snapshot()


def _lines(profile: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "model", f"{profile['model']} (weights {profile['weights'][:12]})"
    if "heads" in profile:
        yield "found", f"{profile['found']} of {profile['asked']} facts, in documents of {profile['tokens']:,} tokens"
        best = sorted(_ranked(profile["heads"]), reverse=True)[:SHOWN]
        yield "heads", "best " + ", ".join(f"{layer}.{head} ({score:.2f})" for score, layer, head in best)
        errors = sorted(((error, layer) for layer, error in enumerate(profile["errors"])), reverse=True)
        for name, some in (("most", errors[: SHOWN // 2]), ("least", errors[-SHOWN // 2 :])):
            yield "errors" if name == "most" else "", _shares(name, some)
    if "sigma" in profile:
        values = sorted(score for score, _, _ in _ranked(profile["sigma"]))
        spots = [values[round(i * (len(values) - 1) / 4)] for i in range(5)]
        yield "snapshots", f"{profile['snapshots']}"
        yield "sigma", ", ".join(f"{x:.3f}" for x in spots) + " (least, quartiles and most of all heads)"


def _ranked(table: Sequence[Sequence[float] | None]) -> list[tuple[float, int, int]]:
    return [(score, i, h) for i, row in enumerate(table) for h, score in enumerate(row or ())]


def _shares(name: str, some: Sequence[tuple[float, int]]) -> str:
    return f"{name} in " + ", ".join(f"layer {layer} ({error:.1%})" for error, layer in some)
