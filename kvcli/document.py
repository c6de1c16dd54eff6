"""Documents as measurements take them, texts or full snapshots, and the model that goes with all of them."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from .errors import KvError, UsageError
from .layers import ids_hash
from .model.load import Model, load
from .model.observe import prefill
from .model.resume import check_model, model_for
from .model.text import encoded
from .storage import Reader, write_snapshot

Given = tuple[str, str | Path]  # its name; its text, or the file of its snapshot
Warn = Callable[[str], None]


@dataclass(frozen=True)
class Document:
    """What is known before the model has read it; `digest` is that of the snapshot, empty for a text."""

    name: str
    tokens: int
    ids_hash: str
    digest: str
    tail: str  # text between a question and its answer
    full: Callable[[Path], Path]  # (folder) -> the file of its full snapshot, which for a text is made there


def model_of(
    given: Sequence[Given],
    name: str | None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    tick: Callable[[str], None] = lambda text: None,
) -> Model:
    """The model `name`, else that of the first snapshot, else the default model; in the snapshot's precision."""
    for doc, source in given:
        if isinstance(source, Path):
            with naming(doc), Reader(source) as reader:
                return model_for(reader.meta, name, device=device, dtype=dtype, tick=tick)
    return load(name, device=device, dtype=dtype or "bfloat16", tick=tick)


def open_document(
    given: Given, model: Model, *, raw: bool = False, collect: Sequence[str] = (), warn: Warn
) -> Document:
    """Look at a document without reading it: no step of the model is run.

    raw: leave the chat template out of a text. collect: what is recorded of it, names of COLLECT.
    warn: is told what the model will not see.
    Raises MismatchError for a snapshot of another model, UsageError for an empty text or a compressed snapshot.
    """
    name, source = given
    with naming(name):
        if isinstance(source, Path):
            return _snapshot(name, source, model, lambda text: warn(f"{name}: {text}"))
        return _text(name, source, model, raw, collect, lambda text: warn(f"{name}: {text}"))


def _snapshot(name: str, path: Path, model: Model, warn: Warn) -> Document:
    with Reader(path) as reader:
        seq = reader.meta.seq
        if reader.meta.history:
            raise UsageError("the snapshot is compressed", "what is lost is told by the full one", "name the full one")
        check_model(reader.snapshot(), model, warn=warn)
        return Document(name, seq.tokens, seq.ids_hash, reader.digest, seq.tail, lambda folder: path)


def _text(name: str, text: str, model: Model, raw: bool, collect: Sequence[str], warn: Warn) -> Document:
    doc = encoded(model.tokenizer, text, warn, raw=raw)

    def full(folder: Path) -> Path:
        path = folder / "full.kv.safetensors"
        snapshot = prefill(model, doc.ids, doc.seq, collect=collect, segments=doc.segments)
        write_snapshot(snapshot, path, force=True)
        return path

    return Document(name, len(doc.ids), ids_hash(torch.tensor(doc.ids, dtype=torch.int32)), "", doc.seq[1], full)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Errors say which document they are about."""
    try:
        yield
    except KvError as error:
        raise type(error)(f"{name}: {error.what}", error.why, error.fix) from error
