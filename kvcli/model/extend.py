"""Further tokens behind a snapshot: appended to it, or only asking what it holds."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from ..device import on_device
from ..errors import InfeasibleError, UsageError
from ..layers import ids_hash
from ..meta import Meta
from ..snapshot import Rows, Snapshot, append
from .attend import Law
from .cache import Layer, place, windows
from .collect import collecting, known
from .load import Model
from .observe import CUT, rope_of
from .observed import WINDOW, ObservedLayer
from .read import read
from .replay import replay, room_to_repeat
from .segments import behind
from .text import need_room


@torch.inference_mode()
def extend(
    model: Model,
    snapshot: Snapshot,
    ids: Sequence[int],
    *,
    collect: Sequence[str] = (),
    segments: Tensor | None = None,  # [S, 4] int32, of these tokens
    chunk: int = 1024,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Snapshot:
    """The snapshot with these tokens read behind it, as if document and tokens had been read in one go.

    Statistics go on as far as they can: those of all tokens (`attn_mass`, `value_norm`, what --collect recorded) are
    left out once entries have been dropped or merged, `q_last` is renewed. What kvzip stands for comes from repeating
    all of the text, and is left out unless it is in `collect`. Memory is the snapshot twice. Raises InfeasibleError for
    more tokens than the model reads, or repeats, KvError where a layer is not finite.
    """
    meta, tokens = snapshot.meta, torch.tensor(ids, dtype=torch.int32)
    if not len(tokens):
        raise UsageError("there is nothing to append")
    start, end = meta.seq.next_pos, meta.seq.next_pos + len(tokens)
    need_room(model.config, end, f"no room for {len(tokens):,} tokens behind {start:,}", CUT)
    repeats = "kvzip" in collect and not meta.history
    if repeats:
        room_to_repeat(model, end, meta.seq.lead, meta.seq.tail)
    total = len(tokens) + end * repeats
    there = on_device(snapshot, model.device)
    layers = [
        ObservedLayer(len(tokens), window, _placed(model, rows), start, stats)
        for rows, window, stats in zip(there.rows, windows(model.config), there.stats, strict=True)
    ]
    every = torch.cat([snapshot.ids, tokens])
    with collecting(model, layers, every, known(there.stats), meta.seq.lead):
        hidden = read(model, layers, tokens, chunk, lambda done, _: tick(done, total))
    rows = [append(before, layer.rows(), _first(layer)) for before, layer in zip(there.rows, layers, strict=True)]
    extra = {**snapshot.lasting, "stat.final_hidden": hidden[-1].cpu()}
    if segments is not None:
        extra["stat.segments"] = behind(extra.get("stat.segments"), segments, start)
    found = Snapshot(_longer(meta, model, every, layers), every, rows, [layer.stats() for layer in layers], extra)
    if not repeats:
        return found
    return replay(model, found, chunk=chunk, tick=lambda done, _: tick(len(tokens) + done, total))


def _longer(meta: Meta, model: Model, every: Tensor, layers: Sequence[ObservedLayer]) -> Meta:
    seq = replace(meta.seq, tokens=len(every), next_pos=layers[0].end, ids_hash=ids_hash(every))
    kinds = tuple("sliding" if layer.slides else "full" for layer in layers)
    layout = replace(meta.layout, kinds=kinds)
    return replace(meta, seq=seq, layout=layout, encode="raw", rope=rope_of(model, every, layers))


class _Asking(Layer):
    """A cache layer that keeps its last queries."""

    def __init__(self, prefix: Rows, start: int, window: int | None) -> None:
        super().__init__(prefix, start, window=window)
        self.asked: list[Tensor] = []  # a chunk each, [Hq, at most WINDOW, D]

    def attend(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:
        self.asked.append(q[:, -WINDOW:])
        return super().attend(q, law, module)


@torch.inference_mode()
def aim(model: Model, snapshot: Snapshot, ids: Sequence[int], *, chunk: int = 1024) -> Snapshot:
    """The same snapshot with `q_last` taken from a question of these tokens, which is run behind it and left out.

    Raises InfeasibleError where the question has no token, or does not fit the model's context.
    """
    start, held = snapshot.meta.seq.next_pos, snapshot.meta.held
    if not ids:
        raise InfeasibleError("the model's tokenizer has no token for anything in the probe")
    end, what = start + len(ids), f"no room for a probe of {len(ids):,} tokens behind {start:,}"
    need_room(model.config, end, what, "shorten the probe, or the document")
    there, spans = on_device(snapshot, model.device), windows(model.config)
    stats = list(there.stats)
    layers = [_Asking(_placed(model, part), start, window) for part, window in zip(there.rows, spans, strict=True)]
    read(model, layers, torch.tensor(ids, dtype=torch.int32), chunk)
    pos = torch.arange(start, end, dtype=torch.int32, device=model.device)[-WINDOW:]
    for i in held:
        q = torch.cat(layers[i].asked, 1)[:, -WINDOW:].to(there.rows[i].k.dtype)
        stats[i] = replace(stats[i], q_last=q, q_last_pos=pos)
    return replace(there, stats=stats)


def _placed(model: Model, rows: Rows) -> Rows:
    return place(rows, model.device, model.net.dtype)


def _first(layer: ObservedLayer) -> int:
    """The position of the first token that a next one can see."""
    return max(0, layer.end + 1 - layer.window) if layer.slides and layer.window else 0
