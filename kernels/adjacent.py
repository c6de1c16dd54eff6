"""Cosine of neighbouring keys, k [H, T, D] -> [H, T - 1] float32; rows of padding give numbers without meaning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .launch import Kernel, tl, triton
from .op import Op, random

BLOCK = 8192  # rows at once: their float32 copy stays in the cache


def adjacent_cosine_ref(k: Tensor) -> Tensor:  # [H, T, D] -> [H, T - 1] float32
    """The definition: exactly 1 for equal neighbours, 0 beside a zero vector."""
    k = k.float()
    square = (k * k).sum(-1)
    product = (k[:, :-1] * k[:, 1:]).sum(-1)
    return _cosine(product, square)


@Kernel
def _cosines(k, cosine, T, k_h, k_t, k_d, D: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr):  # type: ignore[no-untyped-def]
    """cosine [H, T - 1]: BT rows of head i_h beside their right neighbours, of which the cache has all but one."""
    i_t, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_t, o_d = i_t * BT + tl.arange(0, BT), tl.arange(0, BD).to(tl.int64)
    m_t = o_t < T - 1
    mask = m_t[:, None] & (o_d < D)[None, :]
    at = k + i_h * k_h + o_t[:, None] * k_t + o_d[None, :] * k_d
    b_k = tl.load(at, mask=mask, other=0.0).to(tl.float32)
    b_next = tl.load(at + k_t, mask=mask, other=0.0).to(tl.float32)
    b_norms = tl.sqrt_rn(tl.sum(b_k * b_k, 1) * tl.sum(b_next * b_next, 1))
    b_cosine = tl.where(b_norms > 0, tl.div_rn(tl.sum(b_k * b_next, 1), b_norms), 0.0)
    tl.store(cosine + i_h * (T - 1) + o_t, b_cosine, mask=m_t)


def adjacent_cosine_fused(k: Tensor) -> Tensor:  # [H, T, D] -> [H, T - 1] float32
    """The same in one Triton kernel."""
    H, T, D = k.shape
    cosine = torch.empty(H, max(T - 1, 0), device=k.device)
    BD = triton.next_power_of_2(D)
    BT = max(1, 4096 // BD)
    # without fused products the three sums of equal rows are the same bits
    options = {"num_warps": 4, "enable_fp_fusion": False}
    _cosines[triton.cdiv(cosine.shape[1], BT), H](k, cosine, T, *k.stride(), D=D, BT=BT, BD=BD, **options)
    return cosine


def adjacent_cosine_cpu(k: Tensor) -> Tensor:  # [H, T, D] -> [H, T - 1] float32
    """The same, a block of tokens at a time: keys are read once."""
    H, T, _ = k.shape
    step = max(1, BLOCK // H)
    cosine = torch.empty(H, max(T - 1, 0))
    for i in range(0, T - 1, step):
        rows = k[:, i : i + step + 1].float()
        square = torch.linalg.vecdot(rows, rows)
        product = torch.linalg.vecdot(rows[:, :-1], rows[:, 1:])
        cosine[:, i : i + step] = _cosine(product, square)
    return cosine


def _cosine(product: Tensor, square: Tensor) -> Tensor:
    # sqrt(x * x) is exactly x, so that equal neighbours tie at 1
    norms = (square[:, :-1] * square[:, 1:]).sqrt()
    return torch.where(norms > 0, product / norms, 0.0)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (random((case["H"], case["T"], case["D"]), dtype, generator).cumsum(1),)


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, T, D = (case[name] for name in "HTD")
    return H * T * D * itemsize + 4 * H * (T - 1), 4 * H * T * D


adjacent_cosine = Op(
    name="adjacent_cosine",
    ref=adjacent_cosine_ref,
    cpu=adjacent_cosine_cpu,
    fused=adjacent_cosine_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "T": 32768, "D": 128},
    cost=_cost,
    cases=(
        {"H": 1, "T": 1, "D": 8},
        {"H": 3, "T": 2, "D": 63},
        {"H": 2, "T": 65, "D": 64},
        {"H": 5, "T": 129, "D": 80},
        {"H": 1, "T": 63, "D": 256},
        {"H": 3, "T": 1999, "D": 16},
    ),
)
