"""Lists of words, some of which occur far more often than the others, and the question which: RULER's counting."""

from itertools import count, cycle, islice, takewhile
from math import pi
from random import Random

from ..errors import UsageError
from .pools import NOUNS
from .task import Question

COMMON, RARE = 10, 100  # words; RULER has 30 of each common and 3 of each other one in a list of 600
FREQUENT = 3
ZETA2 = pi**2 / 6
SYLLABLES = tuple(a + b + c for a in "bdfgklmnprstvz" for b in "aeiou" for c in "lmnrst")


def common(n: int, rng: Random) -> tuple[str, Question]:
    """A numbered list of n words: ten take up half of it, a hundred share the rest; raises UsageError below 60."""
    times = n // (2 * COMMON)
    _need(times >= 3, n)
    drawn = rng.sample(NOUNS, COMMON + RARE)
    often, rare = drawn[:COMMON], drawn[COMMON:]
    listed = often * times + list(islice(cycle(rare), n - COMMON * times))
    rng.shuffle(listed)
    lead = "This is a numbered list of words. Some of the words occur far more often than the others.\n\n"
    text = lead + " ".join(f"{i}. {word}" for i, word in enumerate(listed, 1))
    asked = "Which ten words occur most often in the list?", "The ten words that occur most often in the list are:"
    return text, Question(*asked, tuple(often), ("matched",), 96)


def frequent(n: int, rng: Random) -> tuple[str, Question]:
    """n made-up words, the k-th of which takes up 1 / (zeta(2) k^2) of the text; raises UsageError below 100.

    The most frequent is no word but dots, as in RULER: three words are asked, the second to the fourth.
    """
    _need(n >= 100, n)
    counts = list(takewhile(bool, (int(n / ZETA2 / k**2) for k in count(1))))
    coded = ["...", *_coined(len(counts) - 1, rng)]
    listed = [word for word, times in zip(coded, counts, strict=True) for _ in range(times)]
    rng.shuffle(listed)
    lead = "This is a text in code. Some of its words occur more often than the others; the dots are no words.\n\n"
    asked = "Which three words occur most often in the text?", "The three words that occur most often in the text are:"
    return lead + " ".join(listed), Question(*asked, tuple(coded[1 : FREQUENT + 1]), ("matched",), 32)


def _coined(n: int, rng: Random) -> list[str]:
    """Made-up words, equally long: none is part of another."""
    made: dict[str, None] = {}
    while len(made) < n:
        made[rng.choice(SYLLABLES) + rng.choice(SYLLABLES)] = None
    return list(made)


def _need(enough: bool, n: int) -> None:
    if not enough:
        raise UsageError(f"{n} words are too few for some to stand out", fix="take a longer text")
