"""SnapKV: what the last queries of the prefix attend to, smoothed over neighbours."""

from typing import Literal

from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from ..kernels.window import window_scores
from ..options import AtLeast1, Odd
from ..registry import Ask, Scored, score
from ..snapshot import LayerKV, Stats


@score(needs=("q_last",), paper="arXiv:2404.14469")
def snapkv(
    kv: LayerKV, stats: Stats, ask: Ask, *, window: AtLeast1 = 32, kernel: Odd = 7, pool: Literal["max", "avg"] = "max"
) -> Scored:
    """Attention from the last `window` queries, pooled over `kernel` neighbours; the window itself scores 0."""
    if stats.q_last is None or stats.q_last_pos is None:
        raise ValueError("snapkv needs q_last")
    saved = stats.q_last.shape[1]
    used = min(window, saved)
    q, q_pos = stats.q_last[:, -used:], stats.q_last_pos[-used:]
    received = window_scores(q, q_pos, kv.k, kv.pos, kv.bias, ask.scale, ask.softcap, stats.sink_logit)
    before = (kv.pos < q_pos[0]) & kv.real
    return Scored(smooth(received * before, kernel, pool) * before)


def smooth(score: Tensor, kernel: int, pool: str) -> Tensor:  # [H, T] -> [H, T]
    """Largest or mean score among `kernel` neighbours, zero beyond the ends; a kernel of 1 changes nothing."""
    if pool == "max":
        return max_pool1d(score[None], kernel, stride=1, padding=kernel // 2)[0]
    return avg_pool1d(score[None], kernel, stride=1, padding=kernel // 2)[0]
