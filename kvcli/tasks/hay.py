"""Prose to hide facts in: where a sentence ends, how much of the prose to take, and the facts put between sentences."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random

from ..errors import UsageError
from .task import Question

# Every method keeps the newest entries, and windows of the last queries look at them: a fact there measures nothing.
BARE = 500  # characters at the end without a fact, an eighth of a short text


@dataclass(frozen=True)
class Haystack:
    """A text, the questions about it, and the sentences that were hidden, in the order of the text."""

    text: str
    questions: tuple[Question, ...]
    facts: tuple[str, ...]


def hide(prose: str, sentences: Sequence[str], questions: Sequence[Question], rng: Random) -> Haystack:
    """Put the sentences behind sentences of the prose: evenly spread, jittered, none near the end.

    Each is added after a space; the prose around it stays as it is. Raises UsageError if the prose has no room for all.
    """
    n, ends = len(sentences), places(prose)
    if len(ends) < n:
        why = f"it has {len(ends)} sentence ends, those near its end left out"
        raise UsageError(f"the text is too short to hide {n} facts", why, "take a longer text")
    cuts = [rng.choice(ends[i * len(ends) // n : (i + 1) * len(ends) // n]) for i in range(n)]
    pieces = [prose[a:b] for a, b in zip([0, *cuts], [*cuts, len(prose)], strict=True)]
    text = pieces[0] + "".join(f" {fact}{piece}" for fact, piece in zip(sentences, pieces[1:], strict=True))
    return Haystack(text, tuple(questions), tuple(sentences))


def places(prose: str) -> list[int]:
    """Where a fact may stand."""
    length = len(prose.rstrip())
    return [end for end in _sentence_ends(prose) if end <= length - min(BARE, length // 8)]


def fit(prose: str, limit: int, size: Callable[[str], int] = lambda text: len(text.split())) -> str:
    """Whole sentences of the prose, over and again, as many as have a `size`, by default in words, within limit."""
    prose = prose.strip()
    ends = _sentence_ends(prose)

    def start(n: int) -> str:
        rounds, last = divmod(n - 1, len(ends))
        return f"{prose}\n\n" * rounds + prose[: ends[last]]

    n = largest(limit, lambda n: size(start(n))) if ends else 0
    if not n:
        raise UsageError(f"no sentence of the text fits in {limit}")
    return start(n)


def largest(limit: int, size: Callable[[int], int]) -> int:
    """The largest n whose size is within limit, 0 if there is none; n things have a size of n or more.

    Doubling comes first: what is far larger than the limit is not built.
    """
    high = 1
    while high <= limit and size(high) <= limit:
        high *= 2
    low = high // 2
    return low + bisect_right(range(low + 1, high), limit, key=size)


def _sentence_ends(prose: str) -> list[int]:
    """Where a sentence surely ends: after a word of four letters, so that neither "Mrs." nor "7.4" is taken for one.

    Chinese and Japanese put no space behind their full stop, and use it for nothing else.
    """
    ends = re.finditer(r"(?<=[^\W\d_]{4}[.!?])(?=\s+(\S)|$)|(?<=[\u3002\uff01\uff1f])(?=[\w\s]|$)", prose.rstrip())
    return [end.start() for end in ends if not (end[1] or "").islower()]
