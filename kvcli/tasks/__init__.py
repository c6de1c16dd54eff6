"""Tasks by name: what they ask and of which documents. They know no model and no tokenizer."""

from collections.abc import Callable
from difflib import get_close_matches
from importlib import import_module

from ..errors import UsageError
from .task import Case, Setting

TASKS = ("needle", "ppl", "qa", "longbench", "zeroscrolls")


def cases(spec: str, setting: Setting) -> list[Case]:
    """The documents and questions of a task as it is written: `needle:keys,tokens=1000`, `qa:FILE`.

    Raises UsageError for an unknown task or option, StorageError and FormatError for a file that cannot be used.
    """
    name, words = named(spec)
    make: Callable[[str, Setting], list[Case]] = import_module(f".{name}", __name__).cases
    return make(words, setting)


def version(spec: str) -> int:
    """Numbers of two versions of a task do not compare."""
    number: int = import_module(f".{named(spec)[0]}", __name__).VERSION
    return number


def named(spec: str) -> tuple[str, str]:
    """The task's name and what follows it."""
    name, _, words = spec.partition(":")
    if name not in TASKS:
        near = get_close_matches(name, TASKS, n=3) or TASKS
        raise UsageError(f"--task {spec!r}: there is no task {name!r}", f"did you mean {' or '.join(near)}?")
    return name, words
