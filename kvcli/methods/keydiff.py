"""KeyDiff: keys that point where all keys point say nothing new."""

import torch
from torch.nn.functional import normalize

from ..registry import Ask, Scored, Source, score
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2504.15364", 2025, checked="worked examples, kvpress")


@score(source=SOURCE)
def keydiff(kv: LayerKV, stats: Stats, ask: Ask) -> Scored:
    """Keys least like the mean direction of their head's keys stay."""
    unit = normalize(kv.k.float(), dim=-1).masked_fill(~kv.real[..., None], 0.0)  # [H, T, D]
    mean = unit.sum(1) / kv.lens[:, None]
    return Scored(-torch.cosine_similarity(unit, mean[:, None], dim=-1))
