"""Attention mass, the attention each key receives from a block of queries: q [Hq, M, D], k [H, T, D] -> [H, T].

mass_j = sum over the queries i, mean over the G heads of a group, of exp(logit_ij - lse_i), where the logit is
scale * <q_i, k_j>, soft-capped if the model does so. The lse [Hq, M] of a query covers all it sees: the masses of a
chunk's two parts, earlier keys and its own triangle, simply add up. On a card a program owns a block of keys, walks
the queries that see some of them, and stores once.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .banded import capped
from .dense import flash
from .flash import pad
from .launch import Kernel, tl, triton
from .op import Op, random, strained

BLOCK = 64  # queries at once in the reference
PARTS = 3  # 16-bit numbers that together carry one lse
LEVER = 64.0  # what those numbers are multiplied by: keeps them inside float16
NEVER = -6e4  # in the same unit: far below any logit


def attention_mass_ref(
    q: Tensor,  # [Hq, M, D]
    k: Tensor,  # [H, T, D]
    lse: Tensor,  # [Hq, M] float32, -inf for a query that sees nothing
    scale: float,
    causal: bool,  # True: T == M and query i sees the keys j <= i; False: it sees them all
    softcap: float | None = None,
) -> Tensor:  # [H, T] float32
    """The definition."""
    H, T, _ = k.shape
    q, lse, keys = torch.unflatten(q, 0, (H, -1)), torch.unflatten(lse, 0, (H, -1)), k.float().mT[:, None]
    mass = torch.zeros(H, T, device=k.device)
    for i in range(0, q.shape[2], BLOCK):
        lse_i = lse[:, :, i : i + BLOCK, None]  # [H, G, B, 1]
        logit = capped(q[:, :, i : i + BLOCK].float() @ keys * scale, softcap)  # [H, G, B, T]
        seen = lse_i > -math.inf
        if causal:
            order = torch.arange(T, device=k.device)
            seen = seen & (order <= order[i : i + BLOCK, None])
        mass += (logit - lse_i).exp().masked_fill(~seen, 0.0).sum((1, 2))
    return mass / q.shape[1]


@Kernel
def _key_mass(  # type: ignore[no-untyped-def]
    q, k, lse, mass,
    scale, softcap, G, M, T,
    q_h, q_m, q_d, k_h, k_t, k_d,
    CAUSAL: tl.constexpr, D: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """mass [H, T]: what BT keys of head i_h receive from its M * G queries, a token's G side by side."""
    i_t, i_h = tl.program_id(0), tl.program_id(1).to(tl.int64)
    o_t, o_d = i_t.to(tl.int64) * BT + tl.arange(0, BT), tl.arange(0, BD).to(tl.int64)
    m_t, m_d = o_t < T, o_d < D
    b_k = tl.load(k + i_h * k_h + o_t[:, None] * k_t + o_d[None, :] * k_d, mask=m_t[:, None] & m_d[None, :], other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    b_mass = tl.zeros([BT, BR], tl.float32)
    for r in range(i_t * BT * G if CAUSAL else 0, M * G, BR):
        o_r = r + tl.arange(0, BR)
        m_r = o_r < M * G
        g, m = i_h * G + o_r % G, (o_r // G).to(tl.int64)
        b_q = tl.load(
            q + g[None, :] * q_h + m[None, :] * q_m + o_d[:, None] * q_d, mask=m_r[None, :] & m_d[:, None], other=0.0
        )
        b_lse = tl.load(lse + g * M + m, mask=m_r, other=float("inf"))
        b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)  # a query that sees nothing adds nothing
        if UPCAST:
            b_q = b_q.to(tl.float32)
        b_x = tl.dot(b_k, b_q, input_precision="ieee") * scale  # [BT, BR]
        if softcap is not None:
            b_x = softcap * (2 * tl.sigmoid(2 * b_x / softcap) - 1)
        b_weight = tl.exp(b_x - b_lse[None, :])
        if CAUSAL:
            b_weight = tl.where(o_t[:, None] <= m[None, :], b_weight, 0.0)
        b_mass += b_weight
    tl.store(mass + i_h * T + o_t, tl.sum(b_mass, 1) / G, mask=m_t)


def attention_mass_fused(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, causal: bool, softcap: float | None = None
) -> Tensor:  # [H, T] float32
    """The same in one Triton kernel; in the triangle the programs that walk the most queries start first."""
    (Hq, M, D), (H, T, _) = q.shape, k.shape
    mass = torch.empty(H, T, device=k.device)
    sizes = (scale, softcap, Hq // H, M, T, *q.stride(), *k.stride())
    blocks = key_blocks(D, q.element_size())
    _key_mass[triton.cdiv(T, blocks["BT"]), H](q, k, lse.contiguous(), mass, *sizes, CAUSAL=causal, **blocks)
    return mass


def key_blocks(D: int, itemsize: int) -> dict[str, int]:
    """Sizes for kernels whose programs own BT keys and walk BR queries at a time."""
    # float32 products run in registers, not tensor cores, where larger tiles would spill
    BD = pad(D)
    BR, BT = (16, 32) if itemsize == 4 else (64, 128 if BD <= 128 else 64)
    options = {"num_warps": max(4, BT // 16), "num_stages": 3 if BD <= 128 else 2, "enable_fp_fusion": True}
    return {"D": D, "BD": BD, "BR": BR, "BT": BT, **options}


def attention_mass_cpu(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, causal: bool, softcap: float | None = None
) -> Tensor:  # [H, T] float32
    """One flash call with the roles swapped: keys ask, queries answer, and the call's own LSE is the log of the mass.

    In the causal case both orders are reversed, which turns "i >= j" into the causality the call knows. Soft-capped
    logits are beyond it and take the reference.
    """
    if softcap is not None:
        return attention_mass_ref(q, k, lse, scale, causal, softcap)
    H, T, _ = k.shape
    if not (T and q.shape[1]):
        return torch.zeros(H, T)
    asking, answering = _with_lse(q, k, lse, scale)
    if causal:
        asking, answering = asking.flip(1), answering.flip(1)
    answering = torch.unflatten(answering, 0, (H, -1))  # [H, G, M, D']
    asking = asking[:, None].expand(-1, answering.shape[1], -1, -1)  # [H, G, T, D']
    _, log_mass = flash(asking, answering, answering, is_causal=causal, scale=scale)  # values do not matter here
    mass: Tensor = log_mass.exp().mean(1)
    return mass.flip(1) if causal else mass


def _with_lse(q: Tensor, k: Tensor, lse: Tensor, scale: float) -> tuple[Tensor, Tensor]:  # [H, T, D'], [Hq, M, D']
    # extra head dimensions add -lse to the logit; each part is what its predecessors' rounding left over
    room = PARTS + -(q.shape[-1] + PARTS) % 8
    tail = torch.nan_to_num(lse / (-scale * LEVER), nan=math.nan, posinf=NEVER, neginf=NEVER)
    answering = torch.cat([q, q.new_zeros(1).expand(*lse.shape, room)], -1)
    for part in answering[..., q.shape[-1] :].unbind(-1)[:PARTS]:
        part.copy_(tail)
        tail = tail - part
    return torch.cat([k, k.new_full((1,), LEVER).expand(*k.shape[:2], room)], -1), answering


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, T, D = case["H"], case["G"], case["T"], case["D"]
    M, causal = case.get("M") or T, case.get("M") is None
    generator = torch.Generator().manual_seed(seed)
    q = random((M, H * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    q, k = strained(case, q, None)[0], random((H, T, D), dtype, generator)
    more = torch.ones(M, 1)  # one more logit, so that a query's masses do not add up to 1
    rows = zip(q.float(), k.float().mT.repeat_interleave(G, 0), strict=True)
    lse = torch.stack([torch.cat([one @ keys * D**-0.5, more], -1).logsumexp(-1) for one, keys in rows])
    return q, k, lse, D**-0.5, causal, case.get("softcap")


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, T, D = (case[name] for name in "HGTD")
    M = case.get("M") or T
    pairs = M * T if case.get("M") else T * (T + 1) // 2
    return H * (G * M * (D * itemsize + 4) + T * (D * itemsize + 4)), 2 * H * G * pairs * D


attention_mass = Op(
    name="attention_mass",
    ref=attention_mass_ref,
    cpu=attention_mass_cpu,
    fused=attention_mass_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "T": 32768, "D": 128, "M": 1024},
    variants=({}, {"M": None}, {"softcap": 30.0}),  # of chunks, the earlier keys, and the triangle
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "T": 1, "D": 16},
        {"H": 2, "G": 3, "T": 65, "D": 64},
        {"H": 3, "G": 2, "T": 129, "D": 20},
        {"H": 2, "G": 1, "T": 2, "D": 80, "M": 63},
        {"H": 1, "G": 4, "T": 65, "D": 64, "M": 129},
        {"H": 1, "G": 4, "T": 1999, "D": 64, "M": 5},
        {"H": 2, "G": 2, "T": 63, "D": 16, "M": 2, "softcap": 2.0},
        {"H": 2, "G": 7, "T": 63, "D": 96, "loud": True},
    ),
)
