"""Ada-KV: the heads of a layer share its budget by one ranking."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import share_out
from ..errors import UsageError
from ..registry import Ask, Scored, allocate
from .uniform import uniform


@allocate(paper="arXiv:2407.11550")
def adakv(scored: Sequence[Scored], n: int, ask: Ask, *, floor: float = 0.2) -> list[Tensor]:
    """Heads share a layer's entries by their scores; each gets at least `floor` of an even share."""
    if not 0 <= floor <= 1:
        raise UsageError(f"adakv: floor={floor} is a share, 0 to 1")
    even = uniform(scored, n, ask)
    return [share_layer(part.score, int(total.sum()), floor) for part, total in zip(scored, even, strict=True)]


def share_layer(score: Tensor, total: int, floor: float) -> Tensor:  # [H, T] -> [H] int64
    """Counts of one layer: (1 - floor) * (its part of the layer's best) + floor * (an even share), exactly `total`."""
    kept = score.isposinf().sum(1)
    real = (score > -torch.inf).sum(1)
    free = total - int(kept.sum())
    flat = score.masked_fill(score.isposinf(), -torch.inf).flatten()
    best = flat.argsort(descending=True, stable=True)[: max(free, 0)]
    won = torch.bincount(best // score.shape[1], minlength=len(kept))
    want = kept + (1 - floor) * won.double() + floor * free / len(kept)
    return share_out(want, total, kept.clamp(min=1), real)
