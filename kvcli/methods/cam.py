"""CaM: the values of what goes are spread over the next entries that stay, by lot; on top of any score."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..options import AtLeast1
from ..receivers import split
from ..registry import Ask, Scored, Source, reduce
from ..snapshot import LayerKV, Stats, gather

SOURCE = Source("PMLR 235:58840", 2024, checked="worked examples")
LOT = 1 << 15  # beyond any layer: draws of its own, which the score `random` of the same seed says nothing about


@reduce(needs=("attn_mass",), source=SOURCE)
def cam(
    kv: LayerKV,
    stats: Stats,
    scored: Scored,
    count: Tensor,
    ask: Ask,
    *,
    window: AtLeast1 = 32,
    mode: Literal["sample", "expected"] = "sample",
    against: Literal["mean", "max"] = "mean",
    normalize: bool = False,
) -> tuple[LayerKV, Tensor]:
    """Add each dropped value, in equal parts, to the `window` next that stay, as likely as it is attended beside them.

    As published receivers grow: at 35 % to about three values each; `normalize` divides by what they took up. Sinks
    receive nothing. `against` is the mean of the receivers or the largest of all that stay, `expected` no lot.
    """
    kept, gone = split(kv, scored, count)
    small, mass, T = gather(kv, kept), stats.mass_of(kv).double(), kv.pos.shape[1]
    sinks = ((small.pos < ask.sink) & small.real).sum(1, keepdim=True)
    # what goes has the receivers begin <= index < end of `kept`: few near the end, none behind it
    begin = torch.searchsorted(kept.masked_fill(kept < 0, T), gone.masked_fill(gone < 0, T)).maximum(sinks)
    end = (begin + window).minimum(small.lens[:, None])
    weight = _chance(
        mass.gather(1, gone.clamp(min=0)), mass.gather(1, kept.clamp(min=0)) * small.real, begin, end, against
    )
    if mode == "sample":
        lot = torch.Generator().manual_seed(LOT + ask.seed * 65537 + ask.layer)
        drawn = torch.rand(kv.pos.shape, generator=lot).to(mass.device).gather(1, gone.clamp(min=0))
        weight = (drawn < weight).double()
    weight = (weight / (end - begin)).masked_fill(end <= begin, 0.0).float()
    v = torch.empty_like(small.v)
    for h, old in enumerate(small.v.float()):
        more, taken = _received(kv.v[h, gone[h].clamp(min=0)].float(), weight[h], begin[h], end[h], len(old))
        v[h] = (old + more) / (1 + taken) if normalize else old + more
    return replace(small, v=v), kept


def _chance(
    own: Tensor, others: Tensor, begin: Tensor, end: Tensor, against: str
) -> Tensor:  # [H, M], [H, n] -> [H, M]
    """How attended what goes is beside its receivers or all that stays, up to 1."""
    sums = pad(others.cumsum(1), (1, 0))
    mean = (sums.gather(1, end) - sums.gather(1, begin)) / (end - begin)
    beside = others.amax(1, keepdim=True) if against == "max" else mean
    return torch.where(beside > 0, own / beside, (own > 0).double()).clamp(max=1.0)


def _received(v: Tensor, weight: Tensor, begin: Tensor, end: Tensor, n: int) -> tuple[Tensor, Tensor]:
    """What each of n receivers gets of the values [M, Dv], and the sum of weights: differences of prefix sums."""
    sums = pad((torch.cat([v, torch.ones_like(v[:, :1])], 1) * weight[:, None]).cumsum(0), (0, 0, 1, 0))
    at = torch.arange(n, device=v.device)
    since, until = (torch.searchsorted(edge, at, right=True) for edge in (end, begin))
    taken = sums[until] - sums[since]
    return taken[:, :-1], taken[:, -1:]
