"""The most attention each key receives from any of a block of queries: q [Hq, M, D], k [H, T, D] -> [P, Hq, T] logs.

peak_j = max over the queries i of logit_ij - lse_i, where the logit is scale * <q_i, k_j>, soft-capped if the model
does so, and every query sees every key. Several lse [P, Hq, M] weigh the same queries in P ways for one product: a
query of weight w has lse - log w. On a card a program owns a block of keys, walks all queries, and stores once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from typing import Any

import torch
from torch import Tensor

from .banded import capped
from .launch import Kernel, tl, triton
from .mass import key_blocks
from .op import Op, random, strained

BLOCK = 64  # queries at once in the reference
ROWS, KEYS = 256, 512  # queries and keys at once on the CPU: their products stay in the cache


def attention_peak_ref(
    q: Tensor,  # [Hq, M, D]
    k: Tensor,  # [H, T, D]
    lse: Tensor,  # [P, Hq, M] float32, +inf for a query that does not count
    scale: float,
    softcap: float | None = None,
) -> Tensor:  # [P, Hq, T] float32, -inf where no query counts
    """The definition."""
    H, T, _ = k.shape
    q, lse, keys = torch.unflatten(q, 0, (H, -1)), torch.unflatten(lse, 1, (H, -1)), k.float().mT[:, None]
    peak = torch.full((len(lse), *q.shape[:2], T), -math.inf, device=k.device)
    for i in range(0, q.shape[2], BLOCK):
        logit = capped(q[:, :, i : i + BLOCK].float() @ keys * scale, softcap)  # [H, G, B, T]
        peak = peak.maximum((logit - lse[..., i : i + BLOCK, None]).amax(-2))
    return peak.flatten(1, 2)


@Kernel
def _key_peak(  # type: ignore[no-untyped-def]
    q, k, lse, other_lse, peak, other_peak,
    scale, softcap, G, M, T,
    q_h, q_m, q_d, k_h, k_t, k_d,
    D: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """peak [Hq, T]: the most that BT keys receive from the M queries of head i_h, in one way or in two."""
    o_t, i_h = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT), tl.program_id(1).to(tl.int64)
    o_d = tl.arange(0, BD).to(tl.int64)
    m_t, m_d = o_t < T, o_d < D
    k += i_h // G * k_h
    b_k = tl.load(k + o_t[:, None] * k_t + o_d[None, :] * k_d, mask=m_t[:, None] & m_d[None, :], other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    # each column of the block has a maximum of its own, so that they meet only once
    b_peak = tl.full([BT, BR], float("-inf"), tl.float32)
    b_other = b_peak
    for m in range(0, M, BR):
        o_m = m + tl.arange(0, BR).to(tl.int64)
        m_m = o_m < M
        b_q = tl.load(
            q + i_h * q_h + o_m[None, :] * q_m + o_d[:, None] * q_d, mask=m_m[None, :] & m_d[:, None], other=0.0
        )
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_x = tl.dot(b_k, b_q, input_precision="ieee") * scale  # [BT, BR]
        if softcap is not None:
            b_x = softcap * (2 * tl.sigmoid(2 * b_x / softcap) - 1)
        b_lse = tl.load(lse + i_h * M + o_m, mask=m_m, other=float("inf"))
        b_peak = tl.maximum(b_peak, b_x - b_lse[None, :])
        if other_lse is not None:
            b_lse = tl.load(other_lse + i_h * M + o_m, mask=m_m, other=float("inf"))
            b_other = tl.maximum(b_other, b_x - b_lse[None, :])
    tl.store(peak + i_h * T + o_t, tl.max(b_peak, 1), mask=m_t)
    if other_lse is not None:
        tl.store(other_peak + i_h * T + o_t, tl.max(b_other, 1), mask=m_t)


def attention_peak_fused(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None = None
) -> Tensor:  # [P, Hq, T] float32
    """The same in one Triton kernel, which multiplies once for two of the P ways."""
    (Hq, M, D), (H, T, _) = q.shape, k.shape
    peak, lse = torch.empty(len(lse), Hq, T, device=k.device), lse.contiguous()
    sizes = (scale, softcap, Hq // H, M, T, *q.stride(), *k.stride())
    blocks = key_blocks(D, q.element_size())
    for p in range(0, len(lse), 2):
        weights, peaks = ((*part[p : p + 2], None)[:2] for part in (lse, peak))
        _key_peak[triton.cdiv(T, blocks["BT"]), Hq](q, k, *weights, *peaks, *sizes, **blocks)
    return peak


def attention_peak_cpu(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None = None
) -> Tensor:  # [P, Hq, T] float32
    """A KV head at a time, a tile of its queries and keys: float32 products, of which the largest so far are kept."""
    H, T, _ = k.shape
    q, lse = torch.unflatten(q, 0, (H, -1)), torch.unflatten(lse, 1, (H, -1))
    peak = torch.full((len(lse), *q.shape[:2], T), -math.inf)
    step = max(1, ROWS // q.shape[1])
    for h in range(H):
        rows, keys = q[h].float() * scale, k[h].float().mT  # [G, M, D], [D, T]
        for t, m in product(range(0, T, KEYS), range(0, q.shape[2], step)):
            some = rows[:, m : m + step]
            logit = capped((some.flatten(0, 1) @ keys[:, t : t + KEYS]).view(*some.shape[:2], -1), softcap)
            for way, most in zip(lse[:, h, :, m : m + step], peak[:, h, :, t : t + KEYS], strict=True):
                torch.maximum(most, (logit - way[..., None]).amax(1), out=most)
    return peak.flatten(1, 2)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, M, T, D = (case[name] for name in "HGMTD")
    generator = torch.Generator().manual_seed(seed)
    q = random((M, H * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    q, k = strained(case, q, None)[0], random((H, T, D), dtype, generator)
    lse = random((case.get("P", 1), H * G, M), torch.float32, generator) + math.log(T)
    return q, k, lse, D**-0.5, case.get("softcap")


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, M, T, D = (case[name] for name in "HGMTD")
    P = case.get("P", 1)
    return H * (G * M * (D * itemsize + 4 * P) + T * (D * itemsize + 4 * G * P)), 2 * H * G * M * T * D


attention_peak = Op(
    name="attention_peak",
    ref=attention_peak_ref,
    cpu=attention_peak_cpu,
    fused=attention_peak_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "T": 2048, "D": 128, "M": 1024},
    variants=({}, {"P": 2}, {"softcap": 30.0}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "T": 1, "D": 16, "M": 1},
        {"H": 2, "G": 3, "T": 65, "D": 64, "M": 65, "P": 2},
        {"H": 3, "G": 2, "T": 129, "D": 20, "M": 63},
        {"H": 1, "G": 4, "T": 1999, "D": 64, "M": 5},
        {"H": 2, "G": 2, "T": 63, "D": 16, "M": 2, "softcap": 2.0, "P": 2},
        {"H": 2, "G": 7, "T": 63, "D": 96, "M": 129, "loud": True, "P": 3},
    ),
)
