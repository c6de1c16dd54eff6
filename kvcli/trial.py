"""A document in the model's memory and the trials on it: questions, or a text that is expected behind it."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from .errors import InfeasibleError, UsageError
from .model import text as texts
from .model.batch import answers
from .model.load import Model
from .model.observe import CUT, prefill
from .model.prefix import Prefix
from .model.resume import check_model, expected, question
from .outline import outline_of
from .snapshot import Snapshot, usual
from .storage import Reader, write_snapshot
from .tasks.scores import SCORES, label
from .tasks.task import Case, Question

HELD = 512  # tokens of a document's end that are held out at most, a quarter of it otherwise
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Reading:
    """How documents are read and asked."""

    raw: bool = False  # without the chat template
    truncate: bool = False  # cut what is too long
    tokens: int | None = None  # most tokens of an answer, else as many as the task says
    collect: tuple[str, ...] = ()  # what is recorded for the methods that are tried, names of COLLECT


@dataclass(frozen=True)
class Trial:
    """What is run behind the document, and `said`: the full cache's own answer to it, or the text that is expected.

    Divergence from the full cache is measured along `said`.
    """

    ids: list[int]
    said: list[int]
    question: Question | None = None
    text: str = ""  # of the full cache's answer


@dataclass(frozen=True)
class Exam:
    """A case's document, read once, and its trials."""

    case: Case
    snapshot: Snapshot  # the full one
    prefix: Prefix
    trials: Sequence[Trial]

    @property
    def file_bytes(self) -> int:
        """Of the file that `prefill` writes where nothing is collected for some method."""
        return outline_of(replace(self.snapshot, stats=[usual(part) for part in self.snapshot.stats])).file_bytes


def read_text(model: Model, case: Case, how: Reading, warn: Warn) -> Exam:
    """Read a case's text, as `prefill` does; its end is left out where it is held out.

    Raises UsageError for an empty or too short text, InfeasibleError for one that is longer than the model reads.
    """
    doc = texts.encoded(model.tokenizer, case.text, warn, raw=how.raw or case.raw)
    ids = _fitted(model, case, doc.ids, doc.seq[:2], how, warn)
    ids, behind = _held_out(case, ids, doc.seq[0])
    snapshot = prefill(model, ids, doc.seq, collect=how.collect, segments=doc.segments_of(ids))
    return _exam(model, case, snapshot, behind, how)


def keeping(read: Callable[[], Exam], model: Model, path: Path) -> Callable[[], Exam]:
    """The same exam whenever it is asked for: read once, its snapshot kept in a file instead of in memory."""
    kept: list[tuple[Case, Sequence[Trial]]] = []

    def again() -> Exam:
        if not kept:
            exam = read()
            write_snapshot(exam.snapshot, path, force=True)
            kept.append((exam.case, exam.trials))
            return exam
        snapshot = Reader(path).snapshot()
        return Exam(kept[0][0], snapshot, Prefix.read(snapshot, model), kept[0][1])

    return again


def read_file(model: Model, case: Case, reader: Reader, how: Reading, warn: Warn) -> Exam:
    """Take the document from a snapshot; of one that is compressed, the tokens are read again.

    Raises MismatchError for another model's.
    """
    snapshot, seq = reader.snapshot(), reader.meta.seq
    check_model(snapshot, model, warn=warn)
    if snapshot.meta.history:
        ids, segments = snapshot.ids.tolist(), snapshot.extra.get("stat.segments")
        snapshot = prefill(model, ids, (seq.lead, seq.tail, seq.chat), collect=how.collect, segments=segments)
    return _exam(model, case, snapshot, [], how)


def nothing(model: Model, chat: bool) -> Prefix:
    """What the model knows without the document: the template's opening and an empty line."""
    ids, lead, tail = texts.document_ids(model.tokenizer, ".", chat)
    blank = [*ids[:lead], *texts.question_ids(model.tokenizer, "\n", "", "")]
    return Prefix.read(prefill(model, blank or ids[:1], (lead, tail, chat)), model)


def values_of(case: Case) -> list[str]:
    """What the samples of a case have numbers of."""
    asked = dict.fromkeys(label(name) for each in case.questions for name in each.metrics)
    return [*asked, "kl", "top1"] if case.questions else ["nll", "kl", "top1"]


def judged(
    model: Model, prefix: Prefix, full: Prefix, trials: Sequence[Trial]
) -> Iterator[tuple[str, dict[str, list[float]]]]:
    """Of each trial what is answered behind the prefix, and its numbers by metric: of a text one for each token."""
    asked = [trial for trial in trials if trial.question]
    said = [trial.text for trial in asked] if prefix is full else _answers(model, prefix, asked)
    texts = iter(said)
    for trial in trials:
        found = expected(model, prefix, full, [*trial.ids, *trial.said], len(trial.said))
        values = {name: part.double().tolist() for name, part in found.items()}
        if trial.question is None:
            yield "", {name: values[name] for name in ("nll", "kl", "top1")}
            continue
        text = next(texts)
        scores = {label(name): [float(SCORES[name](text, trial.question))] for name in trial.question.metrics}
        yield text, scores | {name: [sum(values[name]) / len(values[name])] for name in ("kl", "top1")}


def _exam(model: Model, case: Case, snapshot: Snapshot, behind: list[int], how: Reading) -> Exam:
    prefix = Prefix.read(snapshot, model)
    trials = [Trial([], behind)] if behind else []
    if case.continuation is not None:
        trials.append(Trial([], _continuation(model, case)))
    asked = [replace(each, n=how.tokens or each.n) for each in case.questions]
    ids = [question(model, prefix, one.prompt, one.prefix) for one in asked]
    for one, its, said in zip(asked, ids, answers(model, prefix, ids, [one.n for one in asked]), strict=True):
        trials.append(Trial(its, said, one, _text(model, said)))
    return Exam(case, snapshot, prefix, trials)


def _answers(model: Model, prefix: Prefix, asked: Sequence[Trial]) -> list[str]:
    said = answers(
        model, prefix, [trial.ids for trial in asked], [trial.question.n for trial in asked if trial.question]
    )
    return [_text(model, ids) for ids in said]


def _text(model: Model, ids: list[int]) -> str:
    text: str = model.tokenizer.decode(ids, skip_special_tokens=True)
    return text


def _continuation(model: Model, case: Case) -> list[int]:
    ids = texts.question_ids(model.tokenizer, case.continuation or "", "", "")
    if not ids:
        raise InfeasibleError("the model's tokenizer has no token for anything in the continuation")
    return ids


def _fitted(model: Model, case: Case, ids: list[int], ends: tuple[int, str], how: Reading, warn: Warn) -> list[int]:
    """The document's ids, cut where it may be, so that its questions fit behind it."""
    lead, tail = ends
    encode = model.tokenizer
    asked = [len(texts.question_ids(encode, q.prompt, q.prefix, tail)) + (how.tokens or q.n) for q in case.questions]
    if case.continuation is not None:
        asked.append(len(_continuation(model, case)))
    room, limit = max(asked, default=0), texts.context_length(model.config)
    if len(ids) + room <= limit:
        return ids
    if case.cut and limit - room > 2 * lead:
        warn(f"{len(ids):,} tokens, its {case.cut} was left out to fit {limit - room:,}")
        mark = texts.question_ids(encode, case.mark, "", "")
        first = (limit - room) // 2 if case.cut == "middle" else limit - room - len(mark)
        return ids[:first] + (ids[len(ids) - (limit - room - first) :] if case.cut == "middle" else mark)
    if how.truncate:
        kept, cut = texts.truncate(encode, ids, limit - room, lead)
        warn(f"cut to {len(kept):,} tokens, {len(cut):,} were left out")
        return kept
    need = f" and {room:,} for question and answer" if room else ""
    raise texts.too_long(model.config, f"the document has {len(ids):,} tokens{need}", CUT)


def _held_out(case: Case, ids: list[int], lead: int) -> tuple[list[int], list[int]]:
    if not case.hold_out:
        return ids, []
    count = min(HELD, (len(ids) - lead) // 4)
    if not count:
        raise UsageError("the document is too short to hold its last quarter out", f"it has {len(ids) - lead} tokens")
    return ids[:-count], ids[-count:]
