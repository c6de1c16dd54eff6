"""Sentences that state a fact, the names and values that fill them, and the law of a draw: nothing that is there."""

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ..errors import UsageError
from .task import Question


@dataclass(frozen=True)
class Template:
    """One sort of fact: `{key}` and `{value}` come from the pools, and what stands before the value is the prefix."""

    prompt: str
    fact: str
    keys: Sequence[str]
    values: Sequence[str]

    def fill(self, key: str, value: str, metric: str = "hit") -> tuple[str, Question]:
        """The sentence and its question."""
        prefix = self.fact.split(" {value}")[0].format(key=key)
        return self.fact.format(key=key, value=value), Question(
            self.prompt.format(key=key), prefix, (value,), (metric,)
        )


def words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


CITIES = words("""
Lisbon Oslo Vienna Kyoto Lima Cairo Dublin Havana Nairobi Prague Quito Seville Tallinn Utrecht Zagreb Bergen Turin Riga
Madrid Lagos Warsaw Geneva Hamburg Bogota""")
LANDS = words("""
Patagonia Greenland Mongolia Tasmania Borneo Siberia Nepal Bolivia Ethiopia Finland Lapland Bhutan Namibia Iceland
Kamchatka Tibet Sumatra Ecuador Alaska Morocco""")
FIRST = words("""
Greta Boris Clara Dmitri Elena Farid Hugo Ingrid Jonas Keiko Leopold Mariam Nikolai Olga Pedro Rashid Sigrid Tamsin
Ulrich Vera Yusuf Zelda Amelia Bruno""")
LAST = words("""
Almeida Brandt Castellan Dufresne Eriksen Fontaine Galloway Hoffmann Ivanov Jansen Kowalski Lindqvist Moreau Novak
Okafor Petrov Quintero Rossi Schneider Takahashi Vasquez Winters Yamada Zimmer""")
BOATS = words("""
Marigold Dolphin Aurora Bluebell Cordelia Daydream Elvira Firefly Gondola Juniper Lorelei Mermaid Nomad Ophelia
Primrose Rosalind Serenade Tempest Undine Wanderer""")
HOBBIES = words("""
umbrellas feathers magnets notebooks telescopes blankets teapots stamps masks kites marbles fossils puppets hats dolls
medals postcards candles spoons seashells""")
PLACES = words("windmill greenhouse lighthouse bakery observatory stable cinema orchard theatre smithy monastery dairy")
COVERS = words("flowerpot doormat bucket sundial barrel statue ladder wheelbarrow bench mailbox fountain carpet")
SPICES = words(
    "cinnamon saffron ginger nutmeg paprika vanilla garlic rosemary chocolate honey lemon mustard basil mint"
)
FRUITS = words("papaya mango apricot pineapple banana cherry coconut grapefruit peach plum kiwi strawberry melon pear")
COLOURS = words("turquoise crimson maroon indigo purple orange yellow pink violet scarlet beige magenta lilac ivory")
GOODS = tuple(
    f"{stuff} {thing}"
    for stuff in ("copper", "bamboo", "leather", "marble", "silver")
    for thing in ("kettle", "lamp", "chessboard", "bracelet", "flute", "mirror")
)
TIMES = tuple(f"{hour}:{minute}" for hour in range(13, 24) for minute in range(11, 60))
HUNDREDS = tuple(map(str, range(101, 1000)))
THOUSANDS = tuple(map(str, range(1000, 10_000)))
NUMBERS = tuple(map(str, range(10_000, 100_000)))  # equally long: none is part of another

# None of these is part of another, so that an answer cannot hold one by chance.
NOUNS = words("""
acorn anchor apron arrow attic badge balcony basket beetle blanket bonnet bottle bracket branch brick bridge bubble
button cabin camel canyon carrot castle cellar chapel cherry circle clover compass copper coral cotton cradle curtain
dagger desert dragon drum eagle engine falcon feather fence ferry finger flame forest galaxy garden giant glacier
goblet guitar hammer harvest helmet hollow horizon island jacket jewel jungle kettle kitten ladder lantern leopard
lobster magnet mantle meadow mirror monkey mountain napkin needle nephew onion orchid oyster paddle palace parrot
pebble pepper pillow pirate planet pocket pumpkin puzzle quarry rabbit ribbon river rocket saddle salmon scarf
shadow shovel sister spider squirrel stable summit tailor thunder ticket tiger tunnel turtle valley velvet violin
wagon walnut whistle window wizard zebra""")

TEMPLATES = (
    Template("What is the magic number of {key}?", "The magic number of {key} is {value}.", CITIES, THOUSANDS),
    Template("When does the night train to {key} leave?", "The night train to {key} leaves at {value}.", CITIES, TIMES),
    Template("What is the lot number of the {key}?", "The {key} is lot number {value}.", GOODS, HUNDREDS),
    Template("In which room does the map of {key} hang?", "The map of {key} hangs in room {value}.", LANDS, HUNDREDS),
    Template(
        "What colour is the rowing boat {key} painted?", "The rowing boat {key} is painted {value}.", BOATS, COLOURS
    ),
    Template("What is the hobby of Judge {key}?", "The hobby of Judge {key} is collecting {value}.", LAST, HOBBIES),
    Template(
        "What is the favourite fruit of Doctor {key}?",
        "The favourite fruit of Doctor {key} is the {value}.",
        LAST,
        FRUITS,
    ),
    Template(
        "What is the secret ingredient of the soup of {key}?",
        "The secret ingredient of the soup of {key} is {value}.",
        FIRST,
        SPICES,
    ),
    Template(
        "Under what is the spare key of the {key}?",
        "The spare key of the {key} is under the {value}.",
        PLACES,
        COVERS,
    ),
)
MAGIC = Template("What is the magic number of the {key}?", "The magic number of the {key} is {value}.", NOUNS, NUMBERS)


def unseen(pool: Sequence[str], text: str, rng: Random) -> str:
    """One of the pool that is no part of the text, whatever its case; raises UsageError if each is."""
    start, low = rng.randrange(len(pool)), text.casefold()
    for i in range(len(pool)):
        word = pool[(start + i) % len(pool)]
        if word.casefold() not in low:
            return word
    raise UsageError("every name or value of a fact occurs in the text already", fix="take a shorter text")
