"""What people hand to the Python interface, held against what it takes: models, snapshots, ids."""

from collections.abc import Callable, Mapping, Sequence
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..snapshot import Snapshot
from ..tasks.rows import rows
from .chat import Message, encoded_chat, is_chat
from .load import Model
from .segments import Span, spans_of
from .text import Encoded, encoded

Document = str | Sequence[int] | Tensor | Sequence[Message]
Segments = str | PathLike[str] | Sequence[Mapping[str, Any]]


def need_model(model: Any) -> None:
    """Raise UsageError for anything but a model with its tokenizer."""
    if not isinstance(model, Model):
        fix = "kvcli.load(network, tokenizer) makes one of it"
        raise UsageError(f"a {type(model).__name__} is no model of kvcli", "its tokenizer belongs to it too", fix)


def need_snapshot(snapshot: Any) -> None:
    """Raise UsageError for anything but a snapshot, such as the name of its file."""
    if not isinstance(snapshot, Snapshot):
        raise UsageError(f"a {type(snapshot).__name__} is no snapshot", fix="kvcli.open(FILE) reads one")


def encode(
    document: Document,
    model: Model,
    warn: Callable[[str], None],
    *,
    raw: bool = False,
    appended: bool = False,
    segments: Segments | None = None,
) -> Encoded:
    """A text, the messages of a chat, or ids, as the model will read them; ids are taken as they are.

    Raises UsageError for what is none of these, for stretches of what is no text, and for a chat behind a snapshot.
    """
    if isinstance(document, str):
        spans = None if segments is None else _spans(segments, len(document))
        return encoded(model.tokenizer, document, warn, raw=raw, appended=appended, spans=spans)
    if segments is not None:
        raise UsageError("segments are stretches of a text", "the document is none", "leave them out")
    if not is_chat(document):
        return Encoded(listed(document, model), (0, "\n", False))
    if appended or raw:
        how = "behind a snapshot" if appended else "without the chat template"
        raise UsageError(f"a chat cannot be read {how}", fix="give its text")
    return encoded_chat(model.tokenizer, document, warn)


def _spans(segments: Segments, length: int) -> list[Span]:
    if isinstance(segments, str | PathLike):
        return spans_of(rows(fspath(segments)), length)
    return spans_of(((f"segment {i}", row) for i, row in enumerate(segments)), length)


def listed(ids: Any, model: Model) -> list[int]:
    """Ids as a list; a batch of one is taken for its sequence. UsageError for what is none, see Model.check_ids."""
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as cause:  # torch raises any of them
        what = f"a {type(ids).__name__} is neither text nor ids of tokens"
        raise UsageError(what, f"{cause!s:.80}", "give a string, or a list or tensor of ids") from cause
    if tokens.dim() == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.dim() != 1 or not len(tokens):
        raise UsageError(f"ids of the shape {tuple(tokens.shape)} are not one sequence")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise UsageError(f"{tokens.dtype} is no type for ids", fix="give whole numbers")
    found: list[int] = tokens.tolist()
    model.check_ids(found)
    return found
