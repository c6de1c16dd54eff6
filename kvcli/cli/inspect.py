"""kvcli inspect: what a snapshot is, from its header alone; imports no torch."""

from typing import Any

import click

from . import streams
from .ui import clean, current, output_options, size


@click.command("inspect", short_help="Say what a snapshot holds and what was done to it.")
@click.argument("file", required=False, metavar="[FILE|-]", type=click.Path())
@output_options
def command(file: str | None) -> None:
    """Say what a snapshot holds and what was done to it, from its header alone. --json gives all of it.

    \b
    Examples:
      kvcli inspect report.kv.safetensors
      kvcli inspect --json report.kv.safetensors
    """
    ui = current()
    origin = streams.source(file, ui)
    with streams.waiting(origin, ui):
        facts = {"file": streams.shown(origin), **_facts(origin)}
    if ui.as_json:
        ui.result("kvcli.inspect/1", facts)
    else:
        click.echo("\n".join(f"{name:<10} {clean(text)}" for name, text in _lines(facts)))


def _facts(origin: streams.Source) -> dict[str, Any]:
    from ..header import summary
    from ..spool import header_of

    header = header_of(origin)
    return summary(header, header.meta)


def _lines(facts: dict[str, Any]) -> list[tuple[str, str]]:
    layout, seq, model = facts["layout"], facts["seq"], facts["model"]
    shape = f"{layout['layers']} layers x {layout['heads']} heads x {layout['head_dim']}, {layout['dtype']}"
    kinds = layout["kinds"] or ["full"] * layout["layers"]
    sliding = kinds.count("sliding")
    shape += f", {sliding} of them sliding: they keep their window" if sliding else ""
    heads = [layer["per_head"] for layer, kind in zip(facts["layers"], kinds, strict=True) if kind == "full"]
    each = (
        f"{heads[0]:,} in every head" if len({*heads}) == 1 and heads[0] else "heads differ" if heads else "all slide"
    )
    lines = [
        ("file", f"{facts['file']}, {size(facts['file_bytes'])}, format {facts['format']}"),
        ("model", f"{model['id']} ({model['architecture']}, weights {model['weights'][:12]})"),
        ("cache", shape),
        ("tokens", f"{seq['tokens']:,} ({seq['lead']} of the chat template)" if seq["chat"] else f"{seq['tokens']:,}"),
        ("entries", f"{facts['entries']:,} of {facts['of']:,} ({facts['keep']:.1%}), {each}"),
        ("kv bytes", f"{facts['kv_bytes']:,} ({size(facts['kv_bytes'])})"),
        ("stats", ", ".join(facts["stats"]) or "none"),
        ("requires", ", ".join(facts["requires"]) or "nothing special"),
    ]
    done = [f"{step['recipe']} {step['budget']}".strip() for step in facts["history"]]
    return [*lines, ("history", ", then ".join(done) or "not compressed")]
