"""The command line: finds commands without importing torch, and turns errors into messages and exit codes."""

import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from typing import Any

import click

from .. import __version__
from ..errors import KvError

COMMANDS = (
    "prefill",
    "score",
    "compress",
    "resume",
    "eval",
    "bench",
    "inspect",
    "verify",
    "diff",
    "methods",
    "calibrate",
    "kernels",
    "doctor",
    "completion",
)


class _Commands(click.Group):
    """Commands by name, each imported from its own file when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(f".{cmd_name}", __name__).command
        return command


@click.command(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="kvcli")
def cli() -> None:
    """gzip for KV caches: read a document once, keep the model's memory of it, make it small, ask it later.

    \b
    Example:
      kvcli prefill report.txt
      kvcli compress --method kvmerger --budget 0.35
      kvcli resume --prompt "What changed in Q3?"
    """


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit with the code the errors define; no traceback without -vv."""
    _open_closed_streams()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an answer may hold what the terminal's encoding lacks
    args = list(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    sys.exit(run(args))


def _open_closed_streams() -> None:
    """A stream that was closed before the start reads and writes nothing, and its number goes to no other file."""
    for fd, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, fd)
            setattr(sys, name, os.fdopen(fd, mode))


def run(args: list[str]) -> int:
    """The exit code of one command; errors go to stderr, with --json also as an object to stdout."""
    try:
        code = _invoke(args)
        sys.stdout.flush()
    except BrokenPipeError:
        code = 141
    except (Exception, KeyboardInterrupt) as error:
        if "-vv" in args or args.count("-v") > 1:
            traceback.print_exc()
        code, *words = _explain(error)
        with suppress(OSError):  # where nobody listens the exit code must do
            _tell(args, code, *words)
    _drain()
    return code


def _invoke(args: list[str]) -> int:
    try:
        if "_KVCLI_COMPLETE" in os.environ:
            cli.main(args=args, prog_name="kvcli")
        # Not cli.main: it turns a broken pipe into exit code 1 in every mode.
        with cli.make_context("kvcli", args) as context:
            cli.invoke(context)
    except click.exceptions.Exit as done:
        return done.exit_code
    except click.exceptions.NoArgsIsHelpError as error:
        print(error.format_message(), file=sys.stderr)
        return 2
    return 0


def _drain() -> None:
    """Let what stdout can no longer take go nowhere, or Python would try it again at its end and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)


def _explain(error: BaseException) -> tuple[int, str, str, str]:
    """Exit code, what happened, why, and how to mend it."""
    if isinstance(error, KvError):
        return error.exit_code, error.what, error.why, error.fix
    if isinstance(error, click.ClickException):
        return error.exit_code, error.format_message(), "", _see_help(error)
    if isinstance(error, (KeyboardInterrupt, click.Abort)):
        return 130, "interrupted", "", ""
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "memory" in str(error)):
        return 1, "out of memory", str(error), "use a smaller --chunk, a smaller model or a shorter document"
    if isinstance(error, OSError):
        return 3, f"{error.filename or 'input or output'}: {error.strerror or error}", "", ""
    return 1, "kvcli failed in a way it should not", f"{type(error).__name__}: {error}", "-vv shows where"


def _see_help(error: click.ClickException) -> str:
    context: Any = getattr(error, "ctx", None)
    return f"see {context.command_path} --help" if context else "see kvcli --help"


def _tell(args: list[str], code: int, what: str, why: str, fix: str) -> None:
    from .ui import complain

    complain(what, why, fix)
    if "--json" in args:
        error = {"code": code, "what": what, "why": why, "fix": fix}
        # Where the snapshot itself goes to stdout, so would these words.
        where = sys.stderr if _snapshot_to_stdout(args) else sys.stdout
        print(json.dumps({"schema": "kvcli.error/1", "error": error}), file=where)


def _snapshot_to_stdout(args: list[str]) -> bool:
    """By the arguments alone: they may be what is wrong."""
    from .streams import is_piped

    output = None
    for arg, following in zip(args, [*args[1:], ""], strict=True):
        if match := re.match(r"--output=|--output$|-[fqv]*o", arg):
            output = arg[match.end() :] or following
    return args[0] in ("prefill", "score", "compress") and (output == "-" or (output is None and is_piped(sys.stdout)))
