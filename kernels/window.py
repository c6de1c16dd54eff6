"""Window scores, the attention a few queries give each entry: q [Hq, W, D], k [H, T, D], bias [H, T] -> [H, T] float32.

For each query the softmax over the entries it sees (0 <= pos <= its position), summed over the W queries and averaged
over the G heads of a group; `softcap` bounds the logits before the bias, `sink_logit` [Hq] is one more logit in the
softmax, which no entry receives. With `moments` -> [3, H, T]: that sum, the largest weight over window and group, and
the sum of squared deviations from the mean, over the queries of a head that see the entry, averaged over the group.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .banded import capped
from .launch import triton
from .op import Op, random, strained
from .window_card import window_scores_fused

BLOCK = 1024  # entries at once in the CPU twin: their float32 copy stays in the cache
LOGITS = 1 << 25  # numbers at once in the CPU twin, unless one query head has more


def window_scores_ref(
    q: Tensor,  # [Hq, W, D]
    q_pos: Tensor,  # [W] int
    k: Tensor,  # [H, T, D]
    pos: Tensor,  # [H, T] int32, -1 for padding, which scores 0
    bias: Tensor | None,  # [H, T] float32, added to the logits
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,  # [Hq] float32
    moments: bool = False,
) -> Tensor:  # [H, T] or [3, H, T] float32
    """The definition. A query that sees nothing adds nothing."""
    score = torch.zeros(3 if moments else 1, *pos.shape, device=k.device)
    G = len(q) // len(k)
    for j, rows in enumerate(q):
        h = j // G
        logit = capped(rows.float() @ k[h].float().T * scale, softcap)  # [W, T]
        seen = _seen(pos[h], q_pos)
        logit = (logit if bias is None else logit + bias[h]).masked_fill(~seen, -math.inf)
        lse = logit.logsumexp(-1)
        if sink_logit is not None:
            lse = torch.logaddexp(lse, sink_logit[j].float())
        weight = (logit - lse[:, None]).exp().masked_fill(~seen, 0.0)
        score[0, h] += weight.sum(0) / G
        if moments and len(rows):
            score[1, h] = torch.maximum(score[1, h], weight.amax(0))
            score[2, h] += _spread(weight, seen) / G
    return score if moments else score[0]


def _seen(pos: Tensor, q_pos: Tensor) -> Tensor:  # [T], [W] -> [W, T] bool
    return (pos >= 0) & (pos <= q_pos[:, None])


def _spread(weight: Tensor, seen: Tensor) -> Tensor:  # [..., W, T], [W, T] -> [..., T]
    """Sum of the squared deviations of what is seen from its mean."""
    mean = weight.sum(-2, keepdim=True) / seen.sum(0).clamp(min=1)
    return (weight - mean).masked_fill_(~seen, 0.0).square_().sum(-2)


def window_scores_cpu(
    q: Tensor,
    q_pos: Tensor,
    k: Tensor,
    pos: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
    moments: bool = False,
) -> Tensor:  # [H, T] or [3, H, T] float32
    """A head at a time: float32 products with blocks of its entries, softmax, and a thin product to sum the queries."""
    (Hq, W, _), (H, T, _) = q.shape, k.shape
    score, G = torch.zeros(3 if moments else 1, H, T), Hq // H
    step = min(G, max(1, LOGITS // max(W * T, 1)))
    room = torch.empty(2, step, W, T)  # for all heads: fresh memory takes as long as a product
    for h, heads in enumerate(q.chunk(H) if W and T else ()):
        start = _first_hidden(pos[h], q_pos)
        seen = _seen(pos[h, start:], q_pos)
        live = seen.any(1) | (start > 0)
        for i, rows in enumerate(torch.split(heads, step)):  # [g, W, D]
            logit, weight = room[:, : len(rows)]  # [g, W, T]
            _fill(logit, rows.float() * scale, k[h], None if bias is None else bias[h], softcap)
            logit[..., start:].masked_fill_(~seen, torch.finfo(torch.float32).min)
            torch.softmax(logit, -1, out=weight)
            share = live.float().expand(len(rows), -1)  # [g, W], of the softmax that goes to entries
            if sink_logit is not None:
                sinks = torch.split(sink_logit.view(H, G, 1)[h], step)[i]
                share = share * (logit.logsumexp(-1) - sinks).sigmoid()
            score[0, h] += share.flatten() @ weight.flatten(0, 1) / G
            if moments:
                _add_moments(score[1:, h], weight.mul_(share[..., None]), pos[h], q_pos, G)
    return score if moments else score[0]


def _first_hidden(pos: Tensor, q_pos: Tensor) -> int:  # [T], [W]
    """All queries see the entries before it."""
    hidden = ((pos < 0) | (pos > q_pos.min())).nonzero()
    return int(hidden[0]) if len(hidden) else len(pos)


def _fill(
    logit: Tensor, q: Tensor, k: Tensor, bias: Tensor | None, softcap: float | None
) -> None:  # [g, W, T], [g, W, D], [T, D], [T]
    rows, products = q.flatten(0, 1), logit.flatten(0, 1)
    for i in range(0, len(k), BLOCK):
        part = slice(i, i + BLOCK)
        block = torch.mm(rows, k[part].float().T, out=products[:, part])
        if softcap is not None:
            block.copy_(capped(block, softcap))
        if bias is not None:
            block += bias[part]


def _add_moments(
    score: Tensor, weight: Tensor, pos: Tensor, q_pos: Tensor, G: int
) -> None:  # [2, T], [g, W, T], [T], [W]
    for i in range(0, len(pos), BLOCK):
        part = slice(i, i + BLOCK)
        block, most = weight[..., part], score[0, part]
        torch.maximum(most, block.amax((0, 1)), out=most)
        score[1, part] += _spread(block, _seen(pos[part], q_pos)).sum(0) / G


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, W, T, D = (case[name] for name in "HGWTD")
    generator = torch.Generator().manual_seed(seed)
    q = random((W, H * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    k = random((H, T, D), dtype, generator)
    order = torch.arange(T, dtype=torch.int32)
    lens = torch.randint(max(T // 2, 1), T + 1, (H, 1), generator=generator)
    lens[0] = T
    pos = torch.where(order < lens, order * 2 + 1, -1)
    q_pos = torch.arange(2 * T - W, 2 * T)
    bias = random((H, T), torch.float32, generator) if case["bias"] else None
    q, bias = strained(case, q, bias)
    sink_logit = random((H * G,), torch.float32, generator) if case.get("sink") else None
    return q, q_pos, k, pos, bias, D**-0.5, case.get("softcap"), sink_logit, case.get("moments", False)


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, W, T, D = (case[name] for name in "HGWTD")
    score = 12 if case.get("moments") else 4
    per_entry = D * itemsize + 4 + (4 if case["bias"] else 0) + score  # key, position, bias, score
    per_head = W * D * itemsize + (4 if case.get("sink") else 0)
    return H * T * per_entry + H * G * per_head + 8 * W, 4 * H * G * W * T * D


window_scores = Op(
    name="window_scores",
    ref=window_scores_ref,
    cpu=window_scores_cpu,
    fused=window_scores_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "W": 32, "T": 32768, "D": 128, "bias": False},
    variants=({}, {"bias": True, "moments": True}, {"softcap": 30.0, "sink": True}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "W": 1, "T": 1, "D": 16, "bias": False},
        {"H": 2, "G": 1, "W": 2, "T": 2, "D": 64, "bias": True, "moments": True},
        {"H": 2, "G": 3, "W": 63, "T": 65, "D": 80, "bias": True, "moments": True},
        {"H": 1, "G": 2, "W": 3, "T": 1999, "D": 64, "bias": True, "moments": True},
        {"H": 2, "G": 2, "W": 17, "T": 65, "D": 16, "bias": True, "softcap": 2.0, "sink": True, "moments": True},
        {"H": 2, "G": 2, "W": 65, "T": 63, "D": 96, "bias": True, "far": True, "sink": True, "moments": True},
        {"H": 1, "G": 2, "W": 129, "T": 129, "D": 64, "bias": False, "loud": True, "moments": True},
        {"H": 3, "G": 2, "W": 9, "T": 129, "D": 20, "bias": False},
    ),
)
