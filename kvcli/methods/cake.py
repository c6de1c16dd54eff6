"""CAKE: layers share the file by how widely, and how unsteadily, the last queries attend."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..options import AtLeast1, Odd, Positive
from ..registry import Ask, Scored, Source, allocate, score
from ..shares import bounds, by_layer, proportional
from ..snapshot import LayerKV, Stats
from ..window import before_window, last_queries, smooth, weights

SOURCE = Source("arXiv:2503.12491", 2025, question=True, checked="worked examples")


@score(needs=("q_last",), source=SOURCE)
def cake_score(
    kv: LayerKV, stats: Stats, ask: Ask, *, window: AtLeast1 = 32, gamma: Positive = 200.0, kernel: Odd = 5
) -> Scored:
    """Mean plus `gamma` variances of the attention from each of the last `window` queries, averaged over `kernel`.

    The weight is the entropy and the variance of the layer [2], over all heads.
    """
    before = before_window(kv, stats, window)
    scores, spreads = [], []
    for h, rows in enumerate(weights(kv, stats, ask, window)):
        mean, variance, entropy = moments(rows * before[h])
        scores.append((mean + gamma * variance).mean(0))
        spreads.append(torch.stack([entropy, variance.sum()]))
    alone = len(last_queries(stats, window)[1]) == 1
    note = "one query has no variance: CAKE scores by its attention alone, layers share evenly" if alone else ""
    spread = torch.stack(spreads).sum(0)
    return Scored(smooth(torch.stack(scores), kernel, "avg") * before, weight=spread, note=note)


def moments(rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # [G, W, T] -> [G, T], [G, T], []
    """Mean and unbiased variance over the queries, and the entropy of all; one query has no variance."""
    mean = rows.mean(1)
    variance = (rows - mean[:, None]).square_().sum(1) / max(rows.shape[1] - 1, 1)
    return mean, variance, -(rows * (rows + 1e-10).log_()).sum()


@allocate(source=SOURCE, after="cake")
def cake_share(
    scored: Sequence[Scored], n: int, ask: Ask, *, tau1: Positive = 1.0, tau2: Positive = 1.0
) -> list[Tensor]:
    """Layers share by entropy ** (1 / `tau1`) * variance ** (1 / `tau2`), beside what must stay in each."""
    spread = torch.stack([part.weight for part in scored if part.weight is not None]).double().cpu()  # [L, 2]
    power = spread.clamp(min=0).log() @ torch.tensor([1 / tau1, 1 / tau2], dtype=torch.float64)
    # Logarithms, since powers overflow; where every layer is at -inf they share evenly.
    pull = (power - power.max()).exp().nan_to_num(0.0)
    least, most = bounds(scored)
    free = n / len(scored[0].score) - int(least.sum())
    return by_layer(least + proportional(pull, max(free, 0.0), most - least), scored, n)
