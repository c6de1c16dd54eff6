"""Scores of answers: their laws, against implementations written another way, and worked by hand."""

import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.errors import InfeasibleError
from kvcli.tasks import scores
from kvcli.tasks.scores import SCORES, label
from kvcli.tasks.task import Question

# An answer that each metric can judge; any text else.
RIGHT = {
    "retrieval": "Paragraph 12",
    "count": "12",
    "accuracy": "(B) red",
    "exp_similarity": "35%",
    "concordance": "2, 1, 3",
}
WORDS = st.lists(st.sampled_from("ab cd ef gh ij kl".split()), max_size=8).map(" ".join)
ANY = st.text("The a,.3%AB#`/-\n\x00\x1b é北京。段落\U0001f419", max_size=20) | WORDS


def asked(*answers: str) -> Question:
    return Question("", answer=answers, classes=("cat", "wild cat", "dog", *answers))


def score(metric: str, text: str, *answers: str) -> float:
    return SCORES[metric](text, asked(*answers))


@pytest.mark.parametrize("metric", SCORES)
def test_the_answer_itself_is_right_and_silence_is_wrong(metric: str) -> None:
    answer = RIGHT.get(metric, "red lions and dogs")
    assert score(metric, answer, answer) == pytest.approx(1, abs=1e-8)
    assert score(metric, "", answer) == 0
    assert score(metric, answer) == 0


@pytest.mark.parametrize("metric", SCORES)
@settings(max_examples=30, deadline=None)
@given(text=ANY, one=ANY, other=ANY)
def test_scores_lie_between_0_and_1_and_a_further_answer_never_lowers_them(
    metric: str, text: str, one: str, other: str
) -> None:
    first, both = score(metric, text, one), score(metric, text, one, other)
    assert 0 <= first <= 1 and 0 <= both <= 1
    assert both >= first or metric in ("matched", "classification")  # a share, and here two classes more


@pytest.mark.parametrize("metric", ["em", "f1", "f1_zh", "rouge1", "rouge2", "rougeL"])
@settings(max_examples=30, deadline=None)
@given(a=WORDS, b=WORDS)
def test_what_weighs_both_texts_alike_is_symmetric(metric: str, a: str, b: str) -> None:
    assert score(metric, a, b) == pytest.approx(score(metric, b, a))


@settings(deadline=None)
@given(st.text("aB.! the\n", max_size=16), st.text("aB.! the\n", max_size=16))
def test_f1_is_the_harmonic_mean_of_precision_and_recall(text: str, answer: str) -> None:
    def words(text: str) -> list[str]:
        kept = text.lower().translate(dict.fromkeys(map(ord, ".!")))
        return [word for word in kept.split() if word not in ("a", "the")]

    said, wanted = words(text), words(answer)
    left = list(wanted)
    same = [left.remove(word) for word in said if word in left]
    precision, recall = len(same) / max(1, len(said)), len(same) / max(1, len(wanted))
    assert score("f1", text, answer) == pytest.approx(2 * precision * recall / max(1e-9, precision + recall))
    assert score("em", text, answer) == (said == wanted)


def common(a: list[str], b: list[str]) -> int:
    """Length of the longest common subsequence, by its definition."""
    found = (n for n in range(len(a), 0, -1) for part in combinations(a, n) if inside(part, b))
    return next(found, 0)


def inside(part: tuple[str, ...], whole: list[str]) -> bool:
    rest = iter(whole)
    return all(word in rest for word in part)


@settings(max_examples=40, deadline=None)
@given(WORDS, WORDS)
def test_rouge_is_the_f1_of_what_is_in_common(text: str, answer: str) -> None:
    a, b = text.split(), answer.split()
    for kind, n in (("rouge1", 1), ("rouge2", 2)):
        said, wanted = (Counter(zip(*(one[i:] for i in range(n)), strict=False)) for one in (a, b))
        both = sum(min(said[gram], wanted[gram]) for gram in said)
        assert score(kind, text, answer) == pytest.approx(2 * both / max(1, said.total() + wanted.total()))
    assert score("rougeL", text, answer) == pytest.approx(2 * common(a, b) / max(1, len(a) + len(b)))
    product = score("rouge1", text, answer) * score("rouge2", text, answer) * score("rougeL", text, answer)
    assert score("rouge_gm", text, answer) ** 3 == pytest.approx(product)
    if len(set(a)) == len(a) and len(set(b)) == len(b) and a and b:  # the package `rouge` counts a word once
        assert score("rouge", text, answer) == pytest.approx(2 * common(a, b) / (len(a) + len(b)), abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(st.text("abcd", max_size=8), st.text("abcd", max_size=8))
def test_code_is_alike_by_its_common_letters(text: str, answer: str) -> None:
    share = 2 * common(list(text), list(answer)) / (len(text) + len(answer)) if text or answer else 1
    assert score("code_sim", text, answer) == round(100 * share) / 100


@given(st.permutations(range(1, 7)), st.permutations(range(1, 7)))
def test_concordance_is_the_share_of_pairs_in_order(said: list[int], right: list[int]) -> None:
    pairs = list(combinations(range(1, 7), 2))
    same = sum((said.index(a) < said.index(b)) == (right.index(a) < right.index(b)) for a, b in pairs)
    assert score("concordance", f"Order: {said}", str(right)) == same / len(pairs)


@given(st.integers(0, 100), st.integers(0, 100))
def test_ten_points_halve_the_similarity(said: int, right: int) -> None:
    assert score("exp_similarity", f"about {said}.0% of it", f"{right}%") == pytest.approx(
        2 ** (-abs(said - right) / 10)
    )


BY_HAND = [
    ("hit", "It is 48,000.", ["48"], 0),
    ("matched", "It is 48,000 for BOB", ["48", "bob", "eve", "4800"], 0.5),
    ("em", "The  Cat!", ["dog", "a cat"], 1),
    ("f1", "the black cat sat", ["black cat"], 0.8),
    ("f1_line", "\nblack cat\nblack cat", ["black cat"], 1),
    ("f1_zh", "我在北京大学。", ["北京大学"], 0.5),
    ("rouge", "...", ["a cat"], 0),
    ("rouge_line", "a cat\na dog", ["a cat"], 1),
    ("rouge_zh", "我在北京大学", ["北京大学"], 0.5),
    ("rouge1", "cats", ["cat"], 0),
    ("classification", "a wild cat or a dog\ncat", ["wild cat"], 0.5),
    ("classification", "a wild cat\ndog", ["cat"], 0.5),
    ("classification", "wild cat", ["wild cat"], 1),
    ("classification", "a cat", ["wild cat"], 0),
    ("classification", "a bird", ["cat"], 0),
    ("retrieval", "Paragraph 3, not 12 or 3", ["Paragraph 3"], 2 / 3),
    ("retrieval", "段落12", ["段落12"], 1),
    ("retrieval", "12", ["12"], 0),
    ("count", "12 or 1", ["1"], 0.5),
    ("code_sim", "\n# note\n```\nx = 1", ["x = 1"], 1),
    ("code_sim", "# note", ["x"], 0),
    ("accuracy", "I say (C), not A", ["(C) so"], 1),
    ("accuracy", "Because", ["B"], 0),
    ("exp_similarity", "half", ["50%"], 0),
    ("concordance", "3, 1", ["3, 1, 2"], 0),
    ("concordance", "1,01", ["1, 2"], 0),
    ("concordance", "#01, 2", ["1, 2"], 1),
]


@pytest.mark.parametrize(("metric", "text", "answers", "right"), BY_HAND)
def test_worked_by_hand(metric: str, text: str, answers: list[str], right: float) -> None:
    classes = ("cat", "wild cat", "dog")
    assert SCORES[metric](text, Question("", answer=tuple(answers), classes=classes)) == pytest.approx(right, abs=1e-7)


def test_classes_are_left_out_as_published() -> None:
    question = Question("", answer=("wild cat",), classes=("wild", "cat", "wild cat"))
    assert SCORES["classification"]("a wild cat", question) == 0.5  # "cat" is passed over behind "wild"


def test_an_answer_that_repeats_itself_is_scored_and_python_left_as_it_was() -> None:
    before = sys.getrecursionlimit()
    assert score("rouge", "work", "work" + " and play" * 1000) > 0
    assert sys.getrecursionlimit() == before


@pytest.mark.parametrize(
    ("metric", "library"), [("rouge", "rouge"), ("rouge1", "rouge_score"), ("code_sim", "rapidfuzz")]
)
def test_a_missing_library_is_named(metric: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(InfeasibleError) as caught:
        score(metric, "a", "a")
    assert library in caught.value.why and "pip install 'kvcli[eval]'" in caught.value.fix
    assert score("em", "a", "a") == score("f1", "b", "b") == score("hit", "b", "b") == score("matched", "b", "b") == 1


@pytest.mark.slow
def test_chinese_words_come_without_noise(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    scores._cutter.cache_clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tempfile.tempdir", str(tmp_path))
        assert score("f1_zh", "我爱北京", "北京") > 0
    assert capfd.readouterr() == ("", "") and list(tmp_path.iterdir()) == []


def test_one_metric_has_one_name() -> None:
    assert label("matched") == label("hit") == "hit"
    assert label("f1_zh") == label("f1_line") == "f1" and label("rouge_zh") == label("rouge_line") == "rouge"
    assert {label(name) for name in SCORES} <= set(SCORES)
