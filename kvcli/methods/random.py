"""Entries drawn by lot: the floor any method must beat."""

import torch

from ..registry import Ask, Scored, score
from ..snapshot import LayerKV, Stats


@score()
def random(kv: LayerKV, stats: Stats, ask: Ask) -> Scored:
    """Entries drawn by lot, the same for a seed; the floor any method must beat."""
    generator = torch.Generator().manual_seed(ask.seed * 65537 + ask.layer)
    return Scored(torch.rand(kv.pos.shape, generator=generator).to(kv.pos.device))
