"""Global allocation: all heads of all layers share the entries by one ranking."""

from collections.abc import Sequence

from torch import Tensor

from ..options import Share
from ..registry import Ask, Scored, allocate
from ..shares import by_rank


@allocate(name="global")
def ranking(scored: Sequence[Scored], n: int, ask: Ask, *, floor: Share = 0.2) -> list[Tensor]:
    """One ranking over all layers and heads; each head gets at least `floor` of an even share."""
    return by_rank(scored, n, int(floor * ask.B))
