"""What users may write: options by their annotations, and any text as a recipe or a budget."""

from typing import Literal

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvcli.budget import Budget
from kvcli.errors import UsageError
from kvcli.options import AtLeast0, Odd, Option, Positive, Share, options_of
from kvcli.recipe import GENERIC, Recipe
from kvcli.registry import stages


def sample(
    *,
    word: Literal["a", "b"] = "a",
    flag: bool = False,
    width: Literal["mean", "rms"] | Positive = "mean",
    limit: float | None = None,
    share: Share = 0.5,
    count: AtLeast0 = 0,
    odd: Odd = 1,
) -> None:
    """A function with one option of every kind."""


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("word", "b", "b"),
        ("flag", "true", True),
        ("flag", "false", False),
        ("width", "rms", "rms"),
        ("width", "5", 5.0),
        ("limit", "0.75", 0.75),
        ("limit", "-2", -2.0),
        ("limit", "none", None),
        ("share", "1", 1.0),
        ("count", "0", 0),
        ("odd", "7", 7),
    ],
)
def test_an_option_is_read_by_its_annotation(key: str, text: str, value: object) -> None:
    read = options_of(sample)[key].read(text)
    assert read == value and type(read) is type(value)


@pytest.mark.parametrize(
    ("key", "texts", "words"),
    [
        ("word", "c A true", "a or b"),
        ("flag", "1 yes True", "true or false"),
        ("width", "0 -1 nan inf 1e999 median", "mean, rms or a number above 0"),
        ("limit", "nan -inf None x", "a number or none"),
        ("share", "-0.1 1.01 nan", "a number from 0 to 1"),
        ("count", "-1 0.5 1e3 99999999999999999999999 2147483648", "a whole number, 0 or more"),
        ("odd", "0 2 -1", "an odd whole number, 1 or more"),
    ],
)
def test_anything_else_is_refused_in_words(key: str, texts: str, words: str) -> None:
    for text in [*texts.split(), "", "9" * 5000]:
        with pytest.raises(ValueError):
            print(options_of(sample)[key].read(text))
    assert options_of(sample)[key].words == words


def test_an_annotation_that_is_no_option_fails_at_registration() -> None:
    with pytest.raises(ValueError, match="cannot be"):
        Option.of([], list[int])


def test_every_default_can_be_written_and_read_again() -> None:
    for stage in stages():
        for key, option in stage.options.items():
            assert option.read(str(option.default).lower()) == option.default, f"{stage.name}:{key}"


NAMES = sorted({stage.name for stage in stages()})
KEYS = sorted({key for stage in stages() for key in stage.options} | set(GENERIC))
NUMBERS = st.one_of(st.integers(), st.floats(), st.integers(10**30, 10**40)).map(str)
VALUES = st.one_of(NUMBERS, st.text(max_size=4), st.sampled_from(["none", "true", "mean", "9" * 5000, "²", "\u0661"]))
OPTIONS = st.lists(st.tuples(st.sampled_from(KEYS), VALUES).map("=".join), max_size=3).map(",".join)
WORDS = st.tuples(st.sampled_from([*NAMES, "snapkw", "", "score=random", "encode=raw"]), OPTIONS).map(":".join)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.lists(WORDS, min_size=1, max_size=3).map("+".join)))
@example("snapkv:kernel=99999999999999999999999")
@example("kvmerger:sink=\ud800")
def test_any_text_is_a_recipe_or_a_usage_error(text: str) -> None:
    try:
        recipe = Recipe.parse(text)
    except UsageError as error:
        assert len(error.lines()) >= 1
    else:
        assert str(Recipe.parse(str(recipe))) == str(recipe)


@settings(deadline=None, max_examples=300)
@given(st.one_of(st.text(), st.tuples(NUMBERS, st.sampled_from(["", "%", "B", "MiB", " kb"])).map("".join)))
@example("9" * 5000 + "%")
@example("9" * 5000)
@example("²%")
@example("\u0661\u0662%")
@example("0." + "0" * 30 + "1%")
def test_any_text_is_a_budget_or_a_usage_error(text: str) -> None:
    try:
        budget = Budget.parse(text)
    except UsageError as error:
        assert "--budget" in error.what
    else:
        sizes = (budget.share, budget.tokens, budget.bytes)
        assert [size for size in sizes if size is not None] and all(size is None or size > 0 for size in sizes)
