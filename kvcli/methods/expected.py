"""Expected attention: what queries like those of the document would attend to from the positions behind it."""

from functools import reduce
from typing import Any

import torch
from torch import Tensor

from ..kernels.banded import capped
from ..options import AtLeast1, Share
from ..registry import Ask, Scored, Source, score
from ..rotations import Average, ahead, need_freq
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2510.00636", 2025, checked="worked examples, kvpress")


@score(needs=("q_mean", "q_cov"), source=SOURCE, by_budget=True)
def expected(
    kv: LayerKV,
    stats: Stats,
    ask: Ask,
    *,
    rope_average: Average = "matched",
    future: AtLeast1 = 512,
    epsilon: Share = 0.0,
    vnorm: bool = True,
) -> Scored:
    """Attention expected of queries at the next `future` positions, plus `epsilon`, times the value's norm (`vnorm`).

    Queries are taken as normal, with the moments of the document's, and sinks as no part of what they attend to.
    `rope_average`: their moments over all those positions, those under the mean rotation, or one normal for each.
    """
    if stats.q_mean is None or stats.q_cov is None or ask.freq is None:
        raise ValueError("q_mean or q_cov is missing: name it in needs=; or ask.freq is, see check")
    queries = ahead(rope_average, stats.q_mean, stats.q_cov, ask.N, future, ask.freq)
    each = (log_expected(kv, mean, cov, ask) for mean, cov in queries)
    logit = torch.unflatten(reduce(torch.logaddexp, each), 0, (len(kv.pos), -1))  # [H, G, T]
    if kv.bias is not None:
        logit += kv.bias[:, None]
    others = kv.real & (kv.pos >= ask.sink)
    # Lowest rather than -inf: a head that holds nothing but sinks scores 0.
    weight = logit.masked_fill(~others[:, None], torch.finfo(logit.dtype).min).softmax(-1).mean(1) * others
    size = torch.linalg.vector_norm(kv.v, dim=-1, dtype=torch.float32) if vnorm else 1.0
    return Scored((weight + epsilon) * size)


@expected.check
def check(ask: Ask, **_: Any) -> None:
    need_freq(ask, "expected", "another method")


def log_expected(kv: LayerKV, mean: Tensor, cov: Tensor, ask: Ask) -> Tensor:  # [Hq, D], [Hq, D, D] -> [Hq, T] float32
    """log E exp(logit) over normal queries, without the bias; padding gives numbers without meaning.

    A soft-cap is put on the outcome, which no cap can let be above it: exact where nothing varies.
    """
    found = []
    groups = (torch.unflatten(part.float(), 0, (len(kv.k), -1)) for part in (mean, cov))
    for k, *queries in zip(kv.k, *groups, strict=True):
        k = k.float() * ask.scale
        found += [capped(k @ mu + (k @ sigma * k).sum(-1) / 2, ask.softcap) for mu, sigma in zip(*queries, strict=True)]
    return torch.stack(found)
