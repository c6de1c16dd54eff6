"""Facts to hide and the questions that find them, by kind: those of RULER (arXiv:2404.06654) in plain English."""

from collections.abc import Sequence
from itertools import pairwise
from random import Random

from ..errors import UsageError
from .pools import MAGIC, NOUNS, NUMBERS, TEMPLATES, unseen
from .task import Question

Facts = tuple[list[str], list[Question]]  # sentences in the order they are hidden in, and what is asked
LIKE = 3  # facts of one shape for each that is asked
VALUES = 4  # of one key
HOPS = 4  # from the name that is given a value to the last that holds it


def unlike(text: str, n: int, rng: Random) -> Facts:
    """n facts of different sorts, each asked; raises UsageError for more than there are sorts."""
    if not 1 <= n <= len(TEMPLATES):
        raise UsageError(f"{n} facts: between 1 and {len(TEMPLATES)} unlike facts can be hidden")
    filled = []
    for template in rng.sample(TEMPLATES, n):
        key = unseen(template.keys, text, rng)
        filled.append(template.fill(key, unseen(template.values, f"{text} {key}", rng)))
        text += f" {filled[-1][0]}"
    return [sentence for sentence, _ in filled], [question for _, question in filled]


def single(text: str, n: int, rng: Random) -> Facts:
    """One fact."""
    return _like(text, 1, rng)


def keys(text: str, n: int, rng: Random) -> Facts:
    """Facts of one shape, of which n are asked: the others are there to be mistaken for them."""
    sentences, questions = _like(text, n * LIKE, rng)
    return sentences, [questions[i] for i in sorted(rng.sample(range(n * LIKE), n))]


def _like(text: str, n: int, rng: Random) -> Facts:
    pairs = zip(_several(MAGIC.keys, n, text, rng), _several(MAGIC.values, n, text, rng), strict=True)
    filled = [MAGIC.fill(*pair, "matched") for pair in pairs]
    return [sentence for sentence, _ in filled], [question for _, question in filled]


def values(text: str, n: int, rng: Random) -> Facts:
    """n keys of several values each, mixed; the values of a key are asked all at once."""
    names, numbers = _several(NOUNS, n, text, rng), _several(NUMBERS, n * VALUES, text, rng)
    sentences = [f"One of the magic numbers of the {names[i % n]} is {number}." for i, number in enumerate(numbers)]
    rng.shuffle(sentences)
    prompt, prefix = "What are all the magic numbers of the {}?", "The magic numbers of the {} are"
    return sentences, [_all(prompt, prefix, name, numbers[i::n]) for i, name in enumerate(names)]


def variables(text: str, n: int, rng: Random) -> Facts:
    """n chains of names that hand on a value, mixed, each in its order; a chain's names are asked all at once."""
    numbers, names = _several(NUMBERS, n, text, rng), _several(NOUNS, n * (HOPS + 1), text, rng)
    chains = [[number, *map(str.upper, names[i::n])] for i, number in enumerate(numbers)]
    order = [i for i in range(n) for _ in range(HOPS + 1)]
    rng.shuffle(order)
    steps = [pairwise(chain) for chain in chains]
    sentences = ["The variable {1} is set to {0}.".format(*next(steps[i])) for i in order]
    prompt, prefix = "Which variables are set to {}?", "The variables that are set to {} are the variable"
    return sentences, [_all(prompt, prefix, number, names) for number, *names in chains]


def _all(prompt: str, prefix: str, key: str, answer: list[str]) -> Question:
    return Question(prompt.format(key), prefix.format(key), tuple(answer), ("matched",), 64)


def _several(pool: Sequence[str], n: int, text: str, rng: Random) -> list[str]:
    """n of the pool that are no part of the text or of one another."""
    found: list[str] = []
    for _ in range(n):
        found.append(unseen(pool, " ".join([text, *found]), rng))
    return found
