"""How layers and heads share the entries of a file: evenly, by layer, or by one ranking of them all."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .budget import share_out
from .registry import Scored


def evenly(scored: Sequence[Scored], n: int) -> list[Tensor]:  # -> L x [H] int64
    """The same number of entries for every head, as far as they need and hold as many."""
    heads = sum(len(part.score) for part in scored)
    return by_layer(torch.full((len(scored),), n / heads, dtype=torch.float64), scored, n)


def by_layer(want: Tensor, scored: Sequence[Scored], n: int) -> list[Tensor]:  # [L] entries a head -> L x [H] int64
    """Counts near `want` that add up to n, within what the heads need and hold.

    Heads of a layer get equal counts, unless that is impossible since they need or hold different numbers.
    Raises InfeasibleError as `share_out` does.
    """
    H, (least, most) = len(scored[0].score), bounds(scored)
    if n % H == 0 and int(least.sum()) <= n // H <= int(most.sum()) and bool((least <= most).all()):
        return list(share_out(want, n // H, least, most)[:, None].repeat(1, H))
    low, high = torch.cat([part.low for part in scored]), torch.cat([part.high for part in scored])
    return list(share_out(want.repeat_interleave(H), n, low, high).view(len(scored), H))


def by_rank_in_layers(scored: Sequence[Scored], n: int) -> list[Tensor]:  # -> L x [H] int64
    """Layers share evenly, and the heads of each by one ranking."""
    return [by_rank([part], int(each.sum()), 0)[0] for part, each in zip(scored, evenly(scored, n), strict=True)]


def bounds(scored: Sequence[Scored]) -> tuple[Tensor, Tensor]:  # -> [L] int64, [L] int64
    """The fewest and the most entries that all heads of a layer can hold alike; on the CPU."""
    low, high = torch.stack([part.low for part in scored]), torch.stack([part.high for part in scored])
    return low.amax(1).cpu(), high.amin(1).cpu()


def proportional(weight: Tensor, total: float, most: Tensor) -> Tensor:  # [X] >= 0, [X] -> [X] float64
    """Shares of `total` in proportion to `weight`, none above `most`; what does not fit goes to the others likewise.

    Weights that are all 0 count as equal. Where `most` does not hold the total, everything is full.
    """
    weight, most = weight.double().cpu(), most.double().cpu()
    share, open_ = torch.zeros_like(weight), torch.ones_like(weight, dtype=torch.bool)
    for _ in range(len(weight)):
        left = total - float(share[~open_].sum())
        pull = weight.masked_fill(~open_, 0.0)
        pull = pull if float(pull.sum()) > 0 else open_.double()
        share = torch.where(open_, left * pull / pull.sum(), share)
        over = open_ & (share > most)
        if not bool(over.any()):
            return share
        share, open_ = torch.where(over, most, share), open_ & ~over
        if not bool(open_.any()):
            break
    return share


def by_rank(scored: Sequence[Scored], n: int, floor: int) -> list[Tensor]:  # -> L x [H] int64
    """One ranking over all layers and heads given; each head gets at least `floor`, as far as that fits.

    Raises InfeasibleError as `share_out` does.
    """
    low, high = torch.cat([part.low for part in scored]), torch.cat([part.high for part in scored])
    least = torch.full_like(low, floor).clamp(low, high)
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
