"""LongBench: its published JSON lines, asked with its prompts and scored by its metrics (arXiv:2308.14508).

`longbench.json` holds what the benchmark's config/ and eval.py say of each of its 21 datasets, word for word
("asconcisely" is theirs). samsum is stopped at a line break there; here what comes behind the first line is not scored,
which is the same.
"""

import json
from collections import Counter
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

from ..errors import FormatError
from .rows import Row, answers_of, rows, text_of
from .scores import SCORES
from .task import Case, Question, Setting

VERSION = 1

# A right answer scores above 0 here, whatever it is: one that does not is no answer.
_STRICT = {"count", "retrieval"}


@dataclass(frozen=True)
class Dataset:
    """How one dataset is asked: most tokens of an answer, metric, whether without a chat template, and the prompt."""

    n: int
    metric: str
    raw: bool
    prompt: str


@cache
def datasets() -> dict[str, Dataset]:
    """The 21 datasets by name."""
    table = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
    return {name: Dataset(**row) for name, row in table.items()}


def cases(path: str, setting: Setting) -> list[Case]:
    """A case for each row of a LongBench file (or LongBench-E), `setting.limit` of each dataset.

    Raises StorageError, FormatError naming the line.
    """
    found: list[Case] = []
    seen: Counter[str] = Counter()
    for where, row in rows(path):
        name = text_of(row, "dataset", where)
        if setting.limit is None or seen[name] < setting.limit:
            seen[name] += 1
            found.append(_case(name, row, where))
    return found


def _case(name: str, row: Row, where: str) -> Case:
    dataset = datasets().get(name.removesuffix("_e"))
    if dataset is None:
        known = ", ".join(datasets())
        raise FormatError(f"{where}: {name!a} is no dataset of LongBench", f"it has {known}")
    head, rest = dataset.prompt.split("{context}")
    context = text_of(row, "context", where)
    if not context.strip():
        raise FormatError(f'{where}: "context" is empty')
    rest = rest.replace("{input}", text_of(row, "input", where))
    answers = answers_of(row, "answers", where)
    question = Question(*asked(rest, dataset.raw), answers, (dataset.metric,), dataset.n)
    if dataset.metric == "classification":
        question = replace(question, classes=_classes(row, where))
    if dataset.metric in _STRICT and not all(SCORES[dataset.metric](answer, question) for answer in answers):
        raise FormatError(f'{where}: "answers" does not fit', f"{name} is scored by {dataset.metric}")
    return Case(f"longbench:{name}", where, head + context, (question,), raw=dataset.raw, cut="middle")


def asked(rest: str, raw: bool) -> tuple[str, str]:
    """What a prompt says behind its document, as the prompt and the prefix of a question.

    The document is closed by a newline already. Without a chat template, another one stands between prompt and prefix:
    it is the last of the text, so that the model reads the benchmark's own words to the letter, but for
    white space at the end of the context.
    """
    rest = rest.removeprefix("\n")
    if not raw:
        return rest, ""
    prompt, line, prefix = rest.rpartition("\n")
    return prompt, prefix if prompt else line + prefix


def _classes(row: Row, where: str) -> tuple[str, ...]:
    names = row.get("all_classes")
    if not isinstance(names, list) or not names or not all(isinstance(one, str) for one in names):
        raise FormatError(f'{where}: "all_classes" must be a list of texts')
    return tuple(names)
