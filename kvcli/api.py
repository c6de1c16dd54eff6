"""The Python interface: snapshots made, opened, compressed, saved, and handed to transformers as caches."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from torch import Tensor

from . import snapshot
from .collect import collected
from .device import find_device
from .errors import UsageError
from .model import text as texts
from .model.adopt import adopt
from .model.attend import NAME as ATTENTION
from .model.cache import make_cache, named
from .model.chat import is_chat
from .model.collect import NOT_KNOWN, absent, known
from .model.extend import aim, extend
from .model.given import Document, Segments, encode, listed, need_model, need_snapshot
from .model.load import Model, wrap
from .model.load import load as load_model
from .model.observe import prefill as read_document
from .model.prefix import Prefix, check_room
from .model.resume import check_model
from .pipeline import carry_out, make_plans
from .recipe import Recipe
from .spool import open_output
from .storage import Reader, write_snapshot
from .usual import usual_recipe

__all__ = ["ATTENTION", "Model", "Snapshot", "compress", "from_cache", "load", "open", "prefill"]


def _warn(text: str) -> None:
    warnings.warn(text, stacklevel=3)


Warn = Callable[[str], None]
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Snapshot(snapshot.Snapshot):
    """What a model remembers of a document: `meta`, `ids`, and for each layer `rows` and `stats`."""

    file: Reader | None = field(default=None, init=False, repr=False, compare=False)  # what holds exactly this

    def save(self, path: str | PathLike[str], *, force: bool = False) -> int:
        """Write it to a file, which appears when it is whole; returns its bytes.

        What was opened or compressed is written bit for bit as it is. Raises StorageError where it cannot be written,
        and for a file that exists unless `force`.
        """
        if self.file is None:
            return write_snapshot(self, Path(path), force=force)
        header = self.file.header
        with open_output(Path(path), header.size, force) as write:
            write(header.raw)
            for entry in header.entries:
                write(self.file.tensor(entry.name).flatten().view(torch.uint8).numpy().data)
        return header.size

    def cache(self, model: Model, *, trust: bool = False) -> Any:
        """A fresh transformers cache for the model's forward or generate; all of them share what the snapshot holds.

        Pass it with the new ids alone and a mask of ones for all tokens, as `inputs` does. Raises MismatchError unless
        the model is the one that made the snapshot (`trust` turns that into a warning), InfeasibleError if its
        attention is not ours.
        """
        need_model(model)
        check_model(self, model, trust=trust, warn=_warn)
        where = model.device, model.net.dtype
        if where not in self._placed:
            self._placed[where] = Prefix.read(self, model)
        return make_cache(model.net, self._placed[where].rows, self.meta.seq.next_pos)

    def inputs(self, model: Model, question: str, prefix: str = "", *, trust: bool = False) -> dict[str, Any]:
        """What `model.net.generate` needs to answer a question: its ids, their mask, and a cache.

        prefix: the words the answer is to start with. Raises InfeasibleError where the question does not fit the
        model's context, and what `cache` raises.
        """
        cache = self.cache(model, trust=trust)
        ids = texts.question_ids(model.tokenizer, question, prefix, self.meta.seq.tail)
        check_room(model, self.meta.seq.next_pos, len(ids))
        mask = torch.ones(1, self.meta.seq.next_pos + len(ids), dtype=torch.long, device=model.device)
        tokens = torch.tensor([ids], device=model.device)
        return {"input_ids": tokens, "attention_mask": mask, **named(model.net, cache)}

    @cached_property
    def _placed(self) -> dict[tuple[torch.device, torch.dtype], Prefix]:
        return {}


def open(path: str | PathLike[str]) -> Snapshot:
    """The snapshot in a file; layers are read, and verified, when they are asked for.

    Raises StorageError where it cannot be read, FormatError where it is not a whole snapshot.
    """
    return _in_file(Reader(Path(path)))


def load(model: Any = None, tokenizer: Any = None, *, device: str = "auto", dtype: str = "bfloat16") -> Model:
    """A model by its folder or hub id, by default the default model; or a network that transformers has loaded.

    Such a network brings its own tokenizer unless one is given, and needs the attention `kvcli.ATTENTION`.
    """
    if model is None or isinstance(model, str | PathLike):
        if tokenizer is not None:
            raise UsageError("a model by its name brings its own tokenizer", fix="leave out the other one")
        return load_model(None if model is None else str(model), device=str(device), dtype=dtype)
    return wrap(model, tokenizer)


def prefill(
    document: Document,
    model: Model,
    *,
    raw: bool = False,
    onto: snapshot.Snapshot | None = None,
    probe: str | None = None,
    truncate: bool = False,
    chunk: int = 1024,
    collect: Sequence[str] = (),
    segments: Segments | None = None,
    warn: Warn = _warn,
    tick: Tick = lambda done, total: None,
) -> Snapshot:
    """Read a document, text, ids or the messages of a chat, and keep the model's memory of it, where the model is.

    raw: leave out the model's chat template; ids are always read as they are.
    onto: append the document to what this snapshot holds; MismatchError unless the model is the one that made it.
    probe: a likely question, run behind the document and left out again; compressing keeps what it asks for.
    truncate: cut a document that is too long, leaving room for a question and its answer.
    collect: statistics that some methods need, "norms", "moments" or "kvzip"; of these `onto` goes on with the first
        two where it has them, and kvzip is recorded of the whole.
    segments: stretches of the text, {"start", "end", "type", "group"} in characters, or a file of them; by default
        its paragraphs.
    warn: is told what of the document the model does not see, and what is absent.
    """
    need_model(model)
    if onto is not None:
        need_snapshot(onto)
    if chunk < 1:
        raise UsageError(f"chunk={chunk}: read at least one token at a time")
    names = collected([collect] if isinstance(collect, str) else collect)
    doc = encode(document, model, warn, raw=raw, appended=onto is not None, segments=segments)
    start = onto.meta.seq.next_pos if onto else 0
    ids = _cut(doc, document, model, texts.readable(model.config) - start, warn) if truncate else doc.ids
    how: dict[str, Any] = {"collect": names, "segments": doc.segments_of(ids), "chunk": chunk, "tick": tick}
    if onto:
        check_model(onto, model, warn=warn)
        found = extend(model, onto, ids, **how)
    else:
        found = read_document(model, ids, doc.seq, **how)
    if probe is not None:
        found = _aimed(found, model, probe, warn)
    _tell(found, names, onto, warn)
    if found.meta.seq.next_pos > texts.readable(model.config):
        warn("little room is left in the model's context for a question and its answer")
    return _in_memory(found)


def compress(
    snapshot: snapshot.Snapshot,
    method: str | None = None,
    budget: str | int | float | None = None,
    *,
    seed: int = 0,
    keep_stats: bool = False,
    device: str | torch.device = "auto",
) -> Snapshot:
    """A smaller snapshot by a recipe such as "snapkv+adakv" and a budget such as "35%", 0.35, 512 or "64MiB".

    It is written to a temporary file without a name and read back from there: what you get is what `save` writes.
    method: by default the best recipe for the statistics that the snapshot has.
    device: where the work is done, by default on the card if there is one. Raises UsageError, InfeasibleError.
    """
    need_snapshot(snapshot)
    recipe = usual_recipe(snapshot) if method is None else Recipe.parse(method)
    budgets = recipe.budgets([] if budget is None else [str(budget)])
    file = getattr(snapshot, "file", None)
    how: dict[str, Any] = {"seed": seed, "parent": file.digest if file else "", "keep_stats": keep_stats}
    plans = make_plans(snapshot, recipe, budgets, **how, device=find_device(str(device)))
    with TemporaryFile() as copy:
        carry_out(snapshot, plans, [copy])
        return _in_file(Reader(copy))


def from_cache(cache: Any, ids: Sequence[int] | Tensor, model: Model, *, chat: bool = False) -> Snapshot:
    """The snapshot of a transformers DynamicCache that holds exactly these ids.

    chat: the ids begin as the model's chat template does; questions are then closed as it closes them.
    The last 64 tokens are run again, which gives `q_last` and shows that cache, ids and model belong together;
    `attn_mass`, `value_norm` and `q_probe` are absent. Raises UsageError, InfeasibleError, MismatchError.
    """
    need_model(model)
    given, (lead, tail) = listed(ids, model), texts.opening_ids(model.tokenizer, chat)
    if not chat:
        return _in_memory(adopt(cache, given, model))
    if given[: len(lead)] != lead:
        raise UsageError("the ids do not begin as the model's chat template does", fix="leave chat=True out")
    return _in_memory(adopt(cache, given, model, (len(lead), tail, True)))


def _cut(doc: texts.Encoded, document: Document, model: Model, room: int, warn: Warn) -> list[int]:
    kept, cut = texts.truncate(model.tokenizer, doc.ids, room, doc.seq[0])
    if cut and is_chat(document):
        raise UsageError("a chat cannot be cut", "its last turn would not be closed", "leave out some of its messages")
    if cut:
        words = " ".join(model.tokenizer.decode(cut[:64]).split()[:8])
        warn(f"cut to {len(kept):,} tokens, {len(cut):,} were left out from here on: {words}")
    return kept


def _tell(found: snapshot.Snapshot, names: Sequence[str], onto: snapshot.Snapshot | None, warn: Warn) -> None:
    """Warn of statistics that are absent though they should be there."""
    there = (*names, *known(found.stats))
    if onto and not onto.meta.history and (lost := ",".join(name for name in known(onto.stats) if name not in there)):
        warn(f"left out: {lost}, which is of the whole text; kvcli score SNAPSHOT --collect {lost} records it again")
    if any(found.stats[i].value_norm is None for i in found.meta.held) and not onto:
        warn("the output projection was not found, so the statistic value_norm is absent")
    if missing := ", ".join(absent(found.stats, found.meta.held, names)):
        why = "the snapshot did not have what came before" if onto else NOT_KNOWN
        warn(f"not recorded: {missing}; {why}")


def _aimed(found: snapshot.Snapshot, model: Model, probe: str, warn: Warn) -> snapshot.Snapshot:
    ids = texts.question_ids(model.tokenizer, probe, "", found.meta.seq.tail)
    if missing := texts.lost(model.tokenizer, probe, ids):
        warn(f"the probe: {missing}")
    return aim(model, found, ids)


def _in_file(reader: Reader) -> Snapshot:
    found = _in_memory(reader.snapshot())
    object.__setattr__(found, "file", reader)  # what `replace` makes of it is not in the file, hence no argument
    return found


def _in_memory(found: snapshot.Snapshot) -> Snapshot:
    return Snapshot(found.meta, found.ids, found.rows, found.stats, found.extra)
