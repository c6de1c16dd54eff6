"""What commands share: options, messages, progress, sizes. stdout is the product, everything else goes to stderr."""

import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import click

from ..errors import UsageError
from .names import METHODS, STATISTICS

F = TypeVar("F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Ui:
    """How much a command says, and where."""

    quiet: bool = False
    as_json: bool = False

    def say(self, text: str) -> None:
        """A line for the user."""
        if not self.quiet:
            print(clean(text), file=sys.stderr)

    def warn(self, text: str) -> None:
        """A line that even --quiet shows."""
        print(f"kvcli: warning: {clean(text)}", file=sys.stderr)

    def result(self, schema: str, facts: dict[str, Any], *, to_stderr: bool = False) -> None:
        """With --json one object, on stderr where stdout carries the snapshot itself."""
        if self.as_json:
            print(json.dumps({"schema": schema, **facts}), file=sys.stderr if to_stderr else sys.stdout)

    @contextmanager
    def phases(self) -> Iterator[Callable[[str], None]]:
        """A spinner on stderr, only on a terminal; yields a function that names what is being done."""
        if not self._drawn:
            yield lambda text: None
            return
        from rich.console import Console

        with Console(stderr=True).status("starting") as status:
            yield lambda text: status.update(clean(text))

    @property
    def _drawn(self) -> bool:
        return not self.quiet and sys.stderr.isatty()

    @contextmanager
    def progress(self, label: str) -> Iterator[Callable[[int, int], None]]:
        """A bar on stderr while work goes on, only on a terminal; yields tick(done, total)."""
        if not self._drawn:
            yield lambda done, total: None
            return
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
            task = bars.add_task(label, total=None)
            yield lambda done, total: bars.update(task, completed=done, total=total)


def output_options(command: F) -> F:
    """--json and --quiet, which `current` hands to the command; -vv is looked for where errors are shown."""

    def collect(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
        given = ctx.meta.setdefault("kvcli.ui", {})
        given[param.name] = value or given.get(param.name, False)  # of a group, or of the command in it
        return value

    for option in (
        click.option("--json", "as_json", is_flag=True, expose_value=False, callback=collect, help="One JSON object."),
        click.option("-q", "--quiet", is_flag=True, expose_value=False, callback=collect, help="Only warnings."),
        click.option("-v", "--verbose", count=True, expose_value=False, help="-vv shows tracebacks."),
    ):
        command = option(command)
    return command


def uses_kernels(command: F) -> F:
    """Refuses a KVCLI_KERNELS that this machine cannot obey, before any work; goes below all options."""

    @wraps(command)
    def checked(*args: Any, **options: Any) -> Any:
        if os.environ.get("KVCLI_KERNELS"):
            from ..kernels.op import check_forced

            try:
                check_forced()
            except ValueError as cause:
                raise UsageError(str(cause)) from cause
        return command(*args, **options)

    return cast(F, checked)


def current() -> Ui:
    """The options of `output_options` as given to the running command."""
    return Ui(**click.get_current_context().meta.get("kvcli.ui", {}))


def device_option(command: F) -> F:
    """--device."""
    return click.option(
        "--device",
        type=click.Choice(["auto", "cpu", "cuda"]),
        default="auto",
        envvar="KVCLI_DEVICE",
        help="auto is cuda if there is one.",
    )(command)


def model_options(command: F) -> F:
    """--model, --device and --dtype."""
    for add in (
        click.option(
            "--dtype",
            type=click.Choice(["auto", "bfloat16", "float16", "float32"]),
            envvar="KVCLI_DTYPE",
            help="Precision to compute in.",
        ),
        device_option,
        click.option("--model", envvar="KVCLI_MODEL", metavar="FOLDER|ID", help="A model folder or hub id."),
    ):
        command = add(command)
    return command


def collect_option(more: str = "") -> Callable[[F], F]:
    """--collect; `more` is what else its help says."""
    about: dict[str, Any] = {"help": f"Statistics that some methods need: {', '.join(STATISTICS)}{more}."}
    completed = complete_after(",", STATISTICS)
    return click.option("--collect", multiple=True, metavar="NAME,...", shell_complete=completed, **about)


def segments_option(command: F) -> F:
    """--segments."""
    help = 'Stretches of the text: lines of {"start", "end", "type", "group"}, in characters [its paragraphs].'
    return click.option("--segments", metavar="FILE.jsonl", help=help)(command)


def grid_options(methods: str, budgets: str) -> Callable[[F], F]:
    """--method, --budget, --raw and --seed of commands that compare; what is compared where nothing is asked for."""
    about: dict[str, Any] = {"help": f"What is compared [{methods}].", "shell_complete": complete_after("+,")}
    sizes = f"To what size, as compress has it [{budgets}]."
    seeds: dict[str, Any] = {"type": click.IntRange(0, 2**31 - 1), "default": 0, "show_default": True}

    def add(command: F) -> F:
        for option in (
            click.option("--seed", **seeds, help="For tasks, and methods that draw by lot."),
            click.option("--raw", is_flag=True, help="Read texts as they are, without the model's chat template."),
            click.option("-b", "--budget", multiple=True, metavar="SIZE,...", help=sizes),
            click.option("-m", "--method", multiple=True, metavar="RECIPE,...", **about),
        ):
            command = option(command)
        return command

    return add


def complete_after(
    marks: str, names: Sequence[str] = METHODS
) -> Callable[[click.Context, click.Parameter, str], list[str]]:
    """Completes a name, by default of a method, behind any of these marks."""

    def complete(ctx: click.Context, param: click.Parameter, incomplete: str) -> list[str]:
        start = max(incomplete.rfind(mark) for mark in marks) + 1
        return [incomplete[:start] + name for name in names if name.startswith(incomplete[start:])]

    return complete


def complain(*lines: str) -> None:
    """An error: what happened, why, and how to mend it, as far as there is something to say."""
    print("kvcli: " + "\n       ".join(clean(line) for line in lines if line), file=sys.stderr)


def clean(text: str) -> str:
    """Text safe for a terminal: control characters shown as escapes."""
    return "".join(char if char.isprintable() or char in "\n\t" else repr(char)[1:-1] for char in text)


def size(count: float) -> str:
    """Bytes as people read them: 78.6 MB."""
    if count < 1000:
        return f"{count:.0f} B"
    for unit in ("kB", "MB"):
        count /= 1000
        if count < 1000:
            return f"{count:.1f} {unit}"
    return f"{count / 1000:.1f} GB"


def peak_memory() -> int:
    """Largest resident size of this process so far, in bytes."""
    status = Path("/proc/self/status")  # unlike getrusage it leaves out what the parent held before the exec
    lines = status.read_text().splitlines() if status.exists() else []
    for line in lines:
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
