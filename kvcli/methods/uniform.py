"""The default allocation: every head of every layer the same number of entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..registry import Ask, Scored, allocate
from ..shares import by_layer


@allocate()
def uniform(scored: Sequence[Scored], n: int, ask: Ask) -> list[Tensor]:
    """The same number of entries for every head."""
    heads = sum(len(part.score) for part in scored)
    return by_layer(torch.full((len(scored),), n / heads, dtype=torch.float64), scored, n)
