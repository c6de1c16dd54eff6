"""kvcli score: statistics that were not recorded when a document was read are added to its full snapshot."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InfeasibleError, UsageError
from . import streams
from .ui import (
    Ui,
    collect_option,
    current,
    model_options,
    output_options,
    peak_memory,
    segments_option,
    size,
    uses_kernels,
)

if TYPE_CHECKING:
    from ..model.load import Model
    from ..snapshot import Snapshot
    from ..storage import Reader

SEGMENTS = "segments"


@click.command("score", short_help="Add statistics to a full snapshot; its model reads the tokens again.")
@click.argument("file", required=False, metavar="[FILE|-]", type=click.Path())
@collect_option(", and segments for the paragraphs of the text")
@segments_option
@click.option(
    "-o", "--output", metavar="FILE|-", help="Where it goes [stdout in a pipe, else FILE.scored.kv.safetensors]."
)
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing file, such as FILE itself.")
@click.option("--chunk", type=click.IntRange(1), default=1024, show_default=True, help="Tokens read at a time.")
@model_options
@output_options
@uses_kernels
def command(file: str | None, output: str | None, force: bool, **options: Any) -> None:
    """Add statistics to a full snapshot, as prefill --collect would have recorded them; all else stays bit for bit.

    The snapshot's own model reads its tokens again. What is compressed is refused: score the full snapshot first.

    \b
    Examples:
      kvcli score report.kv.safetensors --collect norms,moments
      kvcli score report.kv.safetensors --collect moments -f -o report.kv.safetensors
    """
    ui, start = current(), time.perf_counter()
    names = _names(ui, options)
    origin = streams.source(file, ui, full=True)
    target = streams.target(output, f"{streams.stem(origin)}.scored{streams.SUFFIX}", force)
    with ui.phases() as phase:
        phase("loading torch and transformers")
        from ..storage import Reader, write_snapshot

        with streams.waiting(origin, ui):
            reader = Reader(origin)
        model = _model(reader, options, phase)
    with reader:
        snapshot, told = _scored(ui, reader, model, names, options)
        facts: dict[str, Any] = {
            "file": streams.shown(target),
            "collect": names,
            "tokens": snapshot.meta.seq.tokens,
            "bytes_before": reader.header.size,
            "file_bytes": write_snapshot(snapshot, target, force=force),
            "warnings": told,
        }
    facts |= {"seconds": time.perf_counter() - start, "peak_memory": peak_memory()}
    ui.say(f"{streams.titled(target)}: {', '.join(names)} added, {size(facts['file_bytes'])}")
    ui.result("kvcli.score/1", facts, to_stderr=not isinstance(target, Path))


def _names(ui: Ui, options: dict[str, Any]) -> tuple[str, ...]:
    """What is asked for; UsageError for nothing, and for what is unknown."""
    with ui.phases() as phase:
        phase("loading torch")
        from ..collect import COLLECT, collected

    names = collected(options["collect"], (*COLLECT, SEGMENTS))
    if options[SEGMENTS] is not None and SEGMENTS not in names:
        names = (*names, SEGMENTS)
    if not names:
        raise UsageError("nothing is asked for", fix=f"--collect {','.join(COLLECT)}")
    return names


def _model(reader: "Reader", options: dict[str, Any], phase: Any) -> "Model":
    from ..model.resume import model_for
    from ..model.score import need_full

    need_full(reader.snapshot())
    given = {name: options[name] for name in ("device", "dtype")}
    return model_for(reader.meta, options["model"], **given, tick=phase)


def _scored(
    ui: Ui, reader: "Reader", model: "Model", names: tuple[str, ...], options: dict[str, Any]
) -> "tuple[Snapshot, list[str]]":
    """The snapshot with what is asked for, and the warnings the user was given."""
    from ..collect import COLLECT
    from ..model.collect import NOT_KNOWN, absent
    from ..model.resume import check_model
    from ..model.score import collect, divide

    told: list[str] = []

    def warn(text: str) -> None:
        ui.warn(text)
        told.append(text)

    found = reader.snapshot()
    check_model(found, model, warn=warn)
    if SEGMENTS in names:
        found = divide(model, found, options[SEGMENTS])
    if wanted := [name for name in names if name != SEGMENTS]:
        with ui.progress("reading") as tick:
            found = collect(model, found, wanted, chunk=options["chunk"], tick=tick)
    missing = absent(found.stats, found.meta.held, names)
    if SEGMENTS not in names and missing == [part for name in names for part in COLLECT[name]]:
        raise InfeasibleError(f"not recorded: {', '.join(missing)}", NOT_KNOWN)
    if missing:
        warn(f"not recorded: {', '.join(missing)}; {NOT_KNOWN}")
    return found, told
