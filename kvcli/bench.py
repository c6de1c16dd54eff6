"""Bench: recipes, budgets and documents become rows of bytes, seconds, memory and errors; knows no command line."""

import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from . import tally
from .document import Document, naming
from .errors import KvError, StorageError
from .evaluate import FULL, Grid, Name, Unit, Work, digest, evaluate, named, need_questions
from .header import summary
from .ledger import Row
from .model.answer import Sampling, answer
from .model.load import Model
from .model.prefix import Prefix, check_room
from .model.resume import question
from .model.text import question_ids
from .process import Facts, compressed, compressing, medians
from .recipe import Cell
from .spool import header_of
from .stamp import STAMP, stamp
from .storage import Reader
from .trial import keeping

SCHEMA = "kvcli.bench/1"
PROMPT, ANSWER = "What is this document about?", Sampling(n=32, endless=True)
SCORE = ("value", "stderr", "n", "recovery")
SIZES = ("entries", "of", "keep", "kv_bytes", "file_bytes")
PASSING = (KvError.exit_code, StorageError.exit_code)  # out of memory, no space: next time it may go


@dataclass(frozen=True)
class Bench:
    """What every document goes through, and how often; snapshots are made in `folder`, one in place of another."""

    model: Model
    cells: Sequence[Cell]
    folder: Path
    runs: int = 3
    seed: int = 0
    raw: bool = False  # texts, of documents and of tasks, are read without the model's chat template
    works: Mapping[str, Sequence[Work]] = field(default_factory=dict)  # by document, what the tasks on it measure
    known: bool = False  # tasks compress for each question anew, with the question known

    @property
    def config(self) -> Facts:
        """What all rows share."""
        recipes = dict.fromkeys(str(recipe) for recipe, _ in self.cells)
        budgets = dict.fromkeys(budget.text for _, budget in self.cells if budget)
        asked = {"prompt": PROMPT, "tokens": ANSWER.n}
        return {"methods": [*recipes], "budgets": [*budgets], **asked, **self._about_all}

    @property
    def _about_all(self) -> Facts:
        who = self.model.identity
        model = {"model": self.model.id, "weights": who["weights"], "dtype": who["dtype"]}
        return {
            **model,
            "seed": self.seed,
            "runs": self.runs,
            "raw": self.raw,
            "known": self.known,
            **stamp(self.model.device),
        }

    def check(self, document: Document) -> None:
        """Raise InfeasibleError where the model's context has no room for the question; see also `need_questions`."""
        if self.known:
            need_questions(self.works.get(document.name, ()))
        ids = question_ids(self.model.tokenizer, PROMPT, "", document.tail)
        with naming(document.name):
            check_room(self.model, document.tokens, len(ids), ANSWER.n)

    def rows(
        self, documents: Sequence[Document], known: Sequence[Row] = (), tick: Callable[[str], None] = lambda text: None
    ) -> Iterator[tuple[Row, bool]]:
        """For each document a row of its full snapshot and one of each cell; and whether it was measured just now.

        A row that is `known` is not measured again. What fails is a row with an `error`, and the rest goes on.
        tick: is told what is being measured.
        """
        done = {_identity(row): row for row in known if _lasts(row)}
        for document in documents:
            plan = [self._about(document, cell) for cell in (None, *self.cells)]
            old = [done.get(_identity(about)) for about in plan]
            if old[0] is not None and not _has_numbers(old[0]):  # the document cannot be read, now as then
                yield {**old[0], "document": document.name}, False
                continue
            try:
                if not all(old):
                    tick(f"reading {document.name}")
                    full = document.full(self.folder)
                    self._ask(full)  # the first of all takes longer, and is not counted
                    tick(f"tasks on {document.name}")
                    left = [cell for cell, row in zip(self.cells, old[1:], strict=True) if row is None]
                    scores = self._scorer(document, left)
            except KvError as error:
                yield {**plan[0], "error": error.facts()}, True
                continue
            for about, row, cell in zip(plan, old, (None, *self.cells), strict=True):
                if row is not None:
                    yield {**row, "document": document.name}, False
                else:
                    tick(title(about))
                    yield {**about, **self._measured(full, cell), **scores(cell)}, True

    def _about(self, document: Document, cell: Cell | None) -> Row:
        """What a row is about: rows that agree in all but the name of the document measure the same."""
        method, budget = named_cell(cell)
        works = self.works.get(document.name)
        return {
            "document": document.name,
            "tokens": document.tokens,
            "ids_hash": document.ids_hash,
            "snapshot": document.digest,
            "method": method,
            "budget": budget or None,
            "tasks": digest(works) if works else None,
            **self._about_all,
        }

    def _scorer(self, document: Document, left: Sequence[Cell]) -> Callable[[Cell | None], Facts]:
        """What the tasks find under a cell, measured with all that are `left` of its recipe when one is asked for.

        So an interruption loses one recipe. The tasks' documents are read once for all of them.
        """
        works = [
            replace(work, read=keeping(work.read, self.model, self.folder / f"{i}.exam"))
            for i, work in enumerate(self.works.get(document.name, ()))
        ]
        anchors = list(evaluate(self.model, works, Grid(seed=self.seed, known=self.known)))
        found = _scores(anchors)

        def scores(cell: Cell | None) -> Facts:
            if cell and named_cell(cell) not in found:
                grid = Grid([each for each in left if each[0] == cell[0]], self.seed, self.known)
                units = evaluate(self.model, works, grid, {unit.key for unit in anchors})
                found.update(_scores([*anchors, *units]))
            return found.get(named_cell(cell), {})

        return scores

    def _measured(self, full: Path, cell: Cell | None) -> Facts:
        try:
            return self._whole(full) if cell is None else self._cell(full, cell)
        except KvError as error:
            return {"error": error.facts()}

    def _whole(self, full: Path) -> Facts:
        return _sizes(full) | medians([self._ask(full) for _ in range(self.runs)])

    def _cell(self, full: Path, cell: Cell) -> Facts:
        small = self.folder / "small.kv.safetensors"
        args = [*compressing(full, small, cell, self.seed), "--device", self.model.device.type]
        runs = [compressed(args) for _ in range(self.runs)]
        timed = medians([{"seconds": run["seconds"], **self._ask(small)} for run in runs])
        told = {"output_error": runs[0]["output_error"], "peak_memory": max(run["peak_memory"] for run in runs)}
        rate = {"bytes_per_second": _sizes(full)["kv_bytes"] / timed["seconds"]}
        return {**_sizes(small), **told, **timed, **rate}

    def _ask(self, path: Path) -> dict[str, float]:
        """Seconds to have a snapshot ready for questions, then of one question."""
        start = time.perf_counter()
        with Reader(path) as reader:
            prefix = Prefix.read(reader.snapshot(), self.model)
            reader.verify()
        seconds = time.perf_counter() - start
        said = answer(self.model, prefix, question(self.model, prefix, PROMPT), ANSWER)
        rate = {"first_token_seconds": said.first_seconds, "tokens_per_second": said.tokens_per_second}
        return {"load_seconds": seconds, **rate}


def _scores(units: Sequence[Unit]) -> dict[Name, Facts]:
    """By method and budget, the `metrics` of the tasks, and the `error` of the first that failed."""
    found: dict[Name, Facts] = {}
    for row in tally.rows(units):
        metrics = found.setdefault((row["method"], row["budget"] or ""), {}).setdefault("metrics", {})
        metrics[f"{row['task']} {row['metric']}"] = {name: row[name] for name in SCORE}
    for unit in reversed(units):
        if unit.error:
            found.setdefault(unit.key[2:], {})["error"] = unit.error.facts()
    return found


def named_cell(cell: Cell | None) -> Name:
    """Method and budget as rows have them; of no cell those of the full snapshot."""
    return named(*cell) if cell else FULL


def _sizes(path: Path) -> Facts:
    """What the file itself says."""
    header = header_of(path)
    facts = summary(header, header.meta)
    return {name: facts[name] for name in SIZES}


def title(row: Row) -> str:
    """What a row is called."""
    return f"{row['document']}, {row['method']} {row['budget'] or ''}".rstrip()


def _identity(row: Row) -> str:
    """What decides the numbers of a row, for rows of any origin."""
    return json.dumps([row.get(name) for name in IDENTITY])


def _lasts(row: Row) -> bool:
    """Whether a row holds numbers, or an error that would come again."""
    if isinstance(error := row.get("error"), dict):
        return error.get("code") not in PASSING
    return _has_numbers(row)


def _has_numbers(row: Row) -> bool:
    return {*SIZES, "tokens_per_second"} <= row.keys()


IDENTITY = (
    "ids_hash",
    "snapshot",
    "tasks",
    "weights",
    "dtype",
    "method",
    "budget",
    "seed",
    "runs",
    "raw",
    "known",
    *STAMP,
)
