"""Statistics added to a full snapshot: its model reads the ids again; keys, values and all else stay as they are."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from ..collect import COLLECT
from ..errors import InfeasibleError
from ..snapshot import Snapshot
from .given import Segments, encode
from .load import Model
from .observe import prefill
from .replay import replay, room_to_repeat


def need_full(snapshot: Snapshot) -> None:
    """Raise InfeasibleError for a snapshot that is compressed, whose statistics would be those of another cache."""
    if snapshot.meta.history:
        why = "its statistics are those of the full one"
        raise InfeasibleError("the snapshot is compressed", why, "score the full snapshot, then compress it again")


def collect(
    model: Model,
    snapshot: Snapshot,
    names: Sequence[str],
    *,
    chunk: int = 1024,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Snapshot:
    """The snapshot with what these names of COLLECT stand for, as `prefill` records it, as well as the model allows.

    Memory is a second cache of the document, for kvzip alone that of a part. Raises InfeasibleError for a compressed
    snapshot.
    """
    need_full(snapshot)
    seq, read = snapshot.meta.seq, [name for name in names if name != "kvzip"]
    if "kvzip" in names:
        room_to_repeat(model, seq.tokens, seq.lead, seq.tail)
    total = seq.tokens * (bool(read) + ("kvzip" in names))
    if read:
        given = snapshot.ids.tolist(), (seq.lead, seq.tail, seq.chat)
        again = prefill(model, *given, collect=read, chunk=chunk, tick=lambda done, _: tick(done, total))
        parts = [part for name in read for part in COLLECT[name]]
        found = [{part: new for part in parts if (new := getattr(stats, part)) is not None} for stats in again.stats]
        stats = [replace(old, **new) for old, new in zip(snapshot.stats, found, strict=True)]
        snapshot = replace(snapshot, stats=stats)
    if "kvzip" not in names:
        return snapshot
    before = total - seq.tokens
    return replay(model, snapshot, chunk=chunk, tick=lambda done, _: tick(before + done, total))


def divide(model: Model, snapshot: Snapshot, segments: Segments | None = None) -> Snapshot:
    """The snapshot with stretches of its text, by default its paragraphs.

    The text is that of the ids, if it gives the same ids again; else InfeasibleError.
    """
    need_full(snapshot)
    seq, ids = snapshot.meta.seq, snapshot.ids.tolist()
    text = model.tokenizer.decode(ids[seq.lead :], clean_up_tokenization_spaces=False)
    doc = encode(text, model, lambda text: None, appended=True, segments=segments)
    if doc.ids != ids[seq.lead :] or doc.segments is None:
        why = "its text cannot be told from its tokens: they are of a chat, of several documents, or of another text"
        raise InfeasibleError("the snapshot's text cannot be divided", why, "prefill the document again, or its parts")
    found = doc.segments + doc.segments.new_tensor([seq.lead, seq.lead, 0, 0])
    extra: Mapping[str, Any] = {**snapshot.extra, "stat.segments": found}
    return replace(snapshot, extra=extra)
