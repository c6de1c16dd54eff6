"""Attention over heads of one length, every query seeing every entry of its KV head, with the log-sum-exp.

q [Hq, M, D] in groups of G heads, one for each KV head; k [H, T, D], v [H, T, Dv], bias [H, T]; any strides.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .flash import flash_fused
from .launch import triton
from .op import Op, random, strained

BLOCK = 64  # queries at once in the reference

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def flash(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:  # [1, Hq, M, D], [1, Hq, M]
    """torch's flash attention on the CPU, with its LSE. By itself it takes any last stride for 1, silently wrong."""
    out, lse = _flash(*(part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v)), **options)
    return out, lse


def dense_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv] in the dtype of q, [Hq, M] float32
    """The definition, a block of queries at a time."""
    groups = q.reshape(len(k), -1, *q.shape[1:]).float()  # [H, G, M, D]
    blocks = []
    for start in range(0, q.shape[1], BLOCK):
        rows = groups[:, :, start : start + BLOCK]
        logit = rows @ k[:, None].float().mT * scale
        logit = logit if bias is None else logit + bias[:, None, None]
        lse = logit.logsumexp(-1)
        blocks.append(((logit - lse[..., None]).exp() @ v[:, None].float(), lse))
    out, lse = (torch.cat(part, 2).flatten(0, 1) for part in zip(*blocks, strict=True))
    return out.to(q.dtype), lse


def dense_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv], [Hq, M] float32
    """One flash call; the G * M queries of a KV head are its rows, which for few queries is 7 times as fast."""
    if k.shape[-1] != v.shape[-1] or not q.numel() or not k.numel():
        return dense_attention_ref(q, k, v, bias, scale)
    rows = q.reshape(1, len(k), -1, q.shape[-1])
    mask = None if bias is None else bias[None, :, None]
    out, lse = flash(rows, k[None], v[None], attn_mask=mask, scale=scale)
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def dense_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv], [Hq, M] float32
    """The same in Triton."""
    return flash_fused(q, k, v, scale, bias=bias)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, M, T, D = (case[name] for name in ("H", "G", "M", "T", "D"))
    generator = torch.Generator().manual_seed(seed)
    q = random((M, H * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    k, v = (random((H, 2 * T, size), dtype, generator)[:, :T] for size in (D, case.get("Dv", D)))  # a growing buffer
    bias = random((H, T), torch.float32, generator) if case["bias"] else None
    q, bias = strained(case, q, bias)
    return q, k, v, bias, D**-0.5


def attention_cost(
    case: Mapping[str, Any], itemsize: int, entries: int, pairs: int
) -> tuple[int, int]:  # entries of all heads, and how many pairs of a query and an entry meet
    """Bytes and flops of attention: queries, outputs and LSE; keys, values and biases."""
    D, Dv = case["D"], case.get("Dv", case["D"])
    queries = case["G"] * case["M"] * (case.get("H") or len(case["lens"]))
    moved = queries * ((D + Dv) * itemsize + 4) + entries * ((D + Dv) * itemsize + (4 if case.get("bias") else 0))
    return moved, 2 * pairs * (D + Dv)


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    entries = case["H"] * case["T"]
    return attention_cost(case, itemsize, entries, entries * case["G"] * case["M"])


dense_attention = Op(
    name="dense_attention",
    ref=dense_attention_ref,
    cpu=dense_attention_cpu,
    fused=dense_attention_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "M": 1024, "T": 32768, "D": 128, "bias": False},
    variants=({}, {"bias": True}, {"M": 1}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "M": 1, "T": 1, "D": 16, "bias": False},
        {"H": 3, "G": 3, "M": 1, "T": 129, "D": 64, "bias": True},
        {"H": 2, "G": 2, "M": 65, "T": 517, "D": 64, "bias": False},
        {"H": 2, "G": 2, "M": 9, "T": 2003, "D": 16, "bias": True},
        {"H": 2, "G": 4, "M": 5, "T": 63, "D": 80, "bias": True},
        {"H": 2, "G": 2, "M": 3, "T": 65, "D": 24, "Dv": 16, "bias": True, "far": True},
        {"H": 2, "G": 1, "M": 2, "T": 65, "D": 64, "bias": False, "loud": True},
    ),
)
