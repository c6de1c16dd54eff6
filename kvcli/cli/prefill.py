"""kvcli prefill: a document becomes a snapshot."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from . import streams
from .ui import Ui, current, model_options, output_options, peak_memory, size

if TYPE_CHECKING:
    from ..snapshot import Snapshot


@click.command("prefill", short_help="Read a document; keep the model's memory of it as one file.")
@click.argument("doc", required=False, metavar="[DOC|-]")
@click.option(
    "-o", "--output", metavar="FILE|-", help="Where the snapshot goes [stdout in a pipe, else DOC.kv.safetensors]."
)
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing file.")
@click.option("--raw", is_flag=True, help="Read the text as it is, without the model's chat template.")
@click.option("--chunk", type=click.IntRange(1), default=1024, show_default=True, help="Tokens read at a time.")
@model_options
@output_options
def command(doc: str | None, output: str | None, force: bool, raw: bool, chunk: int, **model: Any) -> None:
    """Read a document once and keep the model's memory of it as one file.

    \b
    Examples:
      kvcli prefill report.txt
      cat report.txt | kvcli prefill --raw -o report.kv.safetensors -
    """
    ui = current()
    text, stem = streams.read_text(doc)
    target = streams.target(output, f"{stem}{streams.SUFFIX}", force)
    snapshot, seconds = _read(ui, text, raw, chunk, model)
    from ..storage import write_snapshot

    facts = {
        "file": streams.shown(target),
        "model": snapshot.meta.model["id"],
        "dtype": snapshot.meta.layout.dtype,
        "tokens": snapshot.meta.seq.tokens,
        "entries": sum(len(rows.k) for rows in snapshot.rows),
        "kv_bytes": sum(rows.k.nbytes + rows.v.nbytes for rows in snapshot.rows),
        "file_bytes": write_snapshot(snapshot, target, force=force),
        "seconds": seconds,
        "peak_memory": peak_memory(),
    }
    ui.say(
        f"{streams.titled(target)}: {facts['tokens']:,} tokens, {size(facts['file_bytes'])}, "
        f"read in {seconds:.1f} s ({facts['tokens'] / seconds:,.0f} tokens/s)"
    )
    ui.result("kvcli.prefill/1", facts, to_stderr=not isinstance(target, Path))


def _read(ui: Ui, text: str, raw: bool, chunk: int, options: dict[str, Any]) -> "tuple[Snapshot, float]":
    with ui.phases() as phase:
        phase("loading torch and transformers")
        from ..model.load import load
        from ..model.observe import prefill
        from ..model.text import document_ids

        model = load(options["model"], device=options["device"], dtype=options["dtype"] or "bfloat16", tick=phase)
        chat = not raw and bool(model.tokenizer.chat_template)
        ids, lead, tail = document_ids(model.tokenizer, text, chat)
    start = time.perf_counter()
    with ui.progress("reading") as tick:
        snapshot = prefill(model, ids, (lead, tail, chat), chunk=chunk, tick=tick)
    if any(part.value_norm is None for part in snapshot.stats):
        ui.say("note: the output projection was not found, so the statistic value_norm is absent")
    return snapshot, time.perf_counter() - start
