"""kvcli methods: every method with its stages, options and source."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from .ui import complete_after, current, output_options

if TYPE_CHECKING:
    from ..registry import Stage


@click.group("methods", short_help="List methods with their sources; `show` explains one.", invoke_without_command=True)
@output_options
@click.pass_context
def command(context: click.Context) -> None:
    """List the methods that `compress --method` knows: their stages, the paper and its year, and what they do.

    A method marked ? was published with the question in view when the cache was compressed; `prefill --probe` gives it
    one.

    \b
    Examples:
      kvcli methods
      kvcli methods --json
      kvcli methods show kvmerger
    """
    if context.invoked_subcommand is None:
        from ..registry import stages

        _show(stages(), _line)


@command.command("show", short_help="Explain one method, with all its stages and options.")
@click.argument("name", shell_complete=complete_after("+"))
@output_options
def show(name: str) -> None:
    """Explain one method: what each of its stages does, its options, what it needs, and what it was checked against.

    \b
    Examples:
      kvcli methods show kvmerger
      kvcli methods show snapkv --json
    """
    from ..registry import named

    _show(list(named(name).values()), _page)


def _show(stages: "Sequence[Stage]", text: Any) -> None:
    ui = current()
    if ui.as_json:
        ui.result("kvcli.methods/1", {"rows": [_facts(stage) for stage in stages]})
        return
    for stage in stages:
        click.echo(text(stage))


def _facts(stage: "Stage") -> dict[str, Any]:
    return {
        "name": stage.name,
        "stage": stage.kind,
        "help": stage.help,
        "needs": list(stage.needs),
        "profile": stage.profile,
        **vars(stage.source),
        "options": {key: option.default for key, option in stage.options.items()},
        "choices": {key: option.choices for key, option in stage.options.items() if option.choices},
        "takes": {key: option.words for key, option in stage.options.items()},
    }


def _line(stage: "Stage") -> str:
    """A stage in one line."""
    source = stage.source
    mark = "?" if source.question else " "
    return f"{stage.name:<18} {stage.kind:<9}{source.year or '':>4}{mark} {source.paper:<17} {stage.help}".rstrip()


def _page(stage: "Stage") -> str:
    """All that is known of a stage."""
    from ..recipe import written

    source = stage.source
    options = [f"{written(key, option.default)} ({option.words})" for key, option in stage.options.items()]
    seen = "published with the question in view: give it one by kvcli prefill --probe" if source.question else ""
    about = {
        "options": "\n".ljust(15).join(options),
        "needs": ", ".join([*stage.needs, *[f"a profile: kvcli calibrate --for {stage.name}"] * bool(stage.profile)]),
        "source": " ".join(filter(None, (source.paper, f"({source.year})" if source.year else ""))),
        "question": seen,
        "checked": source.checked,
    }
    lines = [f"{stage.name}, {stage.kind}", *stage.doc.splitlines()]
    return "\n".join([*lines, *(f"  {key:<11} {text}" for key, text in about.items() if text), ""])
