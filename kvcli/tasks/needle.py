"""The needle task: facts hidden in running text, and the questions that find them; knows no model and no tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from random import Random

from ..errors import UsageError
from .scores import hit

VERSION = 1  # changes with any word below: hits of two versions do not compare


@dataclass(frozen=True)
class Question:
    """What is asked, how the answer starts, and the answer."""

    prompt: str
    prefix: str
    answer: str


@dataclass(frozen=True)
class Haystack:
    """A text, the questions about it, and the sentences that were hidden, in the order of the text."""

    text: str
    questions: tuple[Question, ...]
    facts: tuple[str, ...]


@dataclass(frozen=True)
class Template:
    """One sort of fact: `{key}` and `{value}` come from the pools, and what stands before the value is the prefix."""

    prompt: str
    fact: str
    keys: tuple[str, ...]
    values: tuple[str, ...]

    def fill(self, key: str, value: str) -> tuple[str, Question]:
        """The sentence and its question."""
        prefix = self.fact.split(" {value}")[0].format(key=key)
        return self.fact.format(key=key, value=value), Question(self.prompt.format(key=key), prefix, value)


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


_CITIES = _words("""
Lisbon Oslo Vienna Kyoto Lima Cairo Dublin Havana Nairobi Prague Quito Seville Tallinn Utrecht Zagreb Bergen Turin Riga
Madrid Lagos Warsaw Geneva Hamburg Bogota""")
_LANDS = _words("""
Patagonia Greenland Mongolia Tasmania Borneo Siberia Nepal Bolivia Ethiopia Finland Lapland Bhutan Namibia Iceland
Kamchatka Tibet Sumatra Ecuador Alaska Morocco""")
_FIRST = _words("""
Greta Boris Clara Dmitri Elena Farid Hugo Ingrid Jonas Keiko Leopold Mariam Nikolai Olga Pedro Rashid Sigrid Tamsin
Ulrich Vera Yusuf Zelda Amelia Bruno""")
_LAST = _words("""
Almeida Brandt Castellan Dufresne Eriksen Fontaine Galloway Hoffmann Ivanov Jansen Kowalski Lindqvist Moreau Novak
Okafor Petrov Quintero Rossi Schneider Takahashi Vasquez Winters Yamada Zimmer""")
_BOATS = _words("""
Marigold Dolphin Aurora Bluebell Cordelia Daydream Elvira Firefly Gondola Juniper Lorelei Mermaid Nomad Ophelia
Primrose Rosalind Serenade Tempest Undine Wanderer""")
_HOBBIES = _words("""
umbrellas feathers magnets notebooks telescopes blankets teapots stamps masks kites marbles fossils puppets hats dolls
medals postcards candles spoons seashells""")
_PLACES = _words(
    "windmill greenhouse lighthouse bakery observatory stable cinema orchard theatre smithy monastery dairy"
)
_COVERS = _words("flowerpot doormat bucket sundial barrel statue ladder wheelbarrow bench mailbox fountain carpet")
_SPICES = _words(
    "cinnamon saffron ginger nutmeg paprika vanilla garlic rosemary chocolate honey lemon mustard basil mint"
)
_FRUITS = _words(
    "papaya mango apricot pineapple banana cherry coconut grapefruit peach plum kiwi strawberry melon pear"
)
_COLOURS = _words("turquoise crimson maroon indigo purple orange yellow pink violet scarlet beige magenta lilac ivory")
_GOODS = tuple(
    f"{stuff} {thing}"
    for stuff in ("copper", "bamboo", "leather", "marble", "silver")
    for thing in ("kettle", "lamp", "chessboard", "bracelet", "flute", "mirror")
)
_TIMES = tuple(f"{hour}:{minute}" for hour in range(13, 24) for minute in range(11, 60))
_HUNDREDS = tuple(map(str, range(101, 1000)))
_THOUSANDS = tuple(map(str, range(1000, 10_000)))

TEMPLATES = (
    Template("What is the magic number of {key}?", "The magic number of {key} is {value}.", _CITIES, _THOUSANDS),
    Template(
        "When does the night train to {key} leave?", "The night train to {key} leaves at {value}.", _CITIES, _TIMES
    ),
    Template("What is the lot number of the {key}?", "The {key} is lot number {value}.", _GOODS, _HUNDREDS),
    Template("In which room does the map of {key} hang?", "The map of {key} hangs in room {value}.", _LANDS, _HUNDREDS),
    Template(
        "What colour is the rowing boat {key} painted?", "The rowing boat {key} is painted {value}.", _BOATS, _COLOURS
    ),
    Template("What is the hobby of Judge {key}?", "The hobby of Judge {key} is collecting {value}.", _LAST, _HOBBIES),
    Template(
        "What is the favourite fruit of Doctor {key}?",
        "The favourite fruit of Doctor {key} is the {value}.",
        _LAST,
        _FRUITS,
    ),
    Template(
        "What is the secret ingredient of the soup of {key}?",
        "The secret ingredient of the soup of {key} is {value}.",
        _FIRST,
        _SPICES,
    ),
    Template(
        "Under what is the spare key of the {key}?",
        "The spare key of the {key} is under the {value}.",
        _PLACES,
        _COVERS,
    ),
)


def facts(prose: str, n: int = 6, seed: int = 0) -> Haystack:
    """Hide n unlike facts behind sentences of the prose: evenly spread, jittered, names and values drawn from the seed.

    Each fact is a sentence of its own, added after a space; the prose around it stays as it is. No key and no answer
    occurs anywhere else in the text. Raises UsageError if the prose has no room for n facts.
    """
    if not 1 <= n <= len(TEMPLATES):
        raise UsageError(f"{n} facts: between 1 and {len(TEMPLATES)} unlike facts can be hidden")
    ends = _sentence_ends(prose)
    if len(ends) < n:
        raise UsageError(
            f"the text is too short to hide {n} facts", f"it has {len(ends)} sentence ends", "take a longer text"
        )
    rng, seen = Random(seed), prose
    sentences, questions = [], []
    for template in rng.sample(TEMPLATES, n):
        key = _unseen(template.keys, seen, rng)
        sentence, question = template.fill(key, _unseen(template.values, seen, rng))
        sentences.append(sentence)
        questions.append(question)
        seen += f" {sentence}"
    cuts = [rng.choice(ends[i * len(ends) // n : (i + 1) * len(ends) // n]) for i in range(n)]
    pieces = [prose[a:b] for a, b in zip([0, *cuts], [*cuts, len(prose)], strict=True)]
    text = pieces[0] + "".join(f" {fact}{piece}" for fact, piece in zip(sentences, pieces[1:], strict=True))
    return Haystack(text, tuple(questions), tuple(sentences))


def fit(prose: str, limit: int, size: Callable[[str], int] = lambda text: len(text.split())) -> str:
    """Whole paragraphs of the prose, over and again, for as long as their `size`, by default words, is within limit."""
    paragraphs = [part.strip() for part in re.split(r"\n\s*\n", prose) if part.strip()]
    taken: list[str] = []
    room = limit
    for paragraph in cycle(paragraphs):
        room -= size(f"{paragraph}\n\n")
        if room < 0:
            break
        taken.append(paragraph)
    if not taken:
        raise UsageError(f"no paragraph of the text fits in {limit}")
    return "\n\n".join(taken) + "\n"


def _sentence_ends(prose: str) -> list[int]:
    """Where a sentence surely ends: after a word of four letters, so that neither "Mrs." nor "7.4" is taken for one."""
    ends = re.finditer(r"(?<=[^\W\d_]{4}[.!?\u3002\uff01\uff1f])(?=\s+(\S)|$)", prose.rstrip())
    return [end.start() for end in ends if not (end[1] or "").islower()]


def _unseen(pool: tuple[str, ...], text: str, rng: Random) -> str:
    for word in rng.sample(pool, len(pool)):
        if not hit(text, word):
            return word
    raise UsageError("every name or value of a fact occurs in the text already", fix="take a shorter text")
