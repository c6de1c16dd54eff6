"""Rows of keys and values copied bit for bit: k [H, T, D], v [H, T, Dv], index [...] -> k' [..., D], v' [..., Dv].

So heads lose their padding or get it, and lose what is evicted. Rows are counted head after head; k and v may be flat,
[E, D] and [E, Dv]. On a card a program copies a block of rows.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .flash import pad
from .launch import Kernel, tl, triton
from .op import Op, random

NUMBERS = 4096  # a program moves at once


def take_rows_ref(
    k: Tensor,  # [H, T, D] or [E, D]
    v: Tensor,  # [H, T, Dv] or [E, Dv]
    index: Tensor,  # [...] int64, -1 gives a row of zeros
) -> tuple[Tensor, Tensor]:  # [..., D], [..., Dv]
    """The definition."""
    blank = (index < 0)[..., None]
    new_k, new_v = (part.flatten(0, -2)[index].masked_fill(blank, 0) for part in (k, v))
    return new_k, new_v


@Kernel
def _copy_rows(  # type: ignore[no-untyped-def]
    k, v, index, new_k, new_v,
    N, T,
    k_h, k_t, k_d, v_h, v_t, v_d,
    D: tl.constexpr, Dv: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr, BDv: tl.constexpr,
):  # fmt: skip
    """BN rows of new_k [N, D] and new_v [N, Dv]."""
    o_n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    o_d, o_v = tl.arange(0, BD).to(tl.int64)[None, :], tl.arange(0, BDv).to(tl.int64)[None, :]
    m_n = o_n < N
    b_i = tl.load(index + o_n, mask=m_n, other=-1)
    h, t = (b_i // T)[:, None], (b_i % T)[:, None]
    o_n, m_n, m_i, m_d, m_v = o_n[:, None], m_n[:, None], (b_i >= 0)[:, None], o_d < D, o_v < Dv
    b_k = tl.load(k + h * k_h + t * k_t + o_d * k_d, mask=m_i & m_d, other=0.0)
    tl.store(new_k + o_n * D + o_d, b_k, mask=m_n & m_d)
    b_v = tl.load(v + h * v_h + t * v_t + o_v * v_d, mask=m_i & m_v, other=0.0)
    tl.store(new_v + o_n * Dv + o_v, b_v, mask=m_n & m_v)


def take_rows_fused(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:  # [..., D], [..., Dv]
    """The same in one Triton kernel."""
    k, v = (part if part.dim() == 3 else part[None] for part in (k, v))
    (_, T, D), Dv, N = k.shape, v.shape[-1], index.numel()
    BD, BDv = (pad(size) for size in (D, Dv))
    BN = max(1, NUMBERS // max(BD, BDv))
    new_k, new_v = (part.new_empty(*index.shape, part.shape[-1]) for part in (k, v))
    _copy_rows[triton.cdiv(N, BN),](
        k, v, index.contiguous(), new_k, new_v, N, max(T, 1), *k.stride(), *v.stride(),
        D=D, Dv=Dv, BN=BN, BD=BD, BDv=BDv, num_warps=4, enable_fp_fusion=True,
    )  # fmt: skip
    return new_k, new_v


def take_rows_cpu(k: Tensor, v: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:  # [..., D], [..., Dv]
    """Whole rows are copied, those of zeros blanked behind."""
    flat = index.flatten()
    blank = (flat < 0).nonzero().flatten()
    taken = (part.flatten(0, -2).index_select(0, flat.clamp(min=0)) for part in (k, v))
    new_k, new_v = (part.index_fill_(0, blank, 0).view(*index.shape, part.shape[-1]) for part in taken)
    return new_k, new_v


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, T, D = (case[name] for name in "HTD")
    generator = torch.Generator().manual_seed(seed)
    k, v = (random((H, T, size), dtype, generator) for size in (D, case.get("Dv", D)))
    index = torch.randint(0, H * T, case.get("shape", (_count(case),)), generator=generator)
    if case.get("blank"):
        index.view(-1)[::3] = -1
    return (k[0], v[0], index) if case.get("flat") else (k, v, index)


def _count(case: Mapping[str, Any]) -> int:
    return math.prod(case["shape"]) if "shape" in case else round(case["H"] * case["T"] * case["share"])


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    n, row = _count(case), (case["D"] + case.get("Dv", case["D"])) * itemsize
    named = n - (n + 2) // 3 if case.get("blank") else n
    return (named + n) * row + 8 * n, 0


take_rows = Op(
    name="take_rows",
    ref=take_rows_ref,
    cpu=take_rows_cpu,
    fused=take_rows_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "T": 32768, "D": 128, "share": 0.35},
    cost=_cost,
    cases=(
        {"H": 1, "T": 1, "D": 8, "shape": (1,)},
        {"H": 3, "T": 2, "D": 16, "Dv": 8, "shape": (3, 2), "blank": True},
        {"H": 2, "T": 65, "D": 63, "Dv": 80, "shape": (2, 63), "blank": True},
        {"H": 1, "T": 129, "D": 20, "Dv": 96, "shape": (4, 65), "flat": True, "blank": True},
        {"H": 5, "T": 401, "D": 256, "shape": (2003,)},
        {"H": 2, "T": 9, "D": 64, "shape": (0,)},
    ),
)
