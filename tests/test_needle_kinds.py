"""Kinds of the needle task: what a spec asks for, texts of a length, and questions that only the text answers."""

import re
from collections import Counter
from collections.abc import Callable
from random import Random

import pytest
from tiny import tiny_tokenizer

from kvcli.errors import UsageError
from kvcli.tasks.hay import fit, largest
from kvcli.tasks.needle import HIDDEN, KINDS, SAMPLE, cases
from kvcli.tasks.pools import CITIES, MAGIC, NOUNS, TEMPLATES, unseen
from kvcli.tasks.task import Case, Setting
from kvcli.tasks.wordlists import common

PROSE = "".join(
    f"The clerk of ward {i} wrote {i * 7} letters to the board and kept none of the answers."
    + (" " if i % 5 else "\n\n")
    for i in range(1, 121)
)


def words(text: str) -> int:
    return len(text.split())


def pieces(text: str) -> int:
    return len(tiny_tokenizer().encode(text))


def setting(size: Callable[[str], int] = words, seed: int = 0, limit: int | None = None, n: int = 1) -> Setting:
    return Setting([(f"{i}.txt", PROSE) for i in range(n)], size, seed, limit)


def made(spec: str, seed: int = 0) -> list[Case]:
    return cases(spec, setting(seed=seed))


@pytest.mark.parametrize("size", [words, len, pieces], ids=["words", "characters", "bytes"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_text_is_as_long_as_was_asked(kind: str, size: Callable[[str], int]) -> None:
    tokens = {words: 900, len: 6000, pieces: 6000}[size]
    (case,) = cases(f"{kind},tokens={tokens},copies=1", setting(size))
    assert 0.95 * tokens < size(case.text) <= tokens


@pytest.mark.parametrize("kind", KINDS)
def test_a_text_may_be_longer_than_the_document(kind: str) -> None:
    (case,) = made(f"{kind},tokens=4500,copies=1")
    assert words(PROSE) * 2 < 4400 < words(case.text) <= 4500


@pytest.mark.parametrize("kind", HIDDEN)
def test_without_a_length_the_document_is_taken_as_it_is(kind: str) -> None:
    for case in made(kind):
        rest = iter(case.text)
        assert all(char in rest for char in PROSE)  # as a subsequence


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_text_answers(kind: str) -> None:
    for case in made(kind):
        assert case.questions
        for question in case.questions:
            asked = (question.prompt + question.prefix).casefold()
            assert question.answer
            assert question.n >= len(question.answer) * 6
            assert all(a.casefold() in case.text.casefold() and a.casefold() not in asked for a in question.answer)


@pytest.mark.parametrize("kind", ["single", "keys", "values"])
def test_a_value_stands_once_and_is_part_of_no_other(kind: str) -> None:
    for case in made(kind):
        answers = [answer for question in case.questions for answer in question.answer]
        assert [case.text.count(answer) for answer in answers] == [1] * len(answers)
        assert len({*map(len, re.findall(r"\d{4,}", case.text))}) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_how_answers_are_judged(kind: str) -> None:
    metric = "matched" if kind else "hit"
    assert all(question.metrics == (metric,) for case in made(kind) for question in case.questions)


def test_a_key_has_others_beside_it() -> None:
    for case in made("keys,facts=4"):
        assert len(case.questions) == 4
        assert len(re.findall(MAGIC.fact.format(key=r"\w+", value=r"\d{5}"), case.text)) == 12


def test_the_values_of_a_key_are_all_asked() -> None:
    for case in made("values,facts=3"):
        assert [len(question.answer) for question in case.questions] == [4, 4, 4]
        for question in case.questions:
            key = question.prompt.split()[-1].strip("?")
            assert set(question.answer) == set(re.findall(rf"\b{key}\b[^.]* (\d{{5}})\.", case.text))


@pytest.mark.parametrize("seed", range(5))
def test_variables_follow_their_chain(seed: int) -> None:
    """Running the assignments from top to bottom gives every name its value."""
    for case in made("variables", seed):
        held: dict[str, str] = {}
        for name, source in re.findall(r"The variable (\w+) is set to (\w+)\.", case.text):
            held[name] = held.get(source, source)
        for question in case.questions:
            value = re.findall(r"\d{5}", question.prompt)[0]
            assert set(question.answer) == {name for name, own in held.items() if own == value}
            assert len(question.answer) == 5


@pytest.mark.parametrize("tokens", [200, 1000, 1600, 5000])
def test_common_words_stand_out(tokens: int) -> None:
    for case in made(f"common,tokens={tokens}"):
        counts = Counter(re.findall(r"\d+\. (\w+)", case.text))
        often, rest = counts.most_common()[:10], counts.most_common()[10:]
        assert {word for word, _ in often} == set(case.questions[0].answer)
        assert often[-1][1] >= max(3, 4 * rest[0][1] - 5)


def test_600_words_are_as_many_as_in_ruler() -> None:
    text, _ = common(600, Random(0))
    assert Counter(Counter(re.findall(r"\d+\. (\w+)", text)).values()) == {30: 10, 3: 100}


@pytest.mark.parametrize("tokens", [150, 1000, 5000])
def test_frequent_words_are_zeta_distributed(tokens: int) -> None:
    for case in made(f"frequent,tokens={tokens}"):
        listed = case.text.partition("\n\n")[2].split()
        counts = Counter(listed).most_common()
        assert [word for word, _ in counts[:4]] == ["...", *case.questions[0].answer]
        assert counts[3][1] > counts[4][1]
        assert all(abs(n - counts[0][1] / k**2) <= 1 for k, (_, n) in enumerate(counts, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_seeds_and_copies_are_texts_of_their_own(kind: str) -> None:
    texts = [case.text for seed in range(3) for case in made(f"{kind},copies=3", seed)]
    assert texts == [case.text for seed in range(3) for case in made(f"{kind},copies=3", seed)]
    assert len(set(texts)) == 9


def test_labels_and_names() -> None:
    found = cases("all,tokens=900,facts=3,copies=2", setting(n=2))
    assert list(dict.fromkeys(case.task for case in found)) == [
        "needle:tokens=900,facts=3,copies=2",
        "needle:single,tokens=900,copies=2",
        "needle:keys,tokens=900,facts=3,copies=2",
        "needle:values,tokens=900,facts=3,copies=2",
        "needle:variables,tokens=900,facts=3,copies=2",
        "needle:common,tokens=900,copies=2",
        "needle:frequent,tokens=900,copies=2",
    ]
    assert len({(case.task, case.name) for case in found}) == len(found) == 7 * 4
    assert [case.task for case in made("")] == ["needle"] * 4
    assert [case.task for case in made(" keys ")] == ["needle:keys"] * 4


def test_a_limit_takes_every_document_before_a_second_copy() -> None:
    found = cases("all", setting(limit=3, n=2))
    assert [case.name for case in found if case.task == "needle"] == ["0.txt, copy 1", "1.txt, copy 1", "0.txt, copy 2"]
    assert len(found) == 3 * len(KINDS)


def test_the_sample_is_taken_where_there_is_no_document() -> None:
    (case,) = cases("copies=1", Setting([], words))
    assert case.name.startswith(SAMPLE)
    assert "Marrick Sound" in case.text


@pytest.mark.parametrize(
    ("spec", "what", "why"),
    [
        ("kays", "no kind 'kays'", "did you mean keys"),
        ("xyz", "no kind 'xyz'", "single or keys or values or variables or common or frequent or all"),
        ("keys,values", "one kind", ""),
        ("tokens=5,tokens=6", "each option once", ""),
        ("token=5", "no option 'token'", "did you mean tokens"),
        ("single,facts=2", "no option 'facts'", "did you mean tokens or copies"),
        ("tokens=many", "tokens='many'", "tokens is a whole number, 1 or more"),
        ("copies=0", "copies='0'", "1 or more"),
        ("keys,facts=101", "facts='101'", "from 1 to 100"),
        ("facts=", "facts=''", "from 1 to 100"),
        ("facts=10", "0.txt: 10 facts", ""),
        ("keys,facts=99", "needle:keys,facts=99, 0.txt: ", ""),
        ("tokens=20", "0.txt: the text is too short to hide 6 facts", "sentence ends"),
        ("common,tokens=20", "words are too few", ""),
        ("frequent,tokens=20", "words are too few", ""),
    ],
)
def test_what_cannot_be_is_refused_by_name(spec: str, what: str, why: str) -> None:
    with pytest.raises(UsageError) as caught:
        made(spec)
    assert caught.value.what.startswith("--task")
    assert "needle:" in caught.value.what
    assert what in caught.value.what
    assert why in caught.value.why


def test_fit_takes_whole_sentences_over_and_again() -> None:
    prose = "The first words.\n\nSome more.\n"
    assert fit(prose, 3) == "The first words."
    assert fit(prose, 9) == "The first words.\n\nSome more.\n\nThe first words."
    assert len(fit(PROSE, 5000, len)) in range(4900, 5001)
    for text, limit in (("", 10), (prose, 2)):
        with pytest.raises(UsageError, match="no sentence"):
            fit(text, limit)


@pytest.mark.parametrize("limit", range(12))
@pytest.mark.parametrize("step", [1, 2, 5])
def test_the_largest_is_found_in_few_tries(limit: int, step: int) -> None:
    tried: list[int] = []

    def size(n: int) -> int:
        tried.append(n)
        return n * step

    assert largest(limit * 50, size) == limit * 50 // step
    assert len(tried) <= 20
    assert max(tried, default=0) <= max(1, 2 * limit * 50 // step)


@pytest.mark.parametrize("left", [0, 7, len(CITIES) - 1])
def test_a_draw_is_what_the_text_does_not_hold(left: int) -> None:
    others = " ".join(name.upper() for name in CITIES if name != CITIES[left])
    assert unseen(CITIES, others, Random(1)) == CITIES[left]
    with pytest.raises(UsageError, match="occurs in the text already"):
        unseen(CITIES, others + CITIES[left].lower(), Random(1))


def test_no_word_of_a_pool_is_part_of_another() -> None:
    """Or an answer could hold it by chance."""
    for pool in (NOUNS, *(template.values for template in TEMPLATES if not template.values[0][0].isdigit())):
        assert len(set(pool)) == len(pool)
        assert not [(a, b) for a in pool for b in pool if a != b and a in b]
