"""Attention mass, the attention each key receives from a block of queries: q [Hq, M, D], k [H, T, D] -> [H, T].

mass_j = sum over the queries i, mean over the G heads of a group, of exp(logit_ij - lse_i), where the logit is
scale * <q_i, k_j>, soft-capped if the model does so. The lse [Hq, M] of a query covers all it sees: the masses of a
chunk's two parts, earlier keys and its own triangle, simply add up.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .banded import capped
from .dense import flash
from .op import Op, random

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
    M = case.get("M", T)
    generator = torch.Generator().manual_seed(seed)
    q = random((M, H * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    k = random((H, T, D), dtype, generator)
    more = torch.ones(M, 1)  # one more logit, so that a query's masses do not add up to 1
    rows = zip(q.float(), k.float().mT.repeat_interleave(G, 0), strict=True)
    lse = torch.stack([torch.cat([one @ keys * D**-0.5, more], -1).logsumexp(-1) for one, keys in rows])
    return q, k, lse, D**-0.5, "M" not in case, case.get("softcap")


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, T, D = (case[name] for name in "HGTD")
    M = case.get("M", T)
    pairs = M * T if "M" in case else T * (T + 1) // 2
    return H * (G * M * (D * itemsize + 4) + T * (D * itemsize + 4)), 2 * H * G * pairs * D


attention_mass = Op(
    name="attention_mass",
    ref=attention_mass_ref,
    cpu=attention_mass_cpu,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "T": 32768, "D": 128, "M": 1024},
    variants=({}, {"softcap": 30.0}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "T": 1, "D": 16},
        {"H": 2, "G": 3, "T": 65, "D": 64},
        {"H": 3, "G": 2, "T": 129, "D": 20},
        {"H": 2, "G": 1, "T": 2, "D": 80, "M": 63},
        {"H": 1, "G": 4, "T": 517, "D": 64, "M": 129},
        {"H": 2, "G": 2, "T": 65, "D": 16, "softcap": 2.0},
    ),
)
