"""Tasks read from files: questions of one's own, LongBench and ZeroSCROLLS, and every row that is none."""

import json
from pathlib import Path
from typing import Any

import pytest

from kvcli.errors import FormatError, KvError, StorageError, UsageError
from kvcli.tasks import longbench, qa, rows, zeroscrolls
from kvcli.tasks.longbench import datasets
from kvcli.tasks.scores import SCORES
from kvcli.tasks.task import Case, Question, Setting

SETTING = Setting((), len)
ODD = "Bell \x07, null \x00, \u2028, \U0001f419 and \x1b[31mred"
TASKS = {"qa": qa.cases, "longbench": longbench.cases, "zeroscrolls": zeroscrolls.cases}
QA = {"context": "A cat.", "questions": [{"prompt": "What?", "answer": "cat"}]}
LONG = {"input": "Who?", "context": "Bob.", "answers": ["Bob"], "length": 1, "dataset": "hotpotqa", "language": "en"}
LONG |= {"all_classes": None, "_id": "0"}
ZERO = {"id": "a", "pid": "a_0", "input": "Read.\n\nBob.\n\nQuestion:\nWho?\n\nAnswer:\n", "output": "Bob"}
ZERO |= {"document_start_index": 7, "document_end_index": 11, "query_start_index": 13, "query_end_index": 28}
ZERO |= {"truncation_seperator": "..."}
ROWS = {"qa": QA, "longbench": LONG, "zeroscrolls": ZERO}


def written(path: Path, *given: Any) -> str:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in given), encoding="utf-8")
    return str(path)


def read(task: str, path: Path, *given: Any, **limits: Any) -> list[Case]:
    return TASKS[task](written(path, *given), Setting((), len, **limits))


def test_questions_of_ones_own(tmp_path: Path) -> None:
    row = {
        "context": ODD,
        "questions": [{"prompt": ODD, "answer": "a"}, {"prompt": "", "prefix": "It", "answer": ["b", "c"]}],
    }
    path = tmp_path / "own.jsonl"
    path.write_text(f"\ufeff\n{json.dumps(row)}\r\n\n{json.dumps(QA, ensure_ascii=False)}", encoding="utf-8")
    one, two = qa.cases(str(path), SETTING)
    assert (one.task, one.name, two.name) == (f"qa:{path}", f"{path}:2", f"{path}:4")
    assert one.text == ODD and not one.cut and not one.raw
    assert one.questions[0] == Question(ODD, "", ("a",), ("hit", "em", "f1"), 32)
    assert (one.questions[1].prefix, one.questions[1].answer) == ("It", ("b", "c"))
    alone = written(tmp_path / "alone.jsonl", *row["questions"])
    assert qa.questions(alone) == one.questions


@pytest.mark.parametrize("name", [*datasets(), "hotpotqa_e", "trec_e"])
def test_longbench_is_asked_in_its_own_words(name: str, tmp_path: Path) -> None:
    dataset = datasets()[name.removesuffix("_e")]
    right = {"count": "3", "retrieval": "Paragraph 3"}.get(dataset.metric, "Bob")
    given = "Question: {who}?\nAnswer:"
    row = LONG | {"dataset": name, "input": given, "answers": [right, right], "all_classes": ["Bob", "Eve"]}
    newline = "\n" * (dataset.metric == "code_sim")  # code ends with one; a document is always closed by one
    (case,) = read("longbench", tmp_path / "x.jsonl", row | {"context": "{ODD} " + ODD + newline})
    (question,) = case.questions
    whole = case.text.rstrip() + "\n" + question.prompt + ("\n" + question.prefix if case.raw else "")
    assert whole == dataset.prompt.format(context="{ODD} " + ODD + newline, input=given)
    assert case.task == f"longbench:{name}" and case.cut and "\n" not in question.prefix
    assert question.answer == (right, right) and question.n == dataset.n
    (metric,) = question.metrics
    assert SCORES[metric](right, question) == pytest.approx(1, abs=1e-7)


def test_longbench_has_its_datasets() -> None:
    assert len(datasets()) == 21
    raw = {name for name, dataset in datasets().items() if dataset.raw}
    assert raw == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {dataset.metric for dataset in datasets().values()} <= set(SCORES)


def test_limits_are_of_each_dataset(tmp_path: Path) -> None:
    many = [LONG | {"dataset": name} for name in ("hotpotqa", "hotpotqa", "qasper", "hotpotqa", "qasper_e")]
    found = read("longbench", tmp_path / "x.jsonl", *many, limit=1)
    assert [(case.task, case.name) for case in found] == [
        ("longbench:hotpotqa", f"{tmp_path}/x.jsonl:1"),
        ("longbench:qasper", f"{tmp_path}/x.jsonl:3"),
        ("longbench:qasper_e", f"{tmp_path}/x.jsonl:5"),
    ]
    assert len(read("qa", tmp_path / "x.jsonl", QA, QA, QA, limit=2)) == 2


@pytest.mark.parametrize("place", ["qasper.jsonl", "qasper/validation.jsonl", "zs_qasper_validation.jsonl"])
def test_zeroscrolls_is_cut_behind_its_document(place: str, tmp_path: Path) -> None:
    again, other = ZERO | {"output": "Robert"}, ZERO | {"id": "b", "output": ["Rob", "Robin"]}
    one, two = read("zeroscrolls", tmp_path / place, ZERO, other, again)
    assert (one.task, one.name, one.text, one.cut) == (
        "zeroscrolls:qasper",
        f"{tmp_path / place}:1",
        "Read.\n\nBob.",
        "end",
    )
    assert one.text + "\n" + one.questions[0].prompt == ZERO["input"]
    assert one.questions[0].answer == ("Bob", "Robert") and two.questions[0].answer == ("Rob", "Robin")
    (first,) = read("zeroscrolls", tmp_path / place, ZERO, other, again, limit=1)
    assert first == one


@pytest.mark.parametrize("task", zeroscrolls.TASKS)
def test_every_task_of_zeroscrolls_has_its_scores(task: str, tmp_path: Path) -> None:
    right = {"quality": "(B) b", "space_digest": "35%", "book_sum_sort": "2, 1"}.get(task, "Bob did it")
    (case,) = read("zeroscrolls", tmp_path / f"{task}.jsonl", ZERO | {"output": right})
    assert case.task == f"zeroscrolls:{task}"
    (question,) = case.questions
    assert all(SCORES[metric](right, question) == pytest.approx(1) for metric in question.metrics)


LINES = [
    (b"{", "is not JSON"),
    (b"[1]", "not a JSON object"),
    (b"5", "not a JSON object"),
    (b'"a" "b"', "is not JSON"),
    (b'{"a": "\x00"}', "is not JSON"),
    (b'{"a": "\x1b"}', "is not JSON"),
    (b"\x00", "is not JSON"),
    (b"caf\xe9", "not UTF-8"),
    (b"\xff\xfe{\x00", "not UTF-8"),
    (b"\xef\xbb\xbf\xef\xbb\xbf{}", "is not JSON"),
    (b"[" * 200_000, "is not JSON"),
    (b'{"a":' * 200_000, "is not JSON"),
    (b"9" * 5000, "is not JSON"),
    (b'{"a": "\\ud800"}', "half a character"),
    (b"", "is empty"),
    (b" \n\r\n", "is empty"),
]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("line", "says"), LINES, ids=lambda value: ascii(value)[:20])
def test_lines_that_are_no_rows(task: str, line: bytes, says: str, tmp_path: Path) -> None:
    path = tmp_path / "qasper.jsonl"
    path.write_bytes(line)
    with pytest.raises(FormatError, match=says) as caught:
        TASKS[task](str(path), SETTING)
    assert caught.value.what.startswith(f"{path}:1 " if line.strip() else f"{path} ")
    assert "\n".join(caught.value.lines()).replace("\n", "").isprintable()
    if line.strip() and not line.startswith(b"\xff"):
        path.write_bytes(json.dumps(ROWS[task]).encode() + b"\n\n" + line)
        with pytest.raises(FormatError, match=rf":3 .*{says}"):
            TASKS[task](str(path), SETTING)


def test_a_line_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    size = len(json.dumps(QA)) + 1
    monkeypatch.setattr(rows, "LIMIT", size)
    assert len(read("qa", tmp_path / "x.jsonl", QA, QA)) == 2
    with pytest.raises(FormatError, match="jsonl:2 is too long"):
        read("qa", tmp_path / "x.jsonl", QA, QA | {"more": 1})


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("name", ["none.jsonl", ".", "odd\x1b[31m.jsonl"])
def test_files_that_cannot_be_read(task: str, name: str, tmp_path: Path) -> None:
    (tmp_path / "qasper").mkdir()
    with pytest.raises(StorageError, match="cannot read") as caught:
        TASKS[task](str(tmp_path / "qasper" / name), SETTING)
    assert caught.value.what.isprintable()


def with_question(**changes: Any) -> dict[str, Any]:
    return QA | {"questions": [*QA["questions"], {"prompt": "What?", "answer": "cat"} | changes]}  # type: ignore[misc]


BAD = [
    ("qa", QA | {"context": None}, '"context" is missing'),
    ("qa", QA | {"context": " \n"}, '"context" is empty'),
    ("qa", QA | {"context": ["a"]}, "must be a text"),
    ("qa", QA | {"questions": []}, '"questions"'),
    ("qa", QA | {"questions": {"prompt": "a", "answer": "b"}}, '"questions"'),
    ("qa", QA | {"questions": ["What?"]}, '"questions"'),
    ("qa", with_question(prompt=5), 'question 2: "prompt" must be'),
    ("qa", with_question(prefix=None, prompt=None), 'question 2: "prompt" is missing'),
    ("qa", with_question(prefix=1), 'question 2: "prefix" must be'),
    ("qa", with_question(answer=None), 'question 2: "answer" is missing'),
    ("qa", with_question(answer=""), 'question 2: "answer" is empty'),
    ("qa", with_question(answer=[]), 'question 2: "answer" is empty'),
    ("qa", with_question(answer=["a", 5]), 'question 2: "answer" must be'),
    ("qa", with_question(answer="a" * 30_001), 'question 2: "answer" is too long'),
    ("longbench", LONG | {"answers": []}, '"answers" is empty'),
    ("longbench", LONG | {"answers": [""]}, '"answers" is empty'),
    ("longbench", LONG | {"answers": None}, '"answers" is missing'),
    ("longbench", LONG | {"dataset": "\x07_e"}, r"'\\x07_e' is no dataset"),
    ("longbench", LONG | {"dataset": 1}, '"dataset" must be'),
    ("longbench", LONG | {"input": None}, '"input" is missing'),
    ("longbench", LONG | {"context": ""}, '"context" is empty'),
    ("longbench", LONG | {"dataset": "trec"}, '"all_classes"'),
    ("longbench", LONG | {"dataset": "trec", "all_classes": [1]}, '"all_classes"'),
    ("longbench", LONG | {"dataset": "passage_count"}, '"answers" does not fit'),
    ("longbench", LONG | {"dataset": "passage_retrieval_en", "answers": ["5"]}, '"answers" does not fit'),
    ("zeroscrolls", ZERO | {"output": None}, '"output" is missing'),
    ("zeroscrolls", ZERO | {"output": ""}, '"output" is empty'),
    ("zeroscrolls", ZERO | {"id": 5}, '"id" must be'),
    ("zeroscrolls", ZERO | {"input": None}, '"input" is missing'),
    *(("zeroscrolls", ZERO | {"document_end_index": end}, "document_end") for end in (None, True, 0, -2, 10**9, 4.0)),
    ("quality", ZERO, "no answer to quality"),
    ("space_digest", ZERO, "no answer to space_digest"),
    ("book_sum_sort", ZERO, "no answer to book_sum_sort"),
]


@pytest.mark.parametrize(("task", "row", "says"), BAD)
def test_rows_that_cannot_be_asked(task: str, row: dict[str, Any], says: str, tmp_path: Path) -> None:
    name = task if task in zeroscrolls.TASKS else "qasper"
    task = "zeroscrolls" if task in zeroscrolls.TASKS else task
    right = {"quality": "(A)", "space_digest": "1%", "book_sum_sort": "1"}.get(name, "Bob")
    good = ROWS[task] | {"id": "another", "output": right}
    with pytest.raises(FormatError, match=rf"jsonl:2.*{says}") as caught:
        read(task, tmp_path / f"{name}.jsonl", good, row)
    assert all(line.isprintable() for line in caught.value.lines())


def test_test_files_of_zeroscrolls_say_where_the_answers_are(tmp_path: Path) -> None:
    with pytest.raises(FormatError) as caught:
        read("zeroscrolls", tmp_path / "qasper.jsonl", ZERO | {"output": None})
    assert "validation" in caught.value.fix


@pytest.mark.parametrize("name", ["x.jsonl", "equality.jsonl"])
def test_a_file_that_names_no_task_of_zeroscrolls(name: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="which task") as caught:
        read("zeroscrolls", tmp_path / "some" / name, ZERO)
    assert "squality" in caught.value.fix


def test_questions_alone_need_their_answers(tmp_path: Path) -> None:
    path = written(tmp_path / "q.jsonl", {"prompt": "a", "answer": "b"}, {"prompt": "a"})
    with pytest.raises(KvError, match=r'q.jsonl:2: "answer" is missing'):
        qa.questions(path)
