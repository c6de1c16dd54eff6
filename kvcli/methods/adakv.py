"""Ada-KV: the heads of a layer share its budget by one ranking."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import share_out
from ..options import Share
from ..registry import Ask, Scored, Source, allocate
from ..shares import evenly

SOURCE = Source("arXiv:2407.11550", 2024, question=True, checked="worked examples")


@allocate(source=SOURCE)
def adakv(scored: Sequence[Scored], n: int, ask: Ask, *, floor: Share = 0.2) -> list[Tensor]:
    """Heads share a layer's entries by their scores; each gets at least `floor` of an even share."""
    return [share_layer(part, int(each.sum()), floor) for part, each in zip(scored, evenly(scored, n), strict=True)]


def share_layer(scored: Scored, total: int, floor: float) -> Tensor:  # -> [H] int64
    """Counts of one layer: (1 - floor) * (its part of the layer's best) + floor * (an even share), exactly `total`."""
    kept = scored.score.isposinf()
    must = kept.sum(1)
    free = total - int(must.sum())
    best = scored.score.masked_fill(kept, -torch.inf).flatten().argsort(descending=True, stable=True)[: max(free, 0)]
    won = torch.bincount(best // scored.score.shape[1], minlength=len(must))
    want = must + (1 - floor) * won.double() + floor * free / len(must)
    return share_out(want, total, scored.low, scored.high)
