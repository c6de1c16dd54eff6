"""What the last queries of a document attend to, and its smoothing: shared by the methods that watch a window."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import avg_pool1d, max_pool1d

from .kernels.banded import capped
from .kernels.window import window_scores
from .registry import Ask
from .snapshot import LayerKV, Stats


def last_queries(stats: Stats, window: int) -> tuple[Tensor, Tensor]:  # -> [Hq, W, D], [W]
    """The last `window` queries that were saved, or as many as there are, and their positions."""
    if stats.q_last is None or stats.q_last_pos is None:
        raise ValueError("q_last is missing: name it in needs=")
    used = min(window, stats.q_last.shape[1])
    return stats.q_last[:, -used:], stats.q_last_pos[-used:]


def received(kv: LayerKV, stats: Stats, ask: Ask, window: int) -> Tensor:  # -> [H, T] float32
    """Attention from the last `window` queries, summed over them, mean over the group."""
    q, q_pos = last_queries(stats, window)
    found: Tensor = window_scores(q, q_pos, kv.k, kv.pos, kv.bias, ask.scale, ask.softcap, stats.sink_logit)
    return found


def weights(kv: LayerKV, stats: Stats, ask: Ask, window: int) -> Iterator[Tensor]:  # H x [G, W, T] float32
    """The attention weights of the last `window` queries themselves, a KV head at a time; 0 for what is not seen."""
    q, q_pos = last_queries(stats, window)
    groups = torch.unflatten(q, 0, (len(kv.k), -1)).float()  # [H, G, W, D]
    sinks = None if stats.sink_logit is None else stats.sink_logit.float().view(*groups.shape[:2], 1, 1)
    for h, rows in enumerate(groups):
        seen = kv.real[h] & (kv.pos[h] <= q_pos[:, None])  # [W, T]
        # What is not seen may hold anything, NaN too.
        keys = kv.k[h].float().masked_fill(~kv.real[h, :, None], 0.0)
        logit = capped(rows @ keys.mT * ask.scale, ask.softcap)
        logit = (logit if kv.bias is None else logit + kv.bias[h]).masked_fill_(~seen, -math.inf)
        if sinks is not None:
            logit = torch.cat([logit, sinks[h].expand(*logit.shape[:2], 1)], -1)
        yield logit.softmax(-1)[..., : len(keys)].nan_to_num_(0.0)


def before_window(kv: LayerKV, stats: Stats, window: int) -> Tensor:  # -> [H, T] bool
    """Which entries lie before the last `window` queries; those behind score 0, `recent=` keeps them."""
    return kv.real & (kv.pos < last_queries(stats, window)[1][0])


def smooth(score: Tensor, kernel: int, pool: str) -> Tensor:  # [..., T] -> [..., T]
    """Largest or mean score among `kernel` neighbours, zero beyond the ends; a kernel of 1 changes nothing."""
    pooled = max_pool1d if pool == "max" else avg_pool1d
    flat = score.reshape(1, -1, score.shape[-1])
    return pooled(flat, kernel, stride=1, padding=kernel // 2).view(score.shape)


def pooled(kv: LayerKV, stats: Stats, ask: Ask, window: int, kernel: int, pool: str) -> Tensor:  # -> [H, T] float32
    """Attention from the last `window` queries to what lies before them, smoothed; the window itself scores 0."""
    before = before_window(kv, stats, window)
    return smooth(received(kv, stats, ask, window) * before, kernel, pool) * before


def over_heads(kv: LayerKV, score: Tensor, N: int) -> Tensor:  # [H, T] -> [N] float32
    """Mean over the heads of what the entries at each position score; one that a head does not hold counts 0."""
    at = torch.where(kv.real, kv.pos, N).long()
    return score.new_zeros(len(score), N + 1).scatter_(1, at, score)[:, :N].mean(0)
