"""The default allocation: every head of every layer the same number of entries."""

from collections.abc import Sequence

from torch import Tensor

from ..registry import Ask, Scored, allocate
from ..shares import evenly


@allocate()
def uniform(scored: Sequence[Scored], n: int, ask: Ask) -> list[Tensor]:
    """The same number of entries for every head."""
    return evenly(scored, n)
