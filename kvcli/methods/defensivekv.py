"""DefensiveKV and Layer-DefensiveKV: what an entry is worth to the one query that would miss it most."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..options import AtLeast1, Odd
from ..registry import Ask, Scored, Source, allocate, score
from ..shares import by_rank, by_rank_in_layers
from ..snapshot import LayerKV, Stats, top_mask
from ..window import before_window, last_queries, smooth, weights

SOURCE = Source("arXiv:2510.13334", 2025, checked="worked examples")
MASS = 0.9  # of a head's attention, which the entries that must stay make up at most
TINY = torch.finfo(torch.float32).tiny


@score(needs=("q_last", "value_norm"), source=SOURCE, by_budget=True)
def defensivekv_score(
    kv: LayerKV,
    stats: Stats,
    ask: Ask,
    *,
    window: AtLeast1 = 32,
    kernel: Odd = 5,
    variant: Literal["reference", "paper"] = "reference",
) -> Scored:
    """The most attention any of the last `window` queries pays, at least a head's mean, times the size of the value.

    Sizes are a head's share of its layer's at the same token in the reference code, in the paper those themselves. The
    reference code also keeps the most attended entries of each head, as far as they fit.
    """
    before = before_window(kv, stats, window)
    worst, mean = _attention(kv, stats, ask, window, kernel, variant == "reference")
    usual = worst.sum(1, keepdim=True) / before.sum(1, keepdim=True).clamp(min=1)
    risk = worst.maximum(usual) * before * _value(kv, stats, variant)
    if variant == "reference":
        risk = risk.masked_fill(_most_attended(kv, stats, ask, before, mean, window), torch.inf)
    return Scored(risk)


score(name="layer-defensivekv", needs=("q_last", "value_norm"), source=SOURCE, by_budget=True)(defensivekv_score.fn)


@allocate(source=SOURCE)
def defensivekv(scored: Sequence[Scored], n: int, ask: Ask) -> list[Tensor]:
    """The heads of a layer share its entries by one ranking."""
    return by_rank_in_layers(scored, n)


@allocate(name="layer-defensivekv", source=SOURCE)
def layer_defensivekv(scored: Sequence[Scored], n: int, ask: Ask) -> list[Tensor]:
    """All heads of all layers share the entries by one ranking."""
    return by_rank(scored, n, 0)


def _attention(
    kv: LayerKV, stats: Stats, ask: Ask, window: int, kernel: int, rescale: bool
) -> tuple[Tensor, Tensor]:  # -> [H, T], [H, T]
    """The largest smoothed attention of a query, and the mean attention; `rescale` makes up for losses at the ends."""
    worst, mean = [], []
    for weight, seen in zip(weights(kv, stats, ask, window), before_window(kv, stats, window), strict=True):
        weight *= seen
        pooled = smooth(weight, kernel, "avg") * seen
        if rescale:
            pooled *= weight.sum(-1, keepdim=True) / pooled.sum(-1, keepdim=True).clamp(min=TINY)
        worst.append(pooled.amax((0, 1)))
        mean.append(weight.mean((0, 1)))
    return torch.stack(worst), torch.stack(mean)


def _value(kv: LayerKV, stats: Stats, variant: str) -> Tensor:  # -> [H, T]
    """The size of each value behind the output projection, as a share of its token's or of its layer's."""
    if stats.value_norm is None:
        raise ValueError("value_norm is missing: name it in needs=")
    size = kv.by_entry(stats.value_norm)
    # In a layer the sum changes no order; between layers it takes out the difference of scale.
    total = size[kv.real].sum() if variant == "paper" else kv.by_entry(stats.value_norm.sum(0))
    return size / total.clamp(min=TINY)


def _most_attended(
    kv: LayerKV, stats: Stats, ask: Ask, before: Tensor, mean: Tensor, window: int
) -> Tensor:  # [H, T] bool, [H, T] -> [H, T] bool
    """The reference code's first stage: entries by mean attention while their sum is below `MASS`.

    What the last entries before the window receive counts as part of that sum: the code means the window itself.
    """
    q_pos = last_queries(stats, window)[1]
    end = min(int(q_pos[0]), ask.N)
    newest = before & (kv.pos >= end - len(q_pos))
    near = (mean * newest).sum(1).mean()
    share = mean / mean.sum(1, keepdim=True).clamp(min=TINY)
    count = (share.sort(1, descending=True).values.cumsum(1) < MASS - near).sum(1)
    fits = min(end * ask.B // ask.N - (ask.N - end), ask.B - ask.sink - ask.recent)
    return top_mask(share, count.clamp(max=max(fits, 0))) & before
