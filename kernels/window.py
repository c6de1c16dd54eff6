"""Window scores, the attention a few queries give each entry: q [Hq, W, D], k [H, T, D], bias [H, T] -> [H, T] float32.

For each query the softmax over the entries it sees (0 <= pos <= its position), summed over the W queries and averaged
over the G heads of a group; `softcap` bounds the logits before the bias, `sink_logit` [Hq] is one more logit in the
softmax, which no entry receives. With `moments` -> [3, H, T]: that sum, the largest weight over window and group, and
the squared deviations from the mean of those of a head's queries that see the entry, summed and averaged alike. A card
reads the entries twice, first for the log-sum-exps, and writes nothing of size W x T.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .banded import capped
from .launch import Kernel, tl, triton
from .lse import window_lse, with_sink
from .op import Op, random

LOGITS = 1 << 24  # numbers at once in the CPU twin
BLOCK = 1024  # entries at once there: their float32 copy stays in the cache


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
    """The definition, one query head after the other. A query that sees nothing adds nothing."""
    total, most, spread = score = torch.zeros(3, *pos.shape, device=k.device)
    G = len(q) // len(k)
    for j, rows in enumerate(q):
        h = j // G
        logit = capped(rows.float() @ k[h].float().T * scale, softcap)  # [W, T]
        seen = (pos[h] >= 0) & (pos[h] <= q_pos[:, None])
        logit = (logit if bias is None else logit + bias[h]).masked_fill(~seen, -math.inf)
        lse = with_sink(logit.logsumexp(-1), None if sink_logit is None else sink_logit[j])
        weight = (logit - lse[:, None]).exp().masked_fill(~seen, 0.0)
        total[h] += weight.sum(0) / G
        if moments and len(rows):
            most[h] = torch.maximum(most[h], weight.amax(0))
            spread[h] += _deviations(weight, seen)[2] / G
    return score if moments else total


Deviations = tuple[Tensor, Tensor, Tensor]  # how many, their mean, the sum of squared deviations from it


def _deviations(weight: Tensor, seen: Tensor) -> Deviations:  # [..., W, T], [W, T] -> [T], [..., T], [..., T]
    n = seen.sum(0)
    mean = weight.sum(-2) / n.clamp(min=1)
    return n, mean, (weight - mean.unsqueeze(-2)).masked_fill_(~seen, 0.0).square_().sum(-2)


def _together(one: Deviations, other: Deviations) -> Deviations:
    """Of both parts of a sample (Chan, Golub and LeVeque 1979): sums of squares would cancel."""
    n = one[0] + other[0]
    step, share = other[1] - one[1], other[0] / n.clamp(min=1)
    return n, one[1] + step * share, one[2] + other[2] + step.square() * one[0] * share


@Kernel
def _columns(  # type: ignore[no-untyped-def]
    q, q_pos, k, pos, bias, lse, score,
    scale, softcap, G, W, T,
    q_h, q_w, q_d, k_h, k_t, k_d,
    MOMENTS: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """score [1 or 3, H, T]: what BT entries of head i_h receive from all queries, whose lse is [H, G * W]."""
    i_t, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t, o_d = i_t.to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BD).to(tl.int64)
    m_t, m_d = o_t < T, o_d < D
    b_k = tl.load(k + i_h * k_h + o_t[:, None] * k_t + o_d[None, :] * k_d, mask=m_t[:, None] & m_d[None, :], other=0.0)
    b_pos = tl.load(pos + i_h * T + o_t, mask=m_t, other=-1)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    b_zero = tl.zeros([BT], tl.float32)
    b_total, b_most, b_spread = b_zero, b_zero, b_zero
    for i_g in range(G):
        g = i_h * G + i_g
        b_n, b_mean = b_zero, b_zero  # a query head has a mean of its own
        for w in range(0, W, BR):
            o_w = (w + tl.arange(0, BR)).to(tl.int64)
            m_w = o_w < W
            b_q = tl.load(
                q + g * q_h + o_w[None, :] * q_w + o_d[:, None] * q_d, mask=m_w[None, :] & m_d[:, None], other=0.0
            )
            b_q_pos = tl.load(q_pos + o_w, mask=m_w, other=-1)
            b_lse = tl.load(lse + g * W + o_w, mask=m_w, other=0.0)
            if UPCAST:
                b_q = b_q.to(tl.float32)
            b_x = tl.dot(b_k, b_q, input_precision="ieee") * scale  # [BT, BR]
            if softcap is not None:
                b_x = softcap * (2 * tl.sigmoid(2 * b_x / softcap) - 1)
            if bias is not None:
                b_x += tl.load(bias + i_h * T + o_t, mask=m_t, other=0.0)[:, None]
            seen = (b_pos >= 0)[:, None] & (b_pos[:, None] <= b_q_pos[None, :])
            b_weight = tl.where(seen, tl.exp(b_x - b_lse[None, :]), 0.0)
            b_sum = tl.sum(b_weight, 1)
            b_total += b_sum
            if MOMENTS:  # `_together` of what came before and these
                b_most = tl.maximum(b_most, tl.max(b_weight, 1))
                b_more = tl.sum(tl.where(seen, 1.0, 0.0), 1)
                b_here = b_sum / tl.maximum(b_more, 1.0)
                b_off = tl.where(seen, b_weight - b_here[:, None], 0.0)
                b_share = b_more / tl.maximum(b_n + b_more, 1.0)
                b_step = b_here - b_mean
                b_spread += tl.sum(b_off * b_off, 1) + b_step * b_step * b_n * b_share
                b_n += b_more
                b_mean += b_step * b_share
    at, H = score + i_h * T + o_t, tl.num_programs(1).to(tl.int64)
    tl.store(at, b_total / G, mask=m_t)
    if MOMENTS:
        tl.store(at + H * T, b_most, mask=m_t)
        tl.store(at + 2 * H * T, b_spread / G, mask=m_t)


def window_scores_fused(
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
    """The same in two Triton kernels."""
    (Hq, W, D), (H, T, _) = q.shape, k.shape
    tensors = (q, q_pos.contiguous(), k, pos.contiguous(), bias if bias is None else bias.contiguous())
    lse = window_lse(*tensors, scale, softcap, sink_logit) if T else None
    score = torch.empty(3 if moments else 1, H, T, device=k.device)
    sizes = (scale, softcap, Hq // H, W, T, *q.stride(), *k.stride())
    blocks = _blocks(D, q.element_size())
    _columns[triton.cdiv(T, blocks["BT"]), H](*tensors, lse, score, *sizes, MOMENTS=moments, **blocks)
    return score if moments else score[0]


def _blocks(D: int, itemsize: int) -> dict[str, int]:
    # windows are short: 16 queries at a time and none ahead, without spills; float32 products run in registers
    BT = 32 if itemsize == 4 else 128 if D <= 128 else 64
    options = {"num_warps": max(4, BT // 16), "num_stages": 1, "enable_fp_fusion": True}
    return {"D": D, "BD": max(16, triton.next_power_of_2(D)), "BR": 16, "BT": BT, **options}


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
    """A head at a time: products with blocks of its entries, softmax, and a thin product that sums the queries."""
    (H, T, _), W, G = k.shape, q.shape[1], len(q) // len(k)
    total, most, spread = score = torch.zeros(3, H, T)
    step = max(1, min(W, LOGITS // max(G * T, 1)))
    room = torch.empty(2, G * step, T)  # for all heads: fresh memory takes as long as a product
    for h, heads in enumerate(q.chunk(H) if W and T else ()):
        found: Deviations = torch.zeros(T), torch.zeros(G, T), torch.zeros(G, T)
        for rows, at in zip(torch.split(heads, step, 1), torch.split(q_pos, step), strict=True):
            logit, weight = room[:, : G * len(at)]
            seen = (pos[h] >= 0) & (pos[h] <= at[:, None])  # [B, T]
            _fill(logit, rows.float() * scale, k[h], seen, None if bias is None else bias[h], softcap)
            torch.softmax(logit, -1, out=weight)
            share = seen.any(1).float().repeat(G)  # [G * B], of the softmax that goes to entries
            if sink_logit is not None:
                share *= (logit.logsumexp(-1) - sink_logit.view(H, G)[h].repeat_interleave(len(at))).sigmoid()
            total[h] += share @ weight / G
            if moments:
                each = weight.mul_(share[:, None]).view(G, -1, T)
                torch.maximum(most[h], each.amax((0, 1)), out=most[h])
                found = _together(found, _deviations(each, seen))
        spread[h] = found[2].mean(0)
    return score if moments else total


def _fill(
    logit: Tensor, q: Tensor, k: Tensor, seen: Tensor, bias: Tensor | None, softcap: float | None
) -> None:  # [G * B, T], [G, B, D], [T, D], [B, T], [T]
    for i in range(0, len(k), BLOCK):
        part = slice(i, i + BLOCK)
        block = torch.mm(q.flatten(0, 1), k[part].float().T, out=logit[:, part])
        if softcap is not None:
            block.copy_(capped(block, softcap))
        if bias is not None:
            block += bias[part]
        if not bool(seen[:, part].all()):
            torch.unflatten(block, 0, q.shape[:2]).masked_fill_(~seen[:, part], torch.finfo(torch.float32).min)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, W, T, D = (case[name] for name in "HGWTD")
    generator = torch.Generator().manual_seed(seed)
    loud = 50 if case.get("loud") else 1  # logits of 1e4
    q = random((W, H * G, D), dtype, generator).transpose(0, 1) * loud  # strides as the model gives them
    k = random((H, T, D), dtype, generator) * loud
    order = torch.arange(T, dtype=torch.int32)
    lens = torch.randint(max(T // 2, 1), T + 1, (H, 1), generator=generator)
    lens[0] = T
    pos = torch.where(order < lens, order * 2 + 1, -1)
    q_pos = torch.arange(2 * T - W, 2 * T)
    bias = random((H, T), torch.float32, generator) if case["bias"] else None
    if bias is not None and case.get("far"):
        bias = torch.where(torch.rand((H, T), generator=generator) < 0.5, -1e9, bias)
    sink_logit = random((H * G,), torch.float32, generator) if case.get("sink") else None
    return q, q_pos, k, pos, bias, D**-0.5, case.get("softcap"), sink_logit, case.get("moments", False)


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, W, T, D = (case[name] for name in "HGWTD")
    numbers = 1 + case["bias"] + (3 if case.get("moments") else 1)  # position, bias, scores
    per_head = W * D * itemsize + (4 if case.get("sink") else 0)
    return H * T * (D * itemsize + 4 * numbers) + H * G * per_head + 8 * W, 4 * H * G * W * T * D


window_scores = Op(
    name="window_scores",
    ref=window_scores_ref,
    cpu=window_scores_cpu,
    fused=window_scores_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "W": 32, "T": 32768, "D": 128, "bias": False},
    variants=({}, {"bias": True}, {"softcap": 30.0, "sink": True}, {"moments": True}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "W": 1, "T": 1, "D": 16, "bias": False},
        {"H": 2, "G": 1, "W": 2, "T": 2, "D": 64, "bias": True},
        {"H": 2, "G": 3, "W": 65, "T": 63, "D": 80, "bias": True, "moments": True},
        {"H": 3, "G": 2, "W": 9, "T": 129, "D": 20, "bias": False, "moments": True},
        {"H": 1, "G": 1, "W": 17, "T": 1999, "D": 64, "bias": True, "moments": True},
        {"H": 2, "G": 2, "W": 17, "T": 65, "D": 16, "bias": True, "far": True, "softcap": 2.0, "sink": True},
        {"H": 2, "G": 2, "W": 63, "T": 65, "D": 96, "bias": False, "loud": True, "moments": True},
    ),
)
