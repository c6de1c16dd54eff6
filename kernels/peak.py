"""The most attention each key receives from any of a block of queries: q [Hq, M, D], k [H, T, D] -> [P, Hq, T] logs.

peak_j = max over the queries i of logit_ij - lse_i, where the logit is scale * <q_i, k_j>, soft-capped if the model
does so, and every query sees every key. Several lse [P, Hq, M] weigh the same queries in P ways for one product: a
query of weight w has lse - log w. Keys are walked by their owner, one store each: equal inputs give equal bits.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .banded import capped
from .op import Op, random, strained

BLOCK = 64  # queries at once in the reference


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
    cpu=attention_peak_ref,
    fused=None,
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
        {"H": 2, "G": 7, "T": 63, "D": 96, "M": 129, "loud": True},
    ),
)
