"""Global allocation: all heads of all layers share the entries by one ranking."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import share_out
from ..options import Share
from ..registry import Ask, Scored, allocate


@allocate(name="global")
def ranking(scored: Sequence[Scored], n: int, ask: Ask, *, floor: Share = 0.2) -> list[Tensor]:
    """One ranking over all layers and heads; each head gets at least `floor` of an even share."""
    low, high = torch.cat([part.low for part in scored]), torch.cat([part.high for part in scored])
    least = torch.full_like(low, int(floor * ask.B)).clamp(low, high)
    # The floor yields where more must stay in some heads than an even share.
    least = share_out(least, min(n, int(least.sum())), low, high)
    rest = n - int(least.sum())
    if rest > 0:
        least = least + _best(scored, least.view(len(scored), -1), rest).flatten().cpu()
    return list(least.view(len(scored), -1))


def _best(scored: Sequence[Scored], least: Tensor, rest: int) -> Tensor:  # [L, H] -> [L, H] int64
    """How many of the `rest` best entries beyond the first `least` of each head lie in which head.

    Of equal scores the lower layer wins, then the lower head; inside a head only their number matters.
    """
    beyond = []
    for part, given in zip(scored, least, strict=True):
        rank = torch.arange(part.score.shape[1], device=part.score.device)
        best = part.score.sort(descending=True).values
        beyond.append(best.masked_fill(rank < given[:, None].to(rank.device), -torch.inf))
    flat = torch.cat([best.flatten() for best in beyond])
    edge = flat.kthvalue(len(flat) - rest + 1).values
    above = torch.stack([(best > edge).sum(1) for best in beyond])
    ties = torch.stack([(best == edge).sum(1) for best in beyond])
    before = ties.flatten().cumsum(0).view_as(ties) - ties
    return above + (rest - above.sum() - before).clamp(min=0).minimum(ties)
