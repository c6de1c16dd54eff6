"""Window scores on a card: the log-sum-exps of the queries, then what each entry receives; shapes as in `window.py`.

First a program takes BR queries of a KV head through a slice of its entries; the slices are joined in plain torch. Then
one program for every block of entries walks all G * W queries and stores once: entries are read twice, nothing of size
W x T is written.
"""

import torch
from torch import Tensor

from .flash import pad
from .launch import Kernel, tl, triton

SLICE = 512  # entries under one partial log-sum-exp


@Kernel
def _slice_lse(  # type: ignore[no-untyped-def]
    q, q_pos, k, pos, bias, lse,
    scale, softcap, G, W, T,
    q_h, q_w, q_d, k_h, k_t, k_d,
    D: tl.constexpr, SLICE: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """lse [H, S, G * W]: the log-sum-exp of BR queries of head i_h over the slice i_s of its entries."""
    i_s, i_r, i_h = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
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
    S = tl.num_programs(0)
    tl.store(lse + (i_h * S + i_s) * (G * W) + o_r, b_max + tl.log(b_sum), mask=m_r)


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
    b_pos = tl.where(b_pos < 0, 2**31 - 1, b_pos)  # no query sees padding
    b_bias = tl.load(bias + i_h * T + o_t, mask=m_t, other=0.0) if bias is not None else tl.zeros([BT], tl.float32)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    b_sum, b_max, b_spread, b_count, b_mean = (tl.zeros([BT], tl.float32),) * 5
    n_w = tl.cdiv(W, BR)
    for i in range(G * n_w):
        g, o_w = i // n_w, (i % n_w) * BR + tl.arange(0, BR)  # a block of queries of one head
        m_w = o_w < W
        b_q = tl.load(
            q + (i_h * G + g) * q_h + o_w[None, :].to(tl.int64) * q_w + o_d[:, None] * q_d,
            mask=m_w[None, :] & m_d[:, None], other=0.0,
        )  # fmt: skip
        b_q_pos = tl.load(q_pos + o_w, mask=m_w, other=-1).to(tl.int32)
        b_lse = tl.load(lse + (i_h * G + g) * W + o_w, mask=m_w, other=0.0)
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_x = tl.dot(b_k, b_q, input_precision="ieee") * scale  # [BT, BR]
        if softcap is not None:
            b_x = softcap * (2 * tl.sigmoid(2 * b_x / softcap) - 1)
        if bias is not None:
            b_x += b_bias[:, None]
        b_seen = (b_pos[:, None] <= b_q_pos[None, :]).to(tl.float32)
        # at most 1, and a number where nothing is seen; masks instead of numbers take more registers than AMD has
        b_weight = tl.exp(tl.minimum(b_x - b_lse[None, :], 0.0)) * b_seen
        b_part = tl.sum(b_weight, 1)
        b_sum += b_part
        if MOMENTS:
            b_max = tl.maximum(b_max, tl.max(b_weight, 1))
            # deviations from the mean of the block, joined with its head's blocks before by Chan's formula
            b_count, b_mean = tl.where(i % n_w == 0, 0.0, b_count), tl.where(i % n_w == 0, 0.0, b_mean)
            b_n = tl.sum(b_seen, 1)
            b_part /= tl.maximum(b_n, 1.0)
            b_off = (b_weight - b_part[:, None]) * b_seen
            b_step, b_share = b_part - b_mean, b_n / tl.maximum(b_count + b_n, 1.0)
            b_spread += tl.sum(b_off * b_off, 1) + b_step * b_step * b_count * b_share
            b_mean += b_step * b_share
            b_count += b_n
    at = score + i_h * T + o_t
    tl.store(at, b_sum / G, mask=m_t)
    if MOMENTS:
        HT = tl.num_programs(1).to(tl.int64) * T
        tl.store(at + HT, b_max, mask=m_t)
        tl.store(at + 2 * HT, b_spread / G, mask=m_t)


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
    """The definition in two Triton kernels."""
    (Hq, W, D), (H, T, _) = q.shape, k.shape
    score = torch.empty(3 if moments else 1, H, T, device=k.device)
    if not (T and W):
        return score.zero_() if moments else score[0].zero_()
    G, S = Hq // H, triton.cdiv(T, SLICE)
    tensors = (q, q_pos.contiguous(), k, pos.contiguous(), None if bias is None else bias.contiguous())
    sizes = (scale, softcap, G, W, T, *q.stride(), *k.stride())
    rows, columns = _blocks(G * W, W, D, q.element_size())
    lse = torch.empty(H, S, G * W, device=k.device)
    _slice_lse[S, triton.cdiv(G * W, rows["BR"]), H](*tensors, lse, *sizes, SLICE=SLICE, **rows)
    lse = lse.logsumexp(1)
    if sink_logit is not None:
        lse = torch.logaddexp(lse, sink_logit.float().view(H, G).repeat_interleave(W, 1))
    _columns[triton.cdiv(T, columns["BT"]), H](*tensors, lse, score, *sizes, MOMENTS=moments, **columns)
    return score if moments else score[0]


def _blocks(rows: int, W: int, D: int, itemsize: int) -> tuple[dict[str, int], dict[str, int]]:
    # float32 products run in registers, not tensor cores, where larger tiles would spill
    BD = pad(D)
    own, meet = (32, 16) if itemsize == 4 else (128 if BD <= 128 else 64, 64)
    both = {"D": D, "BD": BD, "num_stages": 2, "enable_fp_fusion": True}
    lse = {**both, "BR": own if rows > 16 else 16, "BT": meet, "num_warps": max(4, own // 16)}
    return lse, {**both, "BR": 16 if itemsize == 4 or W <= 16 else 32, "BT": own, "num_warps": 8}
