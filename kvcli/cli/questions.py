"""What is asked of a snapshot: prompts, files of questions, a text to continue with, and which options go together."""

import math
import sys
from collections.abc import Mapping
from typing import Any

from ..errors import FormatError, UsageError
from . import streams

ALONE = {"prefix": "--prefix", "stop": "--stop", "save": "--save", "jsonl": "--jsonl"}  # nothing to a continuation


def check_options(file: str | None, options: Mapping[str, Any], as_json: bool) -> None:
    """Raise UsageError for options that exclude each other, or that mean nothing."""
    asked = [name for name in ("prompt", "questions", "continuation") if options[name] not in (None, ())]
    if len(asked) != 1:
        kinds = "--prompt TEXT, --questions FILE.jsonl or --continuation FILE"
        raise UsageError(f"ask something: {kinds}, one of them")
    lone = [option for name, option in ALONE.items() if options[name]]
    if asked == ["continuation"] and lone:
        raise UsageError(f"{', '.join(lone)} is about answers, and --continuation gives none", fix="leave it out")
    if as_json and options["jsonl"]:
        raise UsageError("--json is one object, --jsonl one a line", fix="give one of them")
    if "" in options["stop"]:
        raise UsageError("--stop needs a text", "an empty one stands everywhere", "leave it out")
    if options["save"] in ("", "-"):
        raise UsageError("--save needs a FILE", "on stdout the snapshot would mix with the answer")
    if options["save"] and options["trust_model"]:
        why = "what another model adds would pass for the first one's memory"
        raise UsageError("--save and --trust-model exclude each other", why, "give the model that made the snapshot")
    if not (math.isfinite(options["temperature"]) and math.isfinite(options["top_p"])):
        raise UsageError("--temperature and --top-p are finite numbers")
    readers = [*options["prompt"], options["questions"], options["continuation"]].count("-")
    if readers > 1 or (readers and (file == "-" or (file is None and streams.is_piped(sys.stdin)))):
        raise UsageError("stdin is wanted twice", "a snapshot, prompt or file is to come from it", "name the FILE")


def questions(options: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The questions in order, each with its prompt and prefix; none for a continuation.

    Raises StorageError or FormatError for a file that cannot be used, UsageError where --save has not one question.
    """
    if options["questions"] is not None:
        rows = _read(options["questions"])
    else:
        rows = [{"prompt": streams.text_of("-").strip() if text == "-" else text} for text in options["prompt"]]
    if options["save"] and len(rows) != 1:
        raise UsageError(f"--save goes with one question, not {len(rows)}", fix="ask, save, and ask the saved snapshot")
    return [{"prefix": options["prefix"], **row} for row in rows]


def continuation(path: str) -> str:
    """The text of a file, as it is; UsageError for an empty one."""
    text = streams.text_of(path)
    if not text:
        raise UsageError(f"--continuation {path}: the file is empty")
    return text


def _read(path: str) -> list[dict[str, Any]]:
    from ..tasks.rows import rows

    given = rows("stdin", sys.stdin.buffer) if path == "-" else rows(path)
    return [_question(row, where) for where, row in given]


def _question(row: dict[str, Any], where: str) -> dict[str, Any]:
    from ..tasks.rows import answers_of

    if not (isinstance(row.get("prompt"), str) and isinstance(row.get("prefix", ""), str)):
        raise FormatError(f"{where} is not a question", fix='write {"prompt": "...", "answer": "..."} a line')
    return row | ({"answer": list(answers_of(row, "answer", where))} if "answer" in row else {})
