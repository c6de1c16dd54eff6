"""A cache that transformers made becomes a snapshot, once a part of it has been made again and is the same."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from ..errors import InfeasibleError, MismatchError, UsageError
from ..kernels.error import relative_error
from ..snapshot import LayerKV, Rows, Snapshot, Stats, check_finite
from .extend import extend
from .identity import NEAR, NEAR_16_BIT
from .load import Model
from .observe import IDENTITY, prefill
from .observed import WINDOW

Pair = tuple[Tensor, Tensor]  # k [H, N, D], v [H, N, Dv]


@torch.inference_mode()
def adopt(cache: Any, ids: Sequence[int], model: Model, seq: tuple[int, str, bool] = (0, "\n", False)) -> Snapshot:
    """The snapshot of a DynamicCache that holds exactly these ids.

    The last tokens are run again behind the others, which gives `q_last` and `final_hidden`, and shows whether cache,
    ids and model belong together; the other statistics are absent, but for a document no longer than that window.
    Raises UsageError for what is no cache, a batch or another number of tokens, InfeasibleError for other caches,
    MismatchError for what does not belong together.
    """
    if not isinstance(cache, Cache):
        raise UsageError(f"a {type(cache).__name__} is no cache of transformers", fix="give its DynamicCache")
    pairs = [_pair(i, layer, len(ids), model) for i, layer in enumerate(cache.layers)]
    few = prefill(model, ids[:IDENTITY] if len(ids) > WINDOW else ids, seq)
    _compare(few, pairs, 0, model)
    rows = [_rows(*pair) for pair in pairs]
    if (n := len(ids) - WINDOW) <= 0:
        return replace(few, rows=rows)
    meta = replace(few.meta, seq=replace(few.meta.seq, tokens=n, next_pos=n))
    first = [_rows(k[:, :n], v[:, :n]) for k, v in pairs]
    start = Snapshot(meta, torch.tensor(ids[:n], dtype=torch.int32), first, [Stats()] * len(rows), few.extra)
    whole = extend(model, start, ids[n:])
    _compare(whole, pairs, n, model)
    return replace(whole, rows=rows)


def _pair(i: int, layer: Any, tokens: int, model: Model) -> Pair:
    if type(layer) not in (DynamicLayer, DynamicSlidingWindowLayer):
        raise InfeasibleError(f"layer {i} of the cache is a {type(layer).__name__}", "it must be one of a DynamicCache")
    k, v = layer.keys, layer.values
    if not layer.is_initialized or k.shape[0] != 1:
        raise UsageError(f"layer {i} of the cache does not hold one sequence", "a snapshot has no batch")
    if k.shape[2] < tokens == layer.get_seq_length():
        raise InfeasibleError(f"layer {i} of the cache holds no more than its window", fix="use kvcli.prefill")
    if k.shape[2] != tokens:
        why = "the last token that generate returns is not in its cache"
        raise UsageError(f"layer {i} of the cache holds {k.shape[2]} tokens, there are {tokens} ids", why)
    if k.dtype != model.net.dtype:
        raise InfeasibleError(f"the cache is {k.dtype}, the model computes in {model.net.dtype}")
    check_finite(i, k=k, v=v)
    return k[0].detach().to(model.device), v[0].detach().to(model.device)


def _rows(k: Tensor, v: Tensor) -> Rows:  # [H, N, D], [H, N, Dv]
    pos = torch.arange(k.shape[1], dtype=torch.int32, device=k.device).expand(k.shape[:2])
    return LayerKV(k, v, pos).rows()


def _compare(own: Snapshot, pairs: Sequence[Pair], start: int, model: Model) -> None:
    """Hold what the model makes itself, from position `start` on, against what the cache has there."""
    limit = NEAR if model.net.dtype == torch.float32 else NEAR_16_BIT
    if len(pairs) != len(own.rows):
        raise MismatchError(f"the cache has {len(pairs)} layers, the model {len(own.rows)}")
    for i, pair in enumerate(pairs):
        mine = own.layer(i)
        for a, b in zip((mine.k, mine.v), pair, strict=True):
            a, b = a[:, start:], b[:, start : mine.k.shape[1]]
            error = float(relative_error(a, b, (0, 1, 2))) if a.shape == b.shape else torch.inf
            if not error <= limit:
                why = f"layer {i} differs by {error:.2g} from what the model makes of the ids"
                raise MismatchError("cache, ids and model do not belong together", why)
