"""ZeroSCROLLS: its published JSON lines with their own prompts, scored by its metrics (arXiv:2305.14196).

Its F1 also spells letters without their accents, which ours does not.
"""

import re
from dataclasses import replace
from pathlib import Path

from ..errors import FormatError, UsageError
from ..spool import shown
from .rows import Row, answers_of, rows, text_of
from .scores import SCORES
from .task import Case, Question, Setting

VERSION = 1

_SUMMARY = ("rouge_gm", "rouge1", "rouge2", "rougeL")
# Metrics, and most tokens of an answer as the benchmark's experiments/api/api.py has them.
TASKS = {
    "gov_report": (_SUMMARY, 1024),
    "summ_screen_fd": (_SUMMARY, 512),
    "qmsum": (_SUMMARY, 512),
    "squality": (_SUMMARY, 512),
    "qasper": (("f1",), 128),
    "narrative_qa": (("f1",), 64),
    "musique": (("f1",), 32),
    "quality": (("accuracy",), 10),
    "space_digest": (("exp_similarity",), 36),
    "book_sum_sort": (("concordance",), 256),
}
# A right answer scores above 0 here, whatever it is: one that does not is no answer.
_STRICT = {"accuracy", "exp_similarity", "concordance"}


def cases(path: str, setting: Setting) -> list[Case]:
    """A case for each id of a ZeroSCROLLS file, whose name or whose folder's name says which task it is.

    Rows of one id are one question with several references. Raises UsageError for a name of no task, StorageError, and
    FormatError naming the line.
    """
    task = _task(path)
    found: dict[str, Case] = {}
    for where, row in rows(path):
        key = text_of(row, "id", where)
        if key in found:
            if not text_of(row, "input", where).startswith(found[key].text):
                raise FormatError(f'{where}: the "input" of {key!a} is another one than before')
            (question,) = found[key].questions
            more = replace(question, answer=question.answer + _answers(task, row, where))
            found[key] = replace(found[key], questions=(more,))
        elif setting.limit is None or len(found) < setting.limit:
            found[key] = _case(task, row, where)
    return list(found.values())


def _task(path: str) -> str:
    for name in (Path(path).stem, Path(path).absolute().parent.name):
        for task in TASKS:
            if re.search(rf"(?<![a-z]){task}(?![a-z])", name.lower()):
                return task
    fix = f"name the file or its folder after one: {', '.join(TASKS)}"
    raise UsageError(
        f"zeroscrolls:{shown(path)}: which task is it?", "neither the file nor its folder is named after one", fix
    )


def _case(task: str, row: Row, where: str) -> Case:
    text, end = text_of(row, "input", where), row.get("document_end_index")
    if type(end) is not int or not text[:end].strip() or not 0 < end <= len(text):
        raise FormatError(f'{where}: "document_end_index" must be a place in "input"')
    metrics, n = TASKS[task]
    # The document is closed by a newline already.
    question = Question(text[end:].removeprefix("\n"), "", _answers(task, row, where), metrics, n)
    mark = text_of(row, "truncation_seperator", where, default="")
    return Case(f"zeroscrolls:{task}", where, text[:end], (question,), cut="end", mark=mark)


def _answers(task: str, row: Row, where: str) -> tuple[str, ...]:
    if row.get("output") is None:
        why, fix = "the benchmark keeps the answers of its test files", "take a validation file, which carries them"
        raise FormatError(f'{where}: "output" is missing', why, fix)
    answers = answers_of(row, "output", where)
    (metric, *_), _ = TASKS[task]
    if metric in _STRICT and not all(SCORES[metric](one, Question("", answer=(one,))) for one in answers):
        raise FormatError(f'{where}: "output" is no answer to {task}', f"it is scored by {metric}")
    return answers
