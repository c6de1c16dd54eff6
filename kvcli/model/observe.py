"""Prefill: read a document chunk by chunk, keep its cache and what was observed of it."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..layers import NAMES, ids_hash
from ..meta import Json, Layout, Meta, Seq
from ..snapshot import Snapshot
from .cache import Layer, windows
from .collect import collecting
from .load import Model
from .observed import ObservedLayer
from .read import read
from .replay import replay, room_to_repeat
from .rope import frequencies
from .text import need_room

IDENTITY = 8  # tokens run on their own to recognise the model
CUT = "shorten it, or cut it with --truncate"


@torch.inference_mode()
def prefill(
    model: Model,
    ids: Sequence[int],
    seq: tuple[int, str, bool],
    *,
    collect: Sequence[str] = (),
    segments: Tensor | None = None,  # [S, 4] int32
    chunk: int = 1024,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Snapshot:
    """The model's memory of `ids` with all statistics; memory is the cache plus one chunk.

    seq: the lead and tail of `text.document_ids`, and whether the chat template was used.
    collect: names of COLLECT, recorded as well as the model allows.
    Raises InfeasibleError for more tokens than the model reads, KvError where a layer is not finite.
    """
    need_room(model.config, len(ids), f"the document has {len(ids):,} tokens", CUT)
    repeats = "kvzip" in collect
    if repeats:
        room_to_repeat(model, len(ids), *seq[:2])
    layers = [ObservedLayer(len(ids), window) for window in windows(model.config)]
    tokens, total = torch.tensor(ids, dtype=torch.int32), len(ids) * (1 + repeats)
    with collecting(model, layers, tokens, collect, seq[0]):
        hidden = read(model, layers, tokens, chunk, lambda done, _: tick(done, total))
    probe_k, probe_v = probe(model, tokens[:IDENTITY])
    extra = {"stat.final_hidden": hidden[-1].cpu(), "stat.probe_k": probe_k, "stat.probe_v": probe_v}
    if segments is not None:
        extra["stat.segments"] = segments
    rows, stats = [layer.rows() for layer in layers], [layer.stats() for layer in layers]
    found = Snapshot(_meta(model, tokens, seq, layers), tokens, rows, stats, extra)
    if not repeats:
        return found
    return replay(model, found, chunk=chunk, tick=lambda done, _: tick(len(ids) + done, total))


@torch.inference_mode()
def probe(model: Model, ids: Tensor) -> tuple[Tensor, Tensor]:  # [P] -> [L, H, P, D], [L, H, P, Dv]
    """Keys and values of a few tokens run on their own: what the model's identity is checked by."""
    layers = [Layer(room=len(ids), window=window) for window in windows(model.config)]
    read(model, layers, ids, len(ids))
    return torch.stack([layer.keys for layer in layers]).cpu(), torch.stack([layer.values for layer in layers]).cpu()


def _meta(model: Model, ids: Tensor, seq: tuple[int, str, bool], layers: Sequence[ObservedLayer]) -> Meta:
    lead, tail, chat = seq
    config, layer = model.config, layers[0]
    layout = Layout(
        layers=config.num_hidden_layers,
        heads=layer.keys.shape[0],
        q_heads=layer.q_heads,
        head_dim=layer.keys.shape[-1],
        v_dim=layer.values.shape[-1],
        dtype=NAMES[layer.keys.dtype],
        scale=layer.law.scale,
        softcap=layer.law.softcap,
        kinds=tuple("sliding" if each.slides else "full" for each in layers),
    )
    return Meta(
        seq=Seq(len(ids), len(ids), ids_hash(ids), lead, tail, chat),
        model=model.identity,
        tokenizer=model.tokenizer_hash,
        layout=layout,
        rope=rope_of(model, ids, layers),
    )


def rope_of(model: Model, ids: Tensor, layers: Sequence[ObservedLayer]) -> Json:
    """How the keys of a document [N] turn with their positions."""
    rope = {"head_dim": layers[0].keys.shape[-1], **(getattr(model.config, "rope_parameters", None) or {})}
    held = [i for i, layer in enumerate(layers) if not layer.slides]
    freq = frequencies(model.net, held, ids)
    return {**rope, "inv_freq": freq} if freq else rope
