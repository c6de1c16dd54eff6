"""What a task is made of: documents, the questions about each, and what a task may use to build them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Question:
    """What is asked, how the answer starts, what is expected, and by which of `scores.SCORES` it is judged."""

    prompt: str
    prefix: str = ""
    answer: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ("hit",)
    n: int = 16  # most tokens of an answer
    classes: tuple[str, ...] = ()  # what a classification chooses from


@dataclass(frozen=True)
class Case:
    """One document, read once, and what is measured on it: questions, or how expected a text is behind it."""

    task: str  # what its rows are reported under
    name: str  # which document, in logs and messages: unique within the task
    text: str
    questions: tuple[Question, ...] = ()
    continuation: str | None = None  # the text that is expected behind the document
    hold_out: bool = False  # or the document's own end: its last quarter, 512 tokens at most
    raw: bool = False  # leave the chat template out, as the task's authors do
    cut: Literal["", "middle", "end"] = ""  # what is left out where the document is too long, as the task's authors do
    mark: str = ""  # and the words they put behind a document whose end is left out


@dataclass(frozen=True)
class Setting:
    """What a task may use: the documents given (name, text), the size of a text in tokens, and what was asked for."""

    texts: Sequence[tuple[str, str]]
    size: Callable[[str], int]
    seed: int = 0
    limit: int | None = None  # most documents of a task
