"""Key norm: entries whose keys are short are the ones that queries attend to."""

import torch

from ..registry import Ask, Scored, Source, score
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2406.11430", 2024, checked="worked examples, kvpress")


@score(source=SOURCE)
def knorm(kv: LayerKV, stats: Stats, ask: Ask) -> Scored:
    """The shortest keys stay, by their 2-norm."""
    return Scored(-torch.linalg.vector_norm(kv.k, dim=-1, dtype=torch.float32))
