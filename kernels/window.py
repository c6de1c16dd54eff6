"""Window scores, the attention a few queries give each entry: q [Hq, W, D], k [H, T, D], bias [H, T] -> [H, T] float32.

For each query the softmax over the entries it sees (0 <= pos <= its position), summed over the W queries and averaged
over the G heads of a group; `softcap` bounds the logits before the bias, `sink_logit` [Hq] is one more logit in the
softmax, which no entry receives. On a card: log-sum-exps over slices of the entries, then one program for every block
of entries walks all G * W queries and stores once: entries are read twice, nothing of size W x T is written.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .banded import capped
from .launch import Kernel, tl, triton
from .op import Op, random

BLOCK = 64  # queries at once in the reference
LOGITS = 1 << 24  # numbers at once in the CPU twin
SLICE = 1024  # entries under one partial log-sum-exp


def window_scores_ref(
    q: Tensor,  # [Hq, W, D]
    q_pos: Tensor,  # [W] int
    k: Tensor,  # [H, T, D]
    pos: Tensor,  # [H, T] int32, -1 for padding, which scores 0
    bias: Tensor | None,  # [H, T] float32, added to the logits
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,  # [Hq] float32
) -> Tensor:  # [H, T] float32
    """The definition. A query that sees nothing adds nothing."""
    score = torch.zeros(pos.shape, device=k.device)
    for h, rows in enumerate(q.chunk(len(k))):  # [G, W, D]
        for part, at in zip(torch.split(rows, BLOCK, 1), torch.split(q_pos, BLOCK), strict=True):
            logit = capped(part.float() @ k[h].float().T * scale, softcap)  # [G, B, T]
            seen = (pos[h] >= 0) & (pos[h] <= at[:, None])  # [B, T]
            logit = (logit if bias is None else logit + bias[h]).masked_fill(~seen, -math.inf)
            lse = _with_sink(logit.logsumexp(-1), None if sink_logit is None else sink_logit.chunk(len(k))[h][:, None])
            score[h] += (logit - lse[..., None]).exp().masked_fill(~seen, 0.0).sum((0, 1)) / len(rows)
    return score


def _with_sink(lse: Tensor, sink_logit: Tensor | None) -> Tensor:
    return lse if sink_logit is None else torch.logaddexp(lse, sink_logit.float())


@Kernel
def _slice_lse(  # type: ignore[no-untyped-def]
    q, q_pos, k, pos, bias, lse,
    scale, softcap, G, W, T,
    q_h, q_w, q_d, k_h, k_t, k_d,
    D: tl.constexpr, SLICE: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """lse [H, S, G * W]: the log-sum-exp of BR queries of head i_h over the slice i_s of its entries."""
    i_r, i_s, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    o_r, o_d = i_r * BR + tl.arange(0, BR), tl.arange(0, BD)
    m_r, m_d = o_r < G * W, o_d < D
    g, w = (i_h * G + o_r // W).to(tl.int64), (o_r % W).to(tl.int64)
    b_q = tl.load(
        q + g[:, None] * q_h + w[:, None] * q_w + o_d[None, :].to(tl.int64) * q_d,
        mask=m_r[:, None] & m_d[None, :], other=0.0,
    )  # fmt: skip
    b_q_pos = tl.load(q_pos + w, mask=m_r, other=-1)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    b_max = tl.full([BR], float("-inf"), tl.float32)
    b_sum = tl.zeros([BR], tl.float32)
    for t in range(0, tl.minimum(SLICE, T - i_s * SLICE), BT):
        o_t = i_s.to(tl.int64) * SLICE + t + tl.arange(0, BT)
        m_t = o_t < T
        b_k = tl.load(
            k + i_h * k_h + o_t[None, :] * k_t + o_d[:, None].to(tl.int64) * k_d,
            mask=m_t[None, :] & m_d[:, None], other=0.0,
        )  # fmt: skip
        b_pos = tl.load(pos + i_h * T + o_t, mask=m_t, other=-1)
        if UPCAST:
            b_k = b_k.to(tl.float32)
        b_x = tl.dot(b_q, b_k, input_precision="ieee") * scale  # [BR, BT]
        if softcap is not None:
            b_x = softcap * (2 * tl.sigmoid(2 * b_x / softcap) - 1)
        if bias is not None:
            b_x += tl.load(bias + i_h * T + o_t, mask=m_t, other=0.0)[None, :]
        seen = (b_pos >= 0)[None, :] & (b_pos[None, :] <= b_q_pos[:, None])
        b_x = tl.where(seen, b_x, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_sum = b_sum * tl.exp(b_max - b_base) + tl.sum(tl.exp(b_x - b_base[:, None]), 1)
        b_max = b_new
    S = tl.num_programs(1)
    tl.store(lse + (i_h * S + i_s) * (G * W) + o_r, b_max + tl.log(b_sum), mask=m_r)


@Kernel
def _column_sums(  # type: ignore[no-untyped-def]
    q, q_pos, k, pos, bias, lse, score,
    scale, softcap, G, W, T,
    q_h, q_w, q_d, k_h, k_t, k_d,
    D: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """score [H, T]: what BT entries of head i_h receive from all queries, whose lse is [H, G * W]."""
    i_t, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t, o_d = i_t.to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BD)
    m_t, m_d = o_t < T, o_d < D
    b_k = tl.load(
        k + i_h * k_h + o_t[:, None] * k_t + o_d[None, :].to(tl.int64) * k_d,
        mask=m_t[:, None] & m_d[None, :], other=0.0,
    )  # fmt: skip
    b_pos = tl.load(pos + i_h * T + o_t, mask=m_t, other=-1)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    b_score = tl.zeros([BT], tl.float32)
    for r in range(0, G * W, BR):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < G * W
        g, w = (i_h * G + o_r // W).to(tl.int64), (o_r % W).to(tl.int64)
        b_q = tl.load(
            q + g[None, :] * q_h + w[None, :] * q_w + o_d[:, None].to(tl.int64) * q_d,
            mask=m_r[None, :] & m_d[:, None], other=0.0,
        )  # fmt: skip
        b_q_pos = tl.load(q_pos + w, mask=m_r, other=-1)
        b_lse = tl.load(lse + i_h * (G * W) + o_r, mask=m_r, other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_x = tl.dot(b_k, b_q, input_precision="ieee") * scale  # [BT, BR]
        if softcap is not None:
            b_x = softcap * (2 * tl.sigmoid(2 * b_x / softcap) - 1)
        if bias is not None:
            b_x += tl.load(bias + i_h * T + o_t, mask=m_t, other=0.0)[:, None]
        seen = (b_pos >= 0)[:, None] & (b_pos[:, None] <= b_q_pos[None, :])
        b_score += tl.sum(tl.where(seen, tl.exp(b_x - b_lse[None, :]), 0.0), 1)
    tl.store(score + i_h * T + o_t, b_score / G, mask=m_t)


def window_scores_fused(
    q: Tensor,
    q_pos: Tensor,
    k: Tensor,
    pos: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:  # [H, T] float32
    """The same in two Triton kernels."""
    (Hq, W, D), (H, T, _) = q.shape, k.shape
    if not (T and W):
        return torch.zeros(pos.shape, device=k.device)
    rows, blocks = Hq // H * W, _blocks(D, q.element_size())
    tensors = (q, q_pos.contiguous(), k, pos.contiguous(), None if bias is None else bias.contiguous())
    sizes = (scale, softcap, Hq // H, W, T, *q.stride(), *k.stride())
    lse = torch.empty(H, triton.cdiv(T, SLICE), rows, device=k.device)
    grid = triton.cdiv(rows, blocks["BR"]), lse.shape[1], H
    _slice_lse[grid](*tensors, lse, *sizes, SLICE=SLICE, **blocks)
    score = torch.empty(H, T, device=k.device)
    whole = _with_sink(lse.logsumexp(1), None if sink_logit is None else sink_logit.view(H, -1).repeat_interleave(W, 1))
    _column_sums[triton.cdiv(T, blocks["BT"]), H](*tensors, whole, score, *sizes, **blocks)
    return score


def _blocks(D: int, itemsize: int) -> dict[str, int]:
    # float32 products run in registers, not tensor cores, where larger tiles would spill
    BD = max(16, triton.next_power_of_2(D))
    BR, BT = (16, 32) if itemsize == 4 or BD > 128 else (64, 64)
    options = {"num_warps": 4, "num_stages": 2, "enable_fp_fusion": True}
    return {"D": D, "BD": BD, "BR": BR, "BT": BT, **options}


def window_scores_cpu(
    q: Tensor,
    q_pos: Tensor,
    k: Tensor,
    pos: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:  # [H, T] float32
    """A head at a time: one float32 product, softmax, and the sum over queries as a second, thin product."""
    H, T, D = k.shape
    G = len(q) // H
    score = torch.zeros(H, T)
    step = max(1, LOGITS // max(G * T, 1))
    for h, rows in enumerate(q.chunk(H)):
        keys = k[h].float().T
        for part, at in zip(torch.split(rows, step, 1), torch.split(q_pos, step), strict=True):
            logit = capped(part.float().mul(scale).reshape(-1, D) @ keys, softcap)  # [G * B, T]
            if bias is not None:
                logit += bias[h]
            seen = (pos[h] >= 0) & (pos[h] <= at[:, None])
            logit.view(G, -1, T).masked_fill_(~seen, torch.finfo(torch.float32).min)
            weight = (seen.any(1) / G).repeat(G)
            if sink_logit is not None:
                weight = weight * (logit.logsumexp(-1) - sink_logit.view(H, G)[h].repeat_interleave(len(at))).sigmoid()
            score[h] += weight @ logit.softmax(-1)
    return score


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
    sink_logit = random((H * G,), torch.float32, generator) if case.get("sink") else None
    return q, q_pos, k, pos, bias, D**-0.5, case.get("softcap"), sink_logit


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, W, T, D = (case[name] for name in "HGWTD")
    per_entry = D * itemsize + 4 + (4 if case["bias"] else 0) + 4  # key, position, bias, score
    per_head = W * D * itemsize + (4 if case.get("sink") else 0)
    return H * T * per_entry + H * G * per_head + 8 * W, 4 * H * G * W * T * D


window_scores = Op(
    name="window_scores",
    ref=window_scores_ref,
    cpu=window_scores_cpu,
    fused=window_scores_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "W": 32, "T": 32768, "D": 128, "bias": False},
    variants=({}, {"bias": True}, {"softcap": 30.0, "sink": True}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "W": 1, "T": 1, "D": 16, "bias": False},
        {"H": 2, "G": 1, "W": 2, "T": 2, "D": 64, "bias": True},
        {"H": 2, "G": 3, "W": 63, "T": 65, "D": 80, "bias": True},
        {"H": 3, "G": 2, "W": 9, "T": 129, "D": 20, "bias": False},
        {"H": 1, "G": 4, "W": 32, "T": 1217, "D": 64, "bias": True},
        {"H": 2, "G": 2, "W": 17, "T": 65, "D": 16, "bias": True, "softcap": 2.0, "sink": True},
    ),
)
