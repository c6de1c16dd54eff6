"""H2O: the heavy hitters of all attention so far, and the newest tokens, half and half."""

from typing import Literal

import torch

from ..options import Share
from ..registry import Ask, Scored, Source, score
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2306.14048", 2023, question=True, checked="worked examples")


@score(needs=("attn_mass",), source=SOURCE, by_budget=True)
def h2o(kv: LayerKV, stats: Stats, ask: Ask, *, heavy: Share = 0.5, norm: Literal["sum", "mean"] = "sum") -> Scored:
    """The newest tokens and, `heavy` of the budget, the most attended before; norm=mean: per query that saw it."""
    recent = min(ask.B - int(heavy * ask.B), ask.B - ask.sink)
    received = stats.mass_of(kv)
    if norm == "mean":
        received = received / (ask.N - kv.pos)
    return Scored(received.masked_fill(kv.pos >= ask.N - recent, torch.inf))
