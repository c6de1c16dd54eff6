"""PyramidKV: lower layers keep more than upper ones, in equal steps; inside a layer as SnapKV."""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..options import AtLeast1, Odd
from ..registry import Ask, Scored, Source, allocate, score
from ..shares import bounds, by_layer
from ..snapshot import LayerKV, Stats
from ..window import pooled

SOURCE = Source("arXiv:2406.02069", 2024, question=True, checked="worked examples")


@score(needs=("q_last",), source=SOURCE)
def pyramid_score(
    kv: LayerKV, stats: Stats, ask: Ask, *, window: AtLeast1 = 32, kernel: Odd = 7, pool: Literal["max", "avg"] = "max"
) -> Scored:
    """Attention from the last `window` queries, pooled over `kernel` neighbours; the window itself scores 0."""
    return Scored(pooled(kv, stats, ask, window, kernel, pool))


@allocate(source=SOURCE)
def pyramid_share(scored: Sequence[Scored], n: int, ask: Ask, *, beta: AtLeast1 = 20) -> list[Tensor]:
    """Beside what must stay, the top layer gets 1 / `beta` of an even share, those below it more in equal steps."""
    least, most = bounds(scored)
    L = len(scored)
    even = (n / len(scored[0].score) - int(least.sum())) / L
    bottom = min(2 * even - even / beta, int((most - least).min()))
    return by_layer(least + torch.linspace(bottom, 2 * even - bottom, L, dtype=torch.float64), scored, n)
