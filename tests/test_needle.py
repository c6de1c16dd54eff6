"""Hidden facts: seeded, unlike, each once, the prose around them untouched, and answers counted as whole words."""

import json
from itertools import pairwise
from pathlib import Path

import pytest

from kvcli.errors import UsageError
from kvcli.tasks.hay import Haystack
from kvcli.tasks.needle import facts
from kvcli.tasks.pools import TEMPLATES
from kvcli.tasks.scores import hit

SAMPLES = Path(__file__).parent.parent / "samples"
PROSE = (SAMPLES / "harbour.txt").read_text(encoding="utf-8")
SHORT = (SAMPLES / "short.txt").read_text(encoding="utf-8")
SEEDS = range(20)


def without(hay: Haystack) -> str:
    text = hay.text
    for fact in hay.facts:
        text = text.replace(f" {fact}", "", 1)
    return text


def test_a_seed_is_a_haystack() -> None:
    assert facts(PROSE, seed=3) == facts(PROSE, seed=3)
    assert len({question for seed in SEEDS for question in facts(PROSE, seed=seed).questions}) > 5 * len(SEEDS)


def test_version_2_stays_as_it_is() -> None:
    assert facts(SHORT, 3).facts == (
        "The favourite fruit of Doctor Ivanov is the peach.",
        "The spare key of the orchard is under the wheelbarrow.",
        "The magic number of Prague is 8808.",
    )


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("n", [1, 6, len(TEMPLATES)])
def test_facts_stand_once_in_untouched_prose(n: int, seed: int) -> None:
    hay = facts(PROSE, n, seed)
    assert len(hay.facts) == len(hay.questions) == n
    assert [hay.text.count(fact) for fact in hay.facts] == [1] * n
    assert without(hay) == PROSE
    places = [hay.text.index(fact) for fact in hay.facts]
    assert places == sorted(places)
    assert all(hay.text[place - 2] in ".!?" for place in places)


@pytest.mark.parametrize("seed", SEEDS)
def test_facts_are_spread_over_the_text(seed: int) -> None:
    hay = facts(PROSE, 6, seed)
    places = [hay.text.index(fact) / len(hay.text) for fact in hay.facts]
    assert places[0] < 0.3
    assert places[-1] > 0.7
    assert max(b - a for a, b in pairwise(places)) < 0.45


@pytest.mark.parametrize(("length", "bare"), [(None, 500), (3000, 370)])
def test_the_end_holds_no_fact(length: int | None, bare: int) -> None:
    """Every method keeps the newest tokens: a fact among them would measure nothing."""
    for seed in SEEDS:
        hay = facts(PROSE[:length], 6, seed)
        assert len(hay.text.split(hay.facts[-1])[1].rstrip()) >= bare


@pytest.mark.parametrize("seed", SEEDS)
def test_facts_are_unlike_and_their_answers_unique(seed: int) -> None:
    hay = facts(PROSE, len(TEMPLATES), seed)
    assert len({fact.split()[1] + fact.split()[-2] for fact in hay.facts}) == len(TEMPLATES)
    for fact, question in zip(hay.facts, hay.questions, strict=True):
        assert fact.startswith(f"{question.prefix} {question.answer[0]}")
        assert question.metrics == ("hit",)
        assert hit(fact, question.answer)
        assert not hit(hay.text.replace(fact, ""), question.answer)
        assert not hit(question.prompt + question.prefix, question.answer)


def test_a_sentence_is_never_split() -> None:
    prose = 'Mrs. Low paid 7.4 pounds, etc. "Was it dear?" she asked then. It was e.g. Tuesday.\n\nA title at the end'
    hays = [facts(prose, 1, seed) for seed in SEEDS]
    assert {hay.text[: hay.text.index(hay.facts[0])] for hay in hays} == {
        prose[: prose.index(end) + len(end)] + " " for end in ("then.", "Tuesday.")
    }


def test_chinese_sentences_end_without_a_space() -> None:
    prose = "渡轮在春天停航。“为什么停航。”他说。没有人回答。" * 3
    cuts = {hay.text.index(hay.facts[0]) - 1 for hay in (facts(prose, 1, seed) for seed in SEEDS)}
    assert cuts <= {i + 1 for i, char in enumerate(prose) if char == "。" and prose[i + 1 : i + 2] != "”"}
    assert len(cuts) > 3


def test_too_short_a_text_is_refused() -> None:
    with pytest.raises(UsageError, match="too short to hide 6 facts"):
        facts("Only this sentence. And another.")
    with pytest.raises(UsageError, match="too short"):
        facts("", 1)
    with pytest.raises(UsageError, match="unlike"):
        facts(PROSE, len(TEMPLATES) + 1)


@pytest.mark.parametrize(
    ("text", "answer", "found"),
    [
        (" kestrel.", "Kestrel", True),
        ("the Kestrels", "Kestrel", False),
        ("Straße", "STRASSE", True),
        ("the fuel berth, which", "fuel berth", True),
        ("4817.", "4817", True),
        ("it is 48,000 or 1.48 or 148", "48", False),
        ("at 17:52", "17:52", True),
        ("17:52", "17", False),
        ("C++ (and C)", "C++", True),
        ("a brown fox", ["dog", "fox"], True),
        ("首都是北京。", "北京", True),
        ("答えは2019年です", "2019", True),
        ("답은 서울이다", "서울", True),
        ("a fox", " fox ", True),
        ("a brown fox", [], False),
    ],
)
def test_hits_are_whole_words(text: str, answer: str | list[str], found: bool) -> None:
    assert hit(text, answer) is found


def test_the_sample_answers_its_questions() -> None:
    rows = [json.loads(line) for line in (SAMPLES / "questions.jsonl").read_text().splitlines()]
    assert 8 <= len(rows) <= 12
    assert all(hit(PROSE, row["answer"]) and not hit(row["prompt"] + row["prefix"], row["answer"]) for row in rows)
