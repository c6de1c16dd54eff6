"""kvcli verify: read all of a snapshot and check every digest."""

import click

from . import streams
from .ui import clean, current, output_options, size


@click.command("verify", short_help="Check every byte of a snapshot.")
@click.argument("file", required=False, metavar="[FILE|-]", type=click.Path())
@output_options
def command(file: str | None) -> None:
    """Check that a snapshot is whole, undamaged and holds only finite numbers: exit 0 if it does, 4 if not.

    \b
    Examples:
      kvcli verify report.kv.safetensors
      kvcli prefill report.txt | kvcli verify -
    """
    ui = current()
    origin = streams.source(file, ui)
    from ..storage import verify

    with streams.waiting(origin, ui), ui.progress("verifying") as tick:
        facts = verify(origin, tick)
    facts = {"file": streams.shown(origin), **facts}
    if ui.as_json:
        ui.result("kvcli.verify/1", facts)
    else:
        click.echo(f"{clean(facts['file'])}: ok, {facts['tensors']} tensors, {size(facts['bytes'])}")
