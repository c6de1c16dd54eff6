"""Questions of the user's own: JSON lines of a text and questions about it, or of questions alone."""

from itertools import islice

from ..errors import FormatError
from ..spool import shown
from .rows import Row, answers_of, rows, text_of
from .task import Case, Question, Setting

VERSION = 1
FORM = '{"prompt": "...", "prefix": "...", "answer": "..."}'


def cases(path: str, setting: Setting) -> list[Case]:
    """A case for each row {"context", "questions": [{"prompt", "prefix"?, "answer"}]} of the file.

    Raises StorageError, FormatError naming the line and the question.
    """
    return [_case(path, row, where) for where, row in islice(rows(path), setting.limit)]


def questions(path: str) -> tuple[Question, ...]:
    """The questions of a file that holds one a line, each with its answer; raises as `cases` does."""
    return tuple(_question(row, where) for where, row in rows(path))


def _case(path: str, row: Row, where: str) -> Case:
    asked = row.get("questions")
    if not isinstance(asked, list) or not asked or not all(isinstance(one, dict) for one in asked):
        raise FormatError(f'{where}: "questions" must be a list of questions', fix=f"write {FORM}")
    context = text_of(row, "context", where)
    if not context.strip():
        raise FormatError(f'{where}: "context" is empty')
    found = tuple(_question(one, f"{where}, question {i}") for i, one in enumerate(asked, 1))
    return Case(f"qa:{shown(path)}", where, context, found)


def _question(row: Row, where: str) -> Question:
    prompt, prefix = text_of(row, "prompt", where), text_of(row, "prefix", where, default="")
    return Question(prompt, prefix, answers_of(row, "answer", where), ("hit", "em", "f1"), 32)
