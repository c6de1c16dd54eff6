"""kvcli methods: every method with its stages, options and source."""

from typing import Any

import click

from .ui import current, output_options


@click.command("methods", short_help="List methods with their options and sources.")
@click.argument("name", required=False)
@output_options
def command(name: str | None) -> None:
    """List the methods that `compress --method` knows; with NAME, one of them with its options.

    \b
    Examples:
      kvcli methods
      kvcli methods kvmerger
    """
    from ..registry import named, stages

    ui = current()
    found = list(named(name).values()) if name else stages()
    rows = [
        {
            "name": stage.name,
            "stage": stage.kind,
            "help": stage.help,
            "needs": list(stage.needs),
            "paper": stage.source.paper,
            "options": {key: option.default for key, option in stage.options.items()},
            "choices": {key: option.choices for key, option in stage.options.items() if option.choices},
            "takes": {key: option.words for key, option in stage.options.items()},
        }
        for stage in found
    ]
    if ui.as_json:
        ui.result("kvcli.methods/1", {"rows": rows})
        return
    for row in rows:
        click.echo(_line(row))


def _line(row: dict[str, Any]) -> str:
    from ..recipe import written

    options = [f"{written(key, value)} ({row['takes'][key]})" for key, value in row["options"].items()]
    about = {"options": ", ".join(options), "needs": ", ".join(row["needs"]), "source": row["paper"]}
    lines = [row["help"], *(f"{key}: {text}" for key, text in about.items() if text)]
    return f"{row['name']:<13} {row['stage']:<9} " + "\n".ljust(25).join(lines)
