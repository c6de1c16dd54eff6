"""Text <-> recipe: which score, allocation, reduction and encoding, each with its options."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from .budget import Budget
from .collect import collect_for
from .errors import UsageError
from .options import AtLeast0, Option
from .registry import KINDS, Kind, Stage, named

# Options of every recipe: the pipeline keeps the first and the newest tokens.
GENERIC = {"sink": Option.of(None, AtLeast0), "recent": Option.of(None, AtLeast0)}
DEFAULTS: dict[Kind, str] = {"allocate": "uniform", "reduce": "evict", "encode": "raw"}


def written(key: str, value: Any) -> str:
    """An option as a recipe has it."""
    return f"{key}={str(value).lower()}"


@dataclass(frozen=True)
class Step:
    """A stage with its options resolved."""

    stage: Stage
    options: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, *args: Any) -> Any:
        return self.stage(*args, **self.options)

    @property
    def text(self) -> str:
        """As it is written in a recipe."""
        return ":".join(filter(None, (self.stage.name, ",".join(map(written, self.options, self.options.values())))))

    def part(self, name: str, *args: Any) -> Any:
        """Call a function that the stage carries beside its own, such as `shapes`."""
        return self.stage.parts[name](*args, **self.options)

    @property
    def sizes_itself(self) -> bool:
        """Whether this is a score that says how many entries stay, so that no budget does."""
        return self.stage.sizes(**self.options)


@dataclass(frozen=True)
class Recipe:
    """Four steps. Without a score every entry stays, and only the encoding matters."""

    text: str
    score: Step | None
    allocate: Step
    reduce: Step
    encode: Step
    sink: int | None = None
    recent: int | None = None

    def __str__(self) -> str:
        return self.text

    @property
    def steps(self) -> list[Step]:
        """In the order of the pipeline."""
        return [step for step in (self.score, self.allocate, self.reduce, self.encode) if step]

    @property
    def needs(self) -> tuple[str, ...]:
        """Statistics some step reads."""
        return tuple(dict.fromkeys(need for step in self.steps for need in step.stage.needs))

    @property
    def profiles(self) -> tuple[str, ...]:
        """Methods whose profile of the model some step reads."""
        return tuple(dict.fromkeys(step.stage.name for step in self.steps if step.stage.profile))

    @property
    def takes_budget(self) -> bool:
        """Whether a budget says how much stays; else everything does, or the score's options say."""
        return self.score is not None and not self.score.sizes_itself

    def budgets(self, texts: Sequence[str]) -> list[Budget | None]:
        """What these budgets mean to the recipe: one plan each, or a single None where it takes none.

        Raises UsageError for text that is no budget, one too many, or one that is missing.
        """
        budgets = [Budget.parse(text) for text in texts]
        if not self.takes_budget:
            if budgets:
                why = "it keeps every entry" if self.score is None else "its options say how much stays"
                raise UsageError(f"{self} takes no --budget", why, "leave --budget out")
            return [None]
        if not budgets:
            raise UsageError(f"{self} needs a --budget", fix="35%, 0.35, 512 (entries a head) or 64MiB")
        if len({budget.text for budget in budgets}) < len(budgets):
            raise UsageError("the same budget is given twice")
        return list(budgets)

    @classmethod
    def parse(cls, text: str) -> "Recipe":
        """`name[:option=value,...]` joined by `+`; the first name to bring a kind of stage wins.

        `score=`, `allocate=`, `reduce=` or `encode=` before a name takes that stage only, and overrides.
        Raises UsageError naming the part that is wrong.
        """
        filled: dict[Kind, Step] = {}
        forced: dict[Kind, Step] = {}
        generic: dict[str, int] = {}
        words = "".join(text.split()).split("+")
        for word in words:
            kind, steps, common = _part(word)
            if unlike := [key for key, value in common.items() if generic.get(key, value) != value]:
                raise UsageError(f"--method {text!r}: option {unlike[0]} is given twice", "it is one for the recipe")
            generic.update(common)
            if kind:
                forced[kind] = steps[kind]
            else:
                filled = {**steps, **filled}
        return _assemble("+".join(words), {**filled, **forced}, generic)


def _assemble(text: str, steps: dict[Kind, Step], generic: dict[str, int]) -> Recipe:
    score = steps.get("score")
    if score is None and (lost := [kind for kind in KINDS[1:3] if kind in steps]):
        name = steps[lost[0]].stage.name
        raise UsageError(
            f"recipe {text!r} names no score", f"{name} needs one to work on", f"put one before it: snapkv+{name}"
        )
    if score and score.sizes_itself and "allocate" in steps:
        # The method's own allocation is for when a budget is given.
        if steps["allocate"].stage.after == score.stage.name:
            return _assemble(text, {kind: step for kind, step in steps.items() if kind != "allocate"}, generic)
        raise UsageError(
            f"recipe {text!r}: {score.text} fixes its own sizes",
            f"allocate {steps['allocate'].stage.name} would have nothing to share",
        )
    for step in steps.values():
        if step.stage.after and score and score.stage.name != step.stage.after:
            raise UsageError(
                f"recipe {text!r}: {step.stage.kind} {step.stage.name} does not fit score {score.stage.name}",
                f"it relies on what the score of {step.stage.after} means",
            )
    allocate, reduce, encode = (steps.get(kind) or _default(kind, name) for kind, name in DEFAULTS.items())
    return Recipe(text, score, allocate, reduce, encode, generic.get("sink"), generic.get("recent"))


def _default(kind: Kind, name: str) -> Step:
    stage = named(name)[kind]
    return Step(stage, {key: option.default for key, option in stage.options.items()})


def evicting(recipe: Recipe) -> Recipe:
    """The same recipe with plain eviction: what keeping everything comes to."""
    return replace(recipe, reduce=_default("reduce", DEFAULTS["reduce"]))


def _part(word: str) -> tuple[Kind | None, dict[Kind, Step], dict[str, int]]:
    head, _, tail = word.partition(":")
    before, equals, name = head.rpartition("=")
    kind: Kind | None = next((kind for kind in KINDS if kind == before), None)
    if (equals and kind is None) or not name:
        raise UsageError(f"--method: cannot read {word!r}", fix="write name:option=value, joined by +")
    stages = named(name)
    if kind:
        if kind not in stages:
            raise UsageError(f"--method {word!r}: {name} has no {kind}", f"it has {', '.join(stages)}")
        stages = {kind: stages[kind]}
    given = _pairs(word, tail)
    generic = {key: _value(word, key, given.pop(key), GENERIC[key]) for key in GENERIC if key in given}
    _check_names(word, name, stages, given)
    return kind, {kind: Step(stage, _resolve(word, stage, given)) for kind, stage in stages.items()}, generic


def _pairs(word: str, tail: str) -> dict[str, str]:
    pairs: dict[str, str] = {}
    for item in filter(None, tail.split(",")):
        key, equals, value = item.partition("=")
        if key in pairs:
            raise UsageError(f"--method {word!r}: option {key} is given twice")
        pairs[key] = value if equals else "true"
    return pairs


def _check_names(word: str, name: str, stages: Mapping[Kind, Stage], given: Mapping[str, str]) -> None:
    known = sorted({key for stage in stages.values() for key in stage.options} | set(GENERIC))
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=3) or known
            raise UsageError(f"--method {word!r}: {name} has no option {key!r}", f"did you mean {' or '.join(near)}?")


def _resolve(word: str, stage: Stage, given: Mapping[str, str]) -> dict[str, Any]:
    return {
        key: _value(word, key, given[key], option) if key in given else option.default
        for key, option in stage.options.items()
    }


def _value(word: str, key: str, text: str, option: Option) -> Any:
    try:
        return option.read(text)
    except ValueError as cause:
        raise UsageError(f"--method {word!r}: {key}={text!r:.80}", f"{key} is {option.words}") from cause


def split(texts: Iterable[str]) -> list[str]:
    """The recipes, budgets or tasks of lists with commas, in order.

    A comma begins a new one, unless `key=value` follows: that is one more option of the one before. What takes a single
    stage, such as `score=random`, is no option.
    """
    found: list[str] = []
    for text in texts:
        parts: list[str] = []
        for item in text.split(","):
            key = re.match(r"\s*(\w+)\s*=", item)
            if parts and key and key[1] not in KINDS:
                parts[-1] += f",{item}"
            else:
                parts.append(item)
        found += [part.strip() for part in parts]
    return found


Cell = tuple[Recipe, Budget | None]


def collect_of(cells: Iterable[Cell]) -> tuple[str, ...]:
    """What must be collected of a document for all of these, names of COLLECT."""
    return collect_for(need for recipe, _ in cells for need in recipe.needs)


def grid(methods: Iterable[str], budgets: Sequence[str], usual: str = "") -> list[Cell]:
    """Every recipe of these lists with every budget, once alone where it takes none; see `split`.

    usual: the budgets where none is given and some recipe takes one. Raises UsageError for what cannot be read, is
        given twice, or is a budget for recipes that all take none.
    """
    recipes, sizes = [Recipe.parse(text) for text in split(methods)], split(budgets)
    if twice := next((recipe for i, recipe in enumerate(recipes) if str(recipe) in map(str, recipes[:i])), None):
        raise UsageError(f"--method {twice} is given twice")
    some = any(recipe.takes_budget for recipe in recipes)
    sizes = sizes or split([usual] if usual and some else [])
    # Where no recipe takes a budget, the first says why.
    shared = [recipe.budgets(sizes if recipe.takes_budget or not some else []) for recipe in recipes]
    return [(recipe, budget) for recipe, mine in zip(recipes, shared, strict=True) for budget in mine]
