"""The needle task: facts hidden in running text, or counts in lists, and the questions that find them, by kind.

Knows no model and no tokenizer. `needle:KIND,option=value`: the kinds are those of RULER (arXiv:2404.06654).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from itertools import product
from pathlib import Path
from random import Random
from typing import Annotated

from ..errors import UsageError
from ..options import AtLeast1, Limit, Option
from .facts import Facts, keys, single, unlike, values, variables
from .hay import Haystack, fit, hide, largest
from .task import Case, Question, Setting
from .wordlists import common, frequent

VERSION = 2  # changes with any word or number here, in facts, hay, pools and wordlists: hits of two do not compare

SAMPLE = "harbour.txt"  # what facts are hidden in where no document is given
HIDDEN: dict[str, tuple[Callable[[str, int, Random], Facts], int]] = {  # with how many facts
    "": (unlike, 6),
    "single": (single, 1),
    "keys": (keys, 6),
    "values": (values, 2),
    "variables": (variables, 2),
}
LISTS: dict[str, Callable[[int, Random], tuple[str, Question]]] = {"common": common, "frequent": frequent}
KINDS = (*HIDDEN, *LISTS)
OPTIONS = {
    "tokens": Option.of(None, AtLeast1),
    "copies": Option.of(4, AtLeast1),
    "facts": Option.of(None, Annotated[int, Limit(lambda n: 1 <= n <= 100, "a whole number from 1 to 100")]),
}
UNCOUNTED = ("single", *LISTS)  # kinds that take no `facts`


@dataclass(frozen=True)
class Wanted:
    """What a task spec asks for: kinds, the options as they were written, and their values."""

    kinds: tuple[str, ...]
    written: dict[str, str]
    tokens: int | None = None  # of a text; None: as many as the document has
    copies: int = 4  # texts of a document
    facts: int | None = None  # that are asked, or keys or chains; None: as many as suit the kind

    @classmethod
    def parse(cls, words: str) -> "Wanted":
        """A kind, `all` or none, and options, joined by commas; raises UsageError naming what is not known."""
        spec = f"--task {'needle:' + words!r:.80}"
        items = [item for item in "".join(words.split()).split(",") if item]
        named = [item for item in items if "=" not in item]
        pairs = [item.split("=", 1) for item in items if "=" in item]
        if len(named) > 1 or len(dict(pairs)) < len(pairs):
            raise UsageError(f"{spec}: one kind, and each option once")
        kind = named[0] if named else ""
        if kind not in (*KINDS, "all"):
            raise UsageError(f"{spec}: no kind {kind!r}", _hint(kind, [*filter(None, KINDS), "all"]))
        known = [name for name in OPTIONS if name != "facts" or kind not in UNCOUNTED]
        if unknown := [key for key, _ in pairs if key not in known]:
            raise UsageError(f"{spec}: no option {unknown[0]!r}", _hint(unknown[0], known))
        found = {key: _read(spec, key, text) for key, text in pairs}
        return cls(KINDS if kind == "all" else (kind,), dict(pairs), **found)

    def label(self, kind: str) -> str:
        """What rows of a kind are reported under: one label is one thing."""
        pairs = [f"{k}={v}" for k, v in self.written.items() if k != "facts" or kind not in UNCOUNTED]
        return ":".join(filter(None, ("needle", ",".join(filter(None, (kind, *pairs))))))


def _hint(word: str, known: Sequence[str]) -> str:
    return f"did you mean {' or '.join(get_close_matches(word, known, n=3) or known)}?"


def _read(spec: str, key: str, text: str) -> int:
    try:
        value: int = OPTIONS[key].read(text)
    except ValueError as cause:
        raise UsageError(f"{spec}: {key}={text!r:.80}", f"{key} is {OPTIONS[key].words}") from cause
    return value


def cases(words: str, setting: Setting) -> list[Case]:
    """Texts with facts in them, or lists of words, and their questions; `words` is what follows `needle:`.

    They are made of the documents given, else of the sample. Raises UsageError for words that are not known, and where
    a text has no room for its facts.
    """
    wanted = Wanted.parse(words)
    texts = setting.texts or [(SAMPLE, Path(__file__).with_name(SAMPLE).read_text(encoding="utf-8"))]
    every = [(name, text, copy) for copy in range(1, wanted.copies + 1) for name, text in texts][: setting.limit]
    found = []
    for kind, (name, text, copy) in product(wanted.kinds, every):
        label = wanted.label(kind)
        try:
            hay = _build(kind, text, wanted, setting.size, f"{setting.seed} {copy}")
        except UsageError as error:
            raise UsageError(f"--task {label}, {name}: {error.what}", error.why, error.fix) from error
        found.append(Case(label, f"{name}, copy {copy}", hay.text, hay.questions))
    return found


def facts(prose: str, n: int = 6, seed: int | str = 0) -> Haystack:
    """Hide n unlike facts in the prose: names and values are drawn from the seed, and occur nowhere else in the text.

    Raises UsageError if the prose has no room for n facts.
    """
    return _hide("", prose, n, seed)


def _hide(kind: str, prose: str, n: int | None, seed: int | str) -> Haystack:
    draw, usual = HIDDEN[kind]
    rng = Random(seed)
    return hide(prose, *draw(prose, n or usual, rng), rng)


def _list(kind: str, n: int, seed: str) -> Haystack:
    text, question = LISTS[kind](n, Random(seed))
    return Haystack(text, (question,), ())


def _build(kind: str, text: str, wanted: Wanted, size: Callable[[str], int], seed: str) -> Haystack:
    def measured(build: Callable[[], Haystack]) -> int:
        try:
            return size(build().text)
        except UsageError:  # too short; what is still too short in the end is built once more, and refused
            return 0

    if kind in LISTS:
        limit = wanted.tokens or size(text)
        return _list(kind, largest(limit, lambda n: measured(lambda: _list(kind, n, seed))), seed)
    if wanted.tokens:
        text = fit(text, wanted.tokens, lambda part: measured(lambda: _hide(kind, part, wanted.facts, seed)))
    return _hide(kind, text, wanted.facts, seed)
