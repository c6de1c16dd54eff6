"""What eval measures: the documents and snapshots it is given, the tasks on them, and the model that reads them."""

import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError
from . import streams
from .documents import documents
from .questions import continuation
from .ui import Ui

if TYPE_CHECKING:
    from ..evaluate import Grid, Name, Work
    from ..model.load import Model
    from ..storage import Reader
    from ..tasks.task import Case
    from ..trial import Reading

Options = Mapping[str, Any]
Named = tuple[str, "Reader"]


@dataclass(frozen=True)
class Inputs:
    """The model, and what was named: texts, and snapshots in groups of one document and one model."""

    model: "Model"
    texts: Sequence[tuple[str, str]]
    groups: Sequence[Sequence[Named]]


def specs(options: Options) -> list[str]:
    """The tasks asked for; facts and perplexity where nothing is."""
    asked = tasks_of(options["task"])
    usual = [] if _about(options) else ["needle"] if options["known"] else ["needle", "ppl"]
    return asked or usual


def tasks_of(texts: Sequence[str]) -> list[str]:
    """The tasks of these lists; UsageError for one that is unknown or given twice."""
    from ..recipe import split
    from ..tasks import named

    asked = split(texts)
    for i, spec in enumerate(asked):
        named(spec)
        if spec in asked[:i]:
            raise UsageError(f"--task {spec} is given twice")
    return asked


def of_texts(spec: str) -> bool:
    """Whether a task is about documents that are given, not its own."""
    return spec.partition(":")[0] in ("needle", "ppl")


def _about(options: Options) -> bool:
    """Whether something is asked about the documents themselves."""
    return options["questions"] is not None or options["continuation"] is not None


def given(ui: Ui, docs: Sequence[str], options: Options, phase: Callable[[str], None]) -> Inputs:
    """Read what was named and load the model: --model, else the one that the first snapshot names."""
    from ..document import model_of, naming
    from ..spool import scratch
    from ..storage import Reader

    with scratch() as folder:
        found = documents(ui, _named(docs, options), folder)
        # A pipe that nobody named may well be empty.
        texts = [(name, text) for name, text in found if isinstance(text, str) and (docs or text.strip())]
        groups: dict[str, list[Named]] = {}
        for name, path in found:
            if isinstance(path, Path):
                with naming(name):
                    reader = Reader(path)
                groups.setdefault(reader.meta.seq.ids_hash + json.dumps(reader.meta.model), []).append((name, reader))
        _check(texts, [*groups.values()], options)
        how = {name: options[name] for name in ("device", "dtype")}
        model = model_of(found, options["model"], **how, tick=phase)
    if options["truncate"]:
        texts = [(name, _shortened(ui, model, name, text)) for name, text in texts]
    return Inputs(model, texts, [*groups.values()])


def _shortened(ui: Ui, model: "Model", name: str, text: str) -> str:
    """As much of a text as leaves room for facts, question and answer: what is hidden must not be cut off again."""
    from ..model.text import question_ids, readable

    ids, room = question_ids(model.tokenizer, text, "", ""), readable(model.config)
    if len(ids) <= room:
        return text
    ui.warn(f"{name}: cut to {room:,} tokens, {len(ids) - room:,} were left out")
    return str(model.tokenizer.decode(ids[:room]))


def _named(docs: Sequence[str], options: Options) -> Sequence[str]:
    """Where none is named a document comes from a pipe, unless no task asks for one."""
    wanted = _about(options) or any(map(of_texts, specs(options)))
    return docs or (["-"] if wanted and streams.is_piped(sys.stdin) else [])


def _check(texts: Sequence[tuple[str, str]], groups: Sequence[Sequence[Named]], options: Options) -> None:
    if groups and not _about(options):
        why = "a snapshot's document cannot be changed or held out"
        raise UsageError(f"what is {groups[0][0][0]} to be asked?", why, "give --questions FILE or --continuation FILE")
    own = [spec for spec in specs(options) if of_texts(spec)]
    if texts and not own and not _about(options):
        raise UsageError(f"{texts[0][0]} is asked nothing", "the tasks bring their own documents", "leave it out")
    if groups and own and not texts:
        raise UsageError(f"--task {own[0]} needs a text", "a snapshot's document cannot be changed", "name the text")
    if groups and options["raw"]:
        raise UsageError("--raw with a snapshot", "the snapshot says whether the chat template is used", "leave it out")
    if _about(options) and not texts and not groups:
        raise UsageError("--questions and --continuation are about documents", fix="name them: kvcli eval report.txt")


def gather(ui: Ui, found: Inputs, grid: "Grid", options: Options) -> "list[Work]":
    """Every document of every task, ready to be read; UsageError where two would be reported as one."""
    works = on_texts(ui, found.model, specs(options), found.texts, options)
    how = _reading(options)
    for name, text in found.texts:
        works += [_work(ui, found.model, case, how) for case in _asked(name, text, options)]
    for group in found.groups:
        works += _from_files(ui, found.model, group, grid, (how, options))
    keys = Counter(work.key(name) for work in works for name in work.names(grid))
    if twice := next((key for key, count in keys.items() if count > 1), None):
        raise UsageError(f"{twice[0]} would ask {twice[1]} twice under {twice[2]}", fix="leave one of them out")
    return works


def on_texts(
    ui: Ui, model: "Model", tasks: Sequence[str], texts: Sequence[tuple[str, str]], options: Options
) -> "list[Work]":
    """Every document of these tasks; those that need a text take one of these."""
    from ..model.text import question_ids
    from ..tasks import cases
    from ..tasks.task import Setting

    def tokens(text: str) -> int:
        return len(question_ids(model.tokenizer, text, "", ""))

    setting = Setting(texts, tokens, options["seed"], options.get("limit"))
    return [_work(ui, model, case, _reading(options)) for spec in tasks for case in cases(spec, setting)]


def _reading(options: Options) -> "Reading":
    from ..trial import Reading

    return Reading(options["raw"], options.get("truncate", False), options.get("tokens"), options["collect"])


def _work(ui: Ui, model: "Model", case: "Case", how: "Reading") -> "Work":
    from ..evaluate import Work
    from ..trial import read_text

    return Work(case, partial(read_text, model, case, how, _warner(ui, case)))


def _asked(name: str, text: str, options: Options) -> "Iterator[Case]":
    """What --questions and --continuation ask about one document."""
    from ..tasks.qa import questions
    from ..tasks.task import Case

    if options["questions"] is not None:
        yield Case("questions", name, text, questions(options["questions"]))
    if options["continuation"] is not None:
        yield Case("continuation", name, text, continuation=continuation(options["continuation"]))


def _from_files(
    ui: Ui, model: "Model", group: Sequence[Named], grid: "Grid", rest: "tuple[Reading, Options]"
) -> "Iterator[Work]":
    """One document of which there are several snapshots: the full one if there is, and those measured as they are."""
    from ..evaluate import Work
    from ..trial import read_file

    name, base = next((each for each in group if not each[1].meta.history), group[0])
    how, options = rest
    taken = grid.names()
    files: list[tuple[Name, Reader]] = []
    for own, reader in group:
        if reader is not base or base.meta.history:
            taken.append(_label(own, reader, taken))
            files.append((taken[-1], reader))
    for case in _asked(name, "", options):
        yield Work(case, partial(read_file, model, case, base, how, _warner(ui, case)), files)


def _label(name: str, reader: "Reader", taken: "Sequence[Name]") -> "Name":
    """What the rows of a file are called: the recipes that made it, or its name where others are called so."""
    history = reader.meta.history
    if not history:
        return name, "100%"
    recipes, budget = " > ".join(str(entry["recipe"]) for entry in history), str(history[-1]["budget"])
    return (name if (recipes, budget) in taken else recipes), budget


def _warner(ui: Ui, case: "Case") -> Callable[[str], None]:
    return lambda text: ui.warn(f"{case.name}: {text}")
