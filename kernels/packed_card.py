"""Attention over codes in Triton: a program takes rows of a KV head over one of S parts of its entries."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .codes import Codes
from .flash import Part, count_splits, join_splits, pad, row_offsets
from .launch import Kernel, helper, target_of, tl, triton


@helper
def _spread(  # type: ignore[no-untyped-def]
    part, begin, n, d, s_t, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, GT: tl.constexpr, GC: tl.constexpr
):
    """What broadcasts to the block of `_numbers`: the scale or the zero of each of them."""
    o_t, o_d = tl.arange(0, BT), d + tl.arange(0, BD)
    m_t, m_d = (o_t < n)[:, None], (o_d < D)[None, :]
    part += begin // GT * s_t
    row = (((begin % GT).to(tl.int32) + o_t) // GT * s_t)[:, None]
    if GC >= D:
        b = tl.load(part + row, mask=m_t, other=0.0)
    elif GT % BT == 0:  # all in one block of rows
        b = tl.load(part + (o_d // GC)[None, :], mask=m_d, other=0.0)
    elif BD % GC == 0:
        o_c = d // GC + tl.arange(0, BD // GC)
        b = tl.load(part + row + o_c[None, :], mask=m_t & (o_c * GC < D)[None, :], other=0.0)
        b = tl.broadcast_to(b[:, :, None], [BT, BD // GC, GC]).reshape(BT, BD)
    else:
        b = tl.load(part + row + (o_d // GC)[None, :], mask=m_t & m_d, other=0.0)
    return b.to(tl.float32)


@helper
def _numbers(  # type: ignore[no-untyped-def]
    q, scale, zero, begin, n, d, q_t, s_t,
    D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BITS: tl.constexpr, GT: tl.constexpr, GC: tl.constexpr,
):  # fmt: skip
    """[BT, BD]: what the codes of n rows from `begin` on stand for, in the channels from d on; others are finite.

    `begin` less the first row of its head is a multiple of BT.
    """
    PER: tl.constexpr = 8 // BITS
    o_t, o_b = tl.arange(0, BT)[:, None], d // PER + tl.arange(0, BD // PER)[None, :]
    b = tl.load(q + begin * q_t + (o_t * q_t + o_b), mask=(o_t < n) & (o_b * PER < D), other=0)
    if BITS == 4:
        b = tl.interleave(b & 15, b >> 4)
    if BITS == 2:
        b = tl.interleave(tl.interleave(b & 3, b >> 4 & 3), tl.interleave(b >> 2 & 3, b >> 6))
    b = b.to(tl.float32) * _spread(scale, begin, n, d, s_t, D, BT, BD, GT, GC)
    if zero is not None:
        b += _spread(zero, begin, n, d, s_t, D, BT, BD, GT, GC)
    return b


@Kernel
def _packed(  # type: ignore[no-untyped-def]
    q, k, k_scale, k_zero, v, v_scale, v_zero, bias, offsets, out, lse,
    scale, G, M, S,
    q_h, q_m, q_d, k_t, ks_t, v_t, vs_t,
    D: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr,
    BD: tl.constexpr, BV: tl.constexpr, BC: tl.constexpr,
    K_BITS: tl.constexpr, K_GT: tl.constexpr, K_GC: tl.constexpr,
    V_BITS: tl.constexpr, V_GT: tl.constexpr, V_GC: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """out [S, H * G * M, DV], lse [S, H * G * M]: attention of BR rows of head i_h over part i_s of its entries."""
    i_r, i_s, i_h = tl.program_id(0) // S, tl.program_id(0) % S, tl.program_id(1).to(tl.int64)
    o_r, o_t, o_v = i_r * BR + tl.arange(0, BR), tl.arange(0, BT), tl.arange(0, BV)
    m_r, m_v = o_r < G * M, o_v < DV
    row_q = (i_h * G + o_r // M) * q_h + (o_r % M).to(tl.int64) * q_m
    first = tl.load(offsets + i_h)
    T = (tl.load(offsets + i_h + 1) - first).to(tl.int32)
    part = tl.cdiv(tl.cdiv(T, BT), S) * BT
    begin, end = i_s * part, tl.minimum(T, (i_s + 1) * part)
    b_max = tl.full([BR], float("-inf"), tl.float32)
    b_sum, b_out = tl.zeros([BR], tl.float32), tl.zeros([BR, BV], tl.float32)
    for t in range(begin, end, BT):
        at, n, m_t = first + t, end - t, o_t < end - t
        b_x = tl.zeros([BR, BT], tl.float32)
        for d in tl.static_range(0, BD, BC):
            o_d = d + tl.arange(0, BC)
            m_q = m_r[:, None] & (o_d < D)[None, :]
            b_q = tl.load(q + row_q[:, None] + o_d.to(tl.int64)[None, :] * q_d, mask=m_q, other=0.0)
            b_k = _numbers(k, k_scale, k_zero, at, n, d, k_t, ks_t, D, BT, BC, K_BITS, K_GT, K_GC).to(b_q.dtype)
            if UPCAST:
                b_q, b_k = b_q.to(tl.float32), b_k.to(tl.float32)
            b_x = tl.dot(b_q, tl.trans(b_k), b_x, input_precision="ieee")
        b_x *= scale
        if bias is not None:
            b_x += tl.load(bias + at + o_t, mask=m_t, other=0.0)[None, :]
        b_x = tl.where(m_t[None, :], b_x, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p, b_fade = tl.exp(b_x - b_base[:, None]), tl.exp(b_max - b_base)
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        b_v = _numbers(v, v_scale, v_zero, at, n, 0, v_t, vs_t, DV, BT, BV, V_BITS, V_GT, V_GC).to(q.dtype.element_ty)
        if UPCAST:
            b_v = b_v.to(tl.float32)
        b_out = tl.dot(b_p.to(b_v.dtype), b_v, b_out * b_fade[:, None], input_precision="ieee")
        b_max = b_new
    row = (i_s.to(tl.int64) * tl.num_programs(1) + i_h) * (G * M) + o_r
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    tl.store(out + row[:, None] * DV + o_v[None, :], b_out, mask=m_r[:, None] & m_v[None, :])
    tl.store(lse + row, b_max + tl.log(b_sum), mask=m_r)


def packed_attention_fused(
    q: Tensor, k: Codes, v: Codes, lens: Sequence[int], bias: Tensor | None, scale: float
) -> Part:  # [Hq, M, Dv], [Hq, M] float32
    """The same in one Triton kernel, and one that joins the parts of long heads."""
    (Hq, M, D), Dv, H = q.shape, v.D, len(lens)
    G, E = Hq // H, len(k.q)
    blocks = _tile(G * M, max(D, Dv), q.element_size(), target_of(q.device))
    tiles = triton.cdiv(G * M, blocks["BR"])
    S = count_splits(max(lens), E, tiles)
    out = q.new_empty(S, Hq, M, Dv, dtype=q.dtype if S == 1 else torch.float32)
    lse = q.new_empty(S, Hq, M, dtype=torch.float32)
    parts = [_whole(part) for codes in (k, v) for part in (codes.q, codes.scale, codes.zero)]
    strides = (*q.stride(), *(part.stride(0) for part in (*parts[:2], *parts[3:5]) if part is not None))
    sizes = {"D": D, "DV": Dv, "BD": pad(D), "BV": pad(Dv)}
    for name, codes in (("K", k), ("V", v)):
        sizes |= {f"{name}_BITS": codes.bits, f"{name}_GT": codes.gt, f"{name}_GC": codes.gc}
    offsets = row_offsets(tuple(lens), q.device)
    _packed[tiles * S, H](q, *parts, _whole(bias), offsets, out, lse, scale, G, M, S, *strides, **sizes, **blocks)
    return join_splits(out, lse, q.dtype)


def _whole(part: Tensor | None) -> Tensor | None:
    return part if part is None else part.contiguous()


def _tile(rows: int, D: int, itemsize: int, target: str) -> dict[str, Any]:
    # opening codes takes registers beside those of the products; with these tiles nothing spills on any target
    size = pad(D)
    if itemsize == 4:
        tile = {"BR": 16, "BT": 32 if size <= 64 else 16, "num_warps": 4 if size <= 64 else 8}
    elif target.startswith("sm_"):
        tile = {"BR": 16 if rows <= 16 else 64 if size <= 64 else 32, "BT": 64 if size <= 64 else 32, "num_warps": 4}
    else:
        tile = {"BR": 16 if rows <= 16 or size > 128 else 64}
        tile |= {"BT": 16, "num_warps": 4} if size == 128 else {"BT": 32, "num_warps": 8}
    return {"BC": min(size, 128 if itemsize == 4 else 256), "num_stages": 1, "enable_fp_fusion": True, **tile}
