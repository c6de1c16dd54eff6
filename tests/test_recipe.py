"""Recipes: text to steps and what is refused, naming the part that is wrong."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as some

from kvcli.errors import UsageError
from kvcli.options import Option
from kvcli.recipe import GENERIC, Recipe, grid, split, written
from kvcli.registry import KINDS, Stage
from kvcli.registry import stages as registered


def stages(text: str) -> tuple[str, ...]:
    recipe = Recipe.parse(text)
    steps = (recipe.score, recipe.allocate, recipe.reduce, recipe.encode)
    return tuple(step.stage.name if step else "" for step in steps)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("snapkv", ("snapkv", "uniform", "evict", "raw")),
        ("snapkv+adakv", ("snapkv", "adakv", "evict", "raw")),
        ("kvmerger", ("kvmerger", "uniform", "kvmerger", "raw")),
        ("kvmerger+adakv", ("kvmerger", "adakv", "kvmerger", "raw")),
        ("snapkv+random", ("snapkv", "uniform", "evict", "raw")),
        ("score=random+snapkv", ("random", "uniform", "evict", "raw")),
        ("kvmerger+reduce=evict", ("kvmerger", "uniform", "evict", "raw")),
        ("raw", ("", "uniform", "evict", "raw")),
    ],
)
def test_the_first_name_to_bring_a_stage_wins(text: str, expected: tuple[str, ...]) -> None:
    assert stages(text) == expected
    assert str(Recipe.parse(text)) == text


def test_options_are_typed_by_their_defaults() -> None:
    recipe = Recipe.parse("snapkv:window=16,kernel=5,pool=avg,sink=2,recent=8+adakv:floor=0.5")
    assert recipe.score is not None
    assert dict(recipe.score.options) == {"window": 16, "kernel": 5, "pool": "avg"}
    assert dict(recipe.allocate.options) == {"floor": 0.5}
    assert (recipe.sink, recipe.recent) == (2, 8)
    assert recipe.needs == ("q_last",)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("snapkw", "snapkv"),
        ("", "cannot read"),
        ("snapkv:windw=3", "window"),
        ("snapkv:window=x", "whole number"),
        ("adakv:floor=x+snapkv", "a number"),
        ("snapkv:pool=sum", "max or avg"),
        ("snapkv:window=1,window=2", "twice"),
        ("adakv", "no score"),
        ("reduce=kvmerger", "no score"),
        ("encode=snapkv", "has no encode"),
        ("middle=snapkv", "cannot read"),
        ("snapkv+reduce=kvmerger", "does not fit"),
        ("snapkv:sink=-1", "0 or more"),
    ],
)
def test_what_is_wrong_is_named(text: str, says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.parse(text)
    assert says in "\n".join(caught.value.lines())


def values(option: Option) -> some.SearchStrategy[Any]:
    number = some.integers(-3, 99) if option.kind is int else some.floats(-2, 2).map(lambda x: round(x, 3))
    words = [some.sampled_from(option.choices)] if option.choices else []
    return some.one_of(*words, some.booleans() if option.kind is bool else number, some.none())


@some.composite
def parts(draw: some.DrawFn, stage: Stage) -> str:
    """A stage with some of its options and of those of every recipe, as it is written."""
    options = {**stage.options, **GENERIC}
    chosen = draw(some.lists(some.sampled_from(sorted(options)), unique=True))
    said = ",".join(written(key, draw(values(options[key]))) for key in chosen)
    return draw(some.sampled_from(["", f"{stage.kind}="])) + stage.name + (f":{said}" if said else "")


recipes = some.lists(some.sampled_from(registered()).flatmap(parts), min_size=1, max_size=3).map("+".join)


@settings(max_examples=50, deadline=None)
@given(some.lists(some.lists(recipes, min_size=1, max_size=4), min_size=1, max_size=3), some.sampled_from([",", ", "]))
def test_a_list_with_commas_is_split_into_what_was_joined(groups: list[list[str]], comma: str) -> None:
    assert split([comma.join(group) for group in groups]) == [recipe for group in groups for recipe in group]


def test_no_option_is_called_as_a_kind_of_stage() -> None:
    assert not {*KINDS} & {key for stage in registered() for key in stage.options}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["kvmerger,snapkv:window=16,kernel=5,h2o"], ["kvmerger", "snapkv:window=16,kernel=5", "h2o"]),
        (["snapkv+adakv:floor=0.5,kernel=5", "h2o"], ["snapkv+adakv:floor=0.5,kernel=5", "h2o"]),
        (["h2o,score=random+snapkv,sink=2"], ["h2o", "score=random+snapkv,sink=2"]),
        (["50%, 35%", "64MiB"], ["50%", "35%", "64MiB"]),
        (["needle,qa:rows.jsonl"], ["needle", "qa:rows.jsonl"]),
        (["window=3,h2o"], ["window=3", "h2o"]),
        (["h2o,,snapkv,"], ["h2o", "", "snapkv", ""]),
        ([], []),
    ],
)
def test_where_a_comma_begins_a_new_one(texts: list[str], expected: list[str]) -> None:
    assert split(texts) == expected


def test_a_grid_is_every_recipe_with_every_budget_it_takes() -> None:
    cells = grid(["h2o,raw", "kvmerger:epsilon=0.75", "snapkv"], ["50%,64", "1MiB"])
    found = [(str(recipe), budget and budget.text) for recipe, budget in cells]
    each = ["50%", "64", "1MiB"]
    alone = [("raw", None), ("kvmerger:epsilon=0.75", None)]
    assert found == [*(("h2o", text) for text in each), *alone, *(("snapkv", text) for text in each)]


@pytest.mark.parametrize(
    ("methods", "budgets", "says"),
    [
        (["h2o,snapkv,h2o"], ["50%"], "given twice"),
        (["h2o"], ["50%,20%,50%"], "given twice"),
        (["h2o,"], ["50%"], "cannot read"),
        (["h2o"], ["50%,"], "is not a budget"),
        (["h2o"], [], "needs a --budget"),
        (["raw"], ["50%"], "takes no --budget"),
    ],
)
def test_a_grid_that_cannot_be_meant(methods: list[str], budgets: list[str], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        grid(methods, budgets)
