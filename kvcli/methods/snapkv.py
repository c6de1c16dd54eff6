"""SnapKV: what the last queries of the prefix attend to, smoothed over neighbours."""

from typing import Literal

from ..options import AtLeast1, Odd
from ..registry import Ask, Scored, Source, score
from ..snapshot import LayerKV, Stats
from ..window import pooled

SOURCE = Source("arXiv:2404.14469", 2024, question=True, checked="worked examples")


@score(needs=("q_last",), source=SOURCE)
def snapkv(
    kv: LayerKV, stats: Stats, ask: Ask, *, window: AtLeast1 = 32, kernel: Odd = 7, pool: Literal["max", "avg"] = "max"
) -> Scored:
    """Attention from the last `window` queries, pooled over `kernel` neighbours; the window itself scores 0."""
    return Scored(pooled(kv, stats, ask, window, kernel, pool))
