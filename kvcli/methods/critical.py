"""CriticalKV: half of the budget by attention, the rest by attention times the size of what a value writes."""

from typing import Literal

import torch

from ..options import AtLeast1, Odd
from ..registry import Ask, Scored, Source, score
from ..snapshot import LayerKV, Stats, top_mask
from ..window import last_queries, pooled

SOURCE = Source("arXiv:2502.03805", 2025, question=True, checked="worked examples, kvpress")


@score(needs=("q_last", "value_norm"), source=SOURCE, by_budget=True)
def critical(
    kv: LayerKV, stats: Stats, ask: Ask, *, window: AtLeast1 = 32, kernel: Odd = 7, pool: Literal["max", "avg"] = "max"
) -> Scored:
    """Pooled attention from the last `window` queries fills half of a head; the rest goes by it times the value's norm.

    The norm is that of the value behind the output projection; the half shrinks where more must stay.
    """
    if stats.value_norm is None:
        raise ValueError("value_norm is missing: name it in needs=")
    seen = pooled(kv, stats, ask, window, kernel, pool) / len(last_queries(stats, window)[1])  # mean over queries
    half = min(ask.B // 2, ask.B - ask.sink - ask.recent)
    first = top_mask(seen.masked_fill(~kv.real, -torch.inf), kv.lens.clamp(max=half))
    norm = kv.by_entry(stats.value_norm)
    return Scored(((seen + 1e-4) * norm).masked_fill(first, torch.inf))
