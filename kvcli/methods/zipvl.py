"""ZipVL, the version that evicts: layers keep the tokens that hold a share of their attention, alike in all heads."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..options import Share
from ..probes import needed, probe_mass, remaining
from ..registry import Ask, Scored, Source, allocate, score
from ..shares import bounds, by_layer
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2410.08584", 2024, question=True, checked="worked examples")


@score(needs=("q_last", "q_probe"), source=SOURCE, sizes=lambda tau, **_: tau is not None)
def zipvl_score(kv: LayerKV, stats: Stats, ask: Ask, *, tau: Share | None = None) -> Scored:
    """Attention by query that can see a token; `tau`, the share of all attention a layer keeps, needs no budget.

    The weight [N] is what is left of the attention before each of its tokens, the most attended first, is taken.
    """
    mass, by_query = probe_mass(kv, stats, ask)
    rest = remaining(mass)
    count = None if tau is None else torch.full_like(kv.lens, needed(rest, tau))
    return Scored(kv.by_entry(by_query), weight=rest, count=count)


@allocate(source=SOURCE, after="zipvl")
def zipvl_share(scored: Sequence[Scored], n: int, ask: Ask) -> list[Tensor]:
    """Each layer keeps as many as hold the same share of its attention, whatever share the budget comes to."""
    rest = torch.stack([part.weight for part in scored if part.weight is not None]).cpu()  # [L, N]
    rank = torch.arange(rest.shape[1])
    least, most = (bound[:, None] for bound in bounds(scored))
    rest = rest.masked_fill(rank >= most, -torch.inf).masked_fill(rank < least, torch.inf)
    first = rest.flatten().argsort(descending=True, stable=True)[: n // len(scored[0].score)]
    return by_layer(torch.bincount(first // rest.shape[1], minlength=len(rest)), scored, n)
