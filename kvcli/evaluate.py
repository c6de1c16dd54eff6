"""Evaluation: each document is read once, compressed by every method before its questions are known, and asked."""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from itertools import groupby
from tempfile import TemporaryFile
from typing import Any

from xxhash import xxh3_128_hexdigest

from .budget import Budget
from .errors import KvError, StorageError, UsageError
from .header import summary
from .model.extend import aim
from .model.load import Model
from .model.prefix import Prefix
from .model.text import question_ids
from .pipeline import carry_out, make_plans
from .recipe import Cell, Recipe
from .snapshot import Snapshot
from .storage import Reader
from .tasks.task import Case
from .trial import Exam, Trial, judged, nothing

FULL, NONE = ("full", "100%"), ("none", "0%")
KEY = ("task", "document", "method", "budget")
META = {*KEY, "bytes", "keep", "sample", "of"}  # of a line in a log, what is not the sample's own
Name = tuple[str, str]  # method and budget
Key = tuple[str, str, str, str]  # task, document, method, budget


@dataclass(frozen=True)
class Grid:
    """Which recipes at which budgets; `known` compresses for each question anew, with the question known."""

    cells: Sequence[Cell] = ()
    seed: int = 0
    known: bool = False

    def names(self) -> list[Name]:
        """The anchors and all methods, in the order they are measured."""
        return [FULL, NONE, *(named(*cell) for cell in self.cells)]


@dataclass(frozen=True)
class Work:
    """A document to be measured: how to come by it, and files made of it that are measured as they are."""

    case: Case
    read: Callable[[], Exam]
    files: Sequence[tuple[Name, Reader]] = ()

    def key(self, name: Name) -> Key:
        return (self.case.task, self.case.name, *name)

    def names(self, grid: Grid) -> list[Name]:
        """All that is measured on this document, in order."""
        return [*grid.names(), *(name for name, _ in self.files)]


@dataclass(frozen=True)
class Unit:
    """One document under one method and budget: a sample for each trial, or what went wrong."""

    key: Key
    samples: Sequence[dict[str, Any]] = ()  # `values`: numbers by metric; prompt, answer and text of a question
    bytes: int = 0  # of the file
    keep: float = 0.0  # share of the document's entries
    error: KvError | None = field(default=None, compare=False)


def digest(works: Sequence[Work]) -> str:
    """A hash of all that is read and asked, whatever the documents are called."""
    every = [(replace(work.case, name=""), [reader.digest for _, reader in work.files]) for work in works]
    return xxh3_128_hexdigest(repr(every).encode())


def lines(unit: Unit) -> Iterator[dict[str, Any]]:
    """A unit as lines of a log, one a sample; none for an error."""
    about = dict(zip(KEY, unit.key, strict=True)) | {"bytes": unit.bytes, "keep": unit.keep}
    for i, sample in enumerate(unit.samples):
        yield {**about, "sample": i, "of": len(unit.samples), **sample}


def logged(found: Iterable[dict[str, Any]]) -> list[Unit]:
    """The units in lines of a log; what is left of one that was interrupted is passed over.

    Raises StorageError for lines that no run wrote.
    """
    units, part = list[Unit](), list[dict[str, Any]]()
    try:
        for line in found:
            task, document, method, budget = (str(line[name]) for name in KEY)
            part = [*(part if line["sample"] else []), line]
            if any([one[name] for name in KEY] != [line[name] for name in KEY] for one in part):
                raise ValueError("samples of two units are mixed")
            if len(part) == line["of"]:
                samples = [{name: one[name] for name in one if name not in META} for one in part]
                finite = all(math.isfinite(x) for one in samples for values in one["values"].values() for x in values)
                if not finite or not all(values for one in samples for values in one["values"].values()):
                    raise ValueError("a value is no number")
                units.append(Unit((task, document, method, budget), samples, line["bytes"], line["keep"]))
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as cause:
        raise StorageError(
            "the log was changed", f"{type(cause).__name__}: {cause}", "name another, or delete it"
        ) from cause
    return units


def named(recipe: Recipe, budget: Budget | None) -> Name:
    """What the rows of a recipe at a budget are called."""
    return str(recipe), budget.text if budget else ""


def need_questions(works: Sequence[Work]) -> None:
    """Raise UsageError where none could be known beforehand."""
    if any(not work.case.questions for work in works):
        raise UsageError("--known is about questions", "a text that is expected asks none", "leave out ppl, or --known")


def evaluate(model: Model, works: Sequence[Work], grid: Grid, done: Collection[Key] = ()) -> Iterator[Unit]:
    """Measure every document under every method that is not done yet. Errors a user can act on become units.

    Memory is the model, one full snapshot and one compressed one. Raises as `need_questions` does.
    """
    if grid.known:
        need_questions(works)
    blank: dict[bool, Prefix] = {}
    for work in works:
        left = [name for name in work.names(grid) if work.key(name) not in done]
        try:
            for unit in _units(model, work, grid, tuple(left), blank):
                left.remove(unit.key[2:])
                yield unit
        except KvError as error:
            yield from (Unit(work.key(name), error=error) for name in left)


def _units(model: Model, work: Work, grid: Grid, left: Collection[Name], blank: dict[bool, Prefix]) -> Iterator[Unit]:
    """Those of one document; what the model knows without any is made once and kept in `blank`."""
    if left:
        exam = work.read()
        chat = exam.prefix.chat
        blank[chat] = blank.get(chat) or nothing(model, chat)
        yield from _Measure(model, work, exam, grid).units(left, blank[chat])


@dataclass(frozen=True)
class _Measure:
    """One document that is read, to be measured under the methods of a grid."""

    model: Model
    work: Work
    exam: Exam
    grid: Grid

    def units(self, left: Collection[Name], blank: Prefix) -> Iterator[Unit]:
        full = self.exam.prefix
        if FULL in left:
            yield self.unit(FULL, full, size=(self.exam.file_bytes, 1.0))
        if NONE in left:
            yield self.unit(NONE, blank)
        open_ = [cell for cell in self.grid.cells if named(*cell) in left]
        for recipe, cells in groupby(open_, lambda cell: cell[0]):
            yield from self.attempt(recipe, [budget for _, budget in cells])
        for name, reader in self.work.files:
            if name in left:
                yield self.file(name, reader)

    def file(self, name: Name, reader: Reader) -> Unit:
        """A snapshot as it is."""
        try:
            return self.unit(name, Prefix.read(reader.snapshot(), self.model), size=_size(reader))
        except KvError as error:
            return Unit(self.work.key(name), error=error)

    def attempt(self, recipe: Recipe, budgets: Sequence[Budget | None]) -> Iterator[Unit]:
        """All budgets at once; where that fails, each on its own."""
        try:
            yield from self.compressed(recipe, budgets)
        except KvError as error:
            if len(budgets) == 1:
                yield Unit(self.work.key(named(recipe, budgets[0])), error=error)
            for budget in budgets if len(budgets) > 1 else ():
                yield from self.attempt(recipe, [budget])

    def compressed(self, recipe: Recipe, budgets: Sequence[Budget | None]) -> list[Unit]:
        whole = [(self.exam.snapshot, self.exam.trials)]
        sources = [(self.aimed(trial), [trial]) for trial in self.exam.trials] if self.grid.known else whole
        parts: list[list[Unit]] = [[] for _ in budgets]
        for snapshot, trials in sources:
            plans = make_plans(snapshot, recipe, budgets, seed=self.grid.seed, device=self.model.device)
            with ExitStack() as stack:
                copies = [stack.enter_context(TemporaryFile()) for _ in plans]
                carry_out(snapshot, plans, copies)
                for mine, copy, budget in zip(parts, copies, budgets, strict=True):
                    with Reader(copy) as reader:
                        prefix = Prefix.read(reader.snapshot(), self.model)
                    mine.append(self.unit(named(recipe, budget), prefix, trials, _size(reader)))
        return [_joined(units) for units in parts]

    def aimed(self, trial: Trial) -> Snapshot:
        """The snapshot as `prefill --probe` makes it with the very question, without the start of its answer."""
        asked = trial.question.prompt if trial.question else ""
        ids = question_ids(self.model.tokenizer, asked, "", self.exam.snapshot.meta.seq.tail)
        return aim(self.model, self.exam.snapshot, ids)

    def unit(
        self,
        name: Name,
        prefix: Prefix,
        trials: Sequence[Trial] | None = None,
        size: tuple[int, float] = (0, 0.0),
    ) -> Unit:
        samples = []
        asked = self.exam.trials if trials is None else trials
        for trial, (text, values) in zip(asked, judged(self.model, prefix, self.exam.prefix, asked), strict=True):
            about = {"prompt": trial.question.prompt, "answer": list(trial.question.answer)} if trial.question else {}
            samples.append({**about, "text": text, "values": values})
        return Unit(self.work.key(name), samples, *size)


def _joined(units: Sequence[Unit]) -> Unit:
    """The samples of several files that one method made of one document; sizes are means."""
    n = len(units)
    samples = [sample for unit in units for sample in unit.samples]
    return Unit(units[0].key, samples, round(sum(unit.bytes for unit in units) / n), sum(u.keep for u in units) / n)


def _size(reader: Reader) -> tuple[int, float]:
    """Bytes of the file, and the share of the document's entries it keeps."""
    return reader.header.size, summary(reader.header, reader.meta)["keep"]
