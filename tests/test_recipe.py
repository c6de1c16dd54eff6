"""Recipes: text to steps and what is refused, naming the part that is wrong."""

import pytest

from kvcli.errors import UsageError
from kvcli.recipe import Recipe


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
