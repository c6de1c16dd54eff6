"""D2O: layers of even attention get more entries, and what goes is merged into its likeness, if it is like enough."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from ..options import Positive, Share
from ..receivers import alike, fold, receive
from ..registry import Ask, Scored, Source, allocate, reduce, score
from ..shares import by_layer, proportional
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2406.13035", 2024, question=True, checked="worked examples")
LEAST = 0.01  # of the tokens, in any layer
WHOLE = (0, 1, -1)  # layers that are not compressed

Layers = Literal["code", "variance", "uniform"]


@score(name="d2o", needs=("attn_mass",), source=SOURCE, by_budget=True)
def d2o_score(kv: LayerKV, stats: Stats, ask: Ask, *, layer: Layers = "code") -> Scored:
    """Attention an entry has received; the reduction also keeps the newest."""
    mass, lens = stats.mass_of(kv).masked_fill(~kv.real, 0.0), kv.lens[:, None]
    off = (mass - mass.sum(1, keepdim=True) / lens).masked_fill(~kv.real, 0.0)
    shared = layer != "uniform" and not _whole(ask)
    note = "not kept whole, as layers 0, 1 and the last would be: too little would be left for the others"
    return Scored(mass, weight=off.square().sum(1) / lens[:, 0], note=note if shared else "")


@allocate(name="d2o", source=SOURCE, after="d2o")
def d2o_share(scored: Sequence[Scored], n: int, ask: Ask, *, layer: Layers = "code") -> list[Tensor]:
    """Layers whose attention is spread evenly get more; 0, 1 and the last stay whole where the budget allows it.

    code: unevenness is compared among the heads of a layer; variance: among layers; uniform: all layers are alike.
    """
    most = torch.stack([part.high for part in scored]).cpu().amin(1).double()
    rest = torch.ones(len(most), dtype=torch.bool)
    if layer != "uniform" and _whole(ask):
        rest[list(WHOLE)] = False
    uneven = torch.stack([_uneven(part, ask, layer) for part in scored])
    left = n / len(scored[0].score) - float(most[~rest].sum())
    want = most.clone()
    want[rest] = proportional((-uneven[rest]).softmax(0), left, most[rest]).clamp(min=LEAST * ask.N)
    return by_layer(want, scored, n)


def _whole(ask: Ask) -> bool:
    """Whether the budget holds some layers whole and a bit of the others."""
    others, least = ask.L - len(WHOLE), max(LEAST * ask.N, ask.sink + ask.recent + 1)
    return others > 0 and ask.B * ask.L - len(WHOLE) * ask.N >= others * least


def _uneven(scored: Scored, ask: Ask, layer: Layers) -> Tensor:
    if scored.weight is None:
        raise ValueError("the score of d2o carries the variances of its heads")
    variance = scored.weight.double().cpu()
    if layer == "uniform":
        return torch.zeros((), dtype=torch.float64)
    if layer == "variance":
        return variance.mean() / ask.N
    low, high = variance.aminmax()
    return ((variance - low) / (high - low)).nan_to_num(0.0).mean()


@reduce(source=SOURCE, adds=lambda **_: ("span",))
def d2o(
    kv: LayerKV,
    stats: Stats,
    scored: Scored,
    count: Tensor,
    ask: Ask,
    *,
    merge: Literal["code", "paper"] = "code",
    eps: Positive = math.e,
    filter: Literal["head", "layer"] = "head",
    heavy: Share = 0.5,
) -> tuple[LayerKV, Tensor]:
    """What goes is merged into the most similar entry that stays, if it is no less alike than the mean.

    `heavy` of a head's entries have the best scores, the others are the newest. merge=code weighs by cosines, whose
    sum is not made up to 1; paper by their exponentials, and the receiver by `eps`. `filter` says whose mean. All that
    goes is compared with all that stays: the time grows with the square of the length.
    """
    to, cosine = receive(kv, _with_newest(kv, scored, count, heavy), count)
    to = alike(to, cosine, filter)
    weight, own, total = cosine, torch.ones_like(to.size), 1 + to.size
    if merge == "paper":
        weight, own = cosine.exp(), torch.full_like(to.size, eps)
        total = own + to.total(weight)
    return fold(kv, to, weight, own, total), to.kept


def _with_newest(kv: LayerKV, scored: Scored, count: Tensor, heavy: float) -> Scored:
    """The newest of each head must stay too, as far as there is room beside what must anyway."""
    newest, must = count - (heavy * count).long(), scored.score.isposinf()
    older = kv.lens[:, None] - 1 - torch.arange(kv.pos.shape[1], device=kv.pos.device)  # 0 for the newest
    more = kv.real & (older < newest[:, None]) & ~must
    more &= more.flip(1).cumsum(1).flip(1) <= (count - must.sum(1))[:, None]
    return replace(scored, score=scored.score.masked_fill(more, torch.inf))
