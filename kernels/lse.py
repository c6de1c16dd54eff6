"""The log-sum-exp of a few queries over many entries, on a card: slices of the entries, which are then put together.

It is what window scores need before they can weigh an entry; the terms are those of `window.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .launch import Kernel, tl, triton

SLICE = 1024  # entries under one partial log-sum-exp


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


def window_lse(
    q: Tensor,  # [Hq, W, D]
    q_pos: Tensor,  # [W] int, contiguous
    k: Tensor,  # [H, T, D]
    pos: Tensor,  # [H, T] int32, contiguous
    bias: Tensor | None,  # [H, T] float32, contiguous
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,  # [Hq] float32
) -> Tensor:  # [Hq, W] float32, -inf for a query that sees nothing and has no sink
    """Over all entries a query sees, and the sink."""
    (Hq, W, D), (H, T, _) = q.shape, k.shape
    rows = Hq // H * W
    lse = torch.empty(H, triton.cdiv(T, SLICE), rows, device=k.device)
    sizes = (scale, softcap, Hq // H, W, T, *q.stride(), *k.stride())
    blocks = _blocks(D, q.element_size(), rows)
    grid = triton.cdiv(rows, blocks["BR"]), lse.shape[1], H
    _slice_lse[grid](q, q_pos, k, pos, bias, lse, *sizes, SLICE=SLICE, **blocks)
    return with_sink(lse.logsumexp(1).view(Hq, W), None if sink_logit is None else sink_logit[:, None])


def with_sink(lse: Tensor, sink_logit: Tensor | None) -> Tensor:
    return lse if sink_logit is None else torch.logaddexp(lse, sink_logit.float())


def _blocks(D: int, itemsize: int, rows: int) -> dict[str, int]:
    # all rows of a usual window at once, so that keys are read once; float32 products run in registers and would spill
    BD = max(16, triton.next_power_of_2(D))
    most, BT = (16, 32) if itemsize == 4 else (128, 64) if BD <= 128 else (64, 32)
    BR = min(most, max(16, triton.next_power_of_2(rows)))
    options = {"num_warps": max(4, BR // 16), "num_stages": 2, "enable_fp_fusion": True}
    return {"D": D, "BD": BD, "BR": BR, "BT": BT, **options}
