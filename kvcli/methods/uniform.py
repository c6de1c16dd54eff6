"""The default allocation: every head of every layer the same number of entries."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import share_out
from ..registry import Ask, Scored, allocate


@allocate()
def uniform(scored: Sequence[Scored], n: int, ask: Ask) -> list[Tensor]:
    """The same number of entries for every head."""
    kept = torch.stack([part.score.isposinf().sum(1) for part in scored])  # [L, H]
    real = torch.stack([(part.score > -torch.inf).sum(1) for part in scored])
    want = torch.full((real.numel(),), n / real.numel(), dtype=torch.float64)
    return list(share_out(want, n, kept.flatten().clamp(min=1), real.flatten()).view_as(real))
