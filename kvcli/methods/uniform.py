"""The default allocation: every head of every layer the same number of entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import share_out
from ..registry import Ask, Scored, allocate


@allocate()
def uniform(scored: Sequence[Scored], n: int, ask: Ask) -> list[Tensor]:
    """The same number of entries for every head."""
    low, high = torch.cat([part.low for part in scored]), torch.cat([part.high for part in scored])
    want = torch.full_like(low, n / len(low), dtype=torch.float64)
    return list(share_out(want, n, low, high).view(len(scored), -1))
