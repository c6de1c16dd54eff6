"""Attention by position, for what flash calls do not know: sliding windows and soft-capped logits, with the LSE.

q [Hq, M, D] in groups of G heads, at rising positions q_pos [M]; k [H, T, D], v [H, T, Dv], any strides, entries at
rising positions pos [T]. A query sees the entries with its position - window < pos <= its position.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .dense import attention_cost, flash
from .flash import flash_fused
from .launch import triton
from .op import Op, random, strained

BLOCK, WIDE = 64, 256  # queries at once in the reference, and in a flash call


def banded_attention_ref(
    q: Tensor,  # [Hq, M, D]
    q_pos: Tensor,  # [M] int, rising
    k: Tensor,  # [H, T, D]
    v: Tensor,  # [H, T, Dv]
    pos: Tensor,  # [T] int, rising
    scale: float,
    bias: Tensor | None = None,  # [H, T] float32, added to the logits after the soft-cap
    window: int | None = None,
    softcap: float | None = None,  # logit = softcap * tanh(logit / softcap)
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv] in the dtype of q, [Hq, M] float32
    """The definition. A query that sees nothing gives 0 and -inf."""
    groups = q.reshape(len(k), -1, *q.shape[1:])  # [H, G, M, D]
    blocks = []
    for i in range(0, q.shape[1], BLOCK):
        mask = _mask(q_pos[i : i + BLOCK], pos, window)
        blocks.append(_products(groups[:, :, i : i + BLOCK], k, v, mask, scale, bias, softcap))
    return _joined(blocks, q)


def banded_attention_sliced(
    q: Tensor,
    q_pos: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    scale: float,
    bias: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Each block of queries meets only the entries that some of them see; a flash call where one can do it."""
    quick = softcap is None and k.shape[-1] == v.shape[-1] and not q.is_cuda
    groups, step = q.reshape(len(k), -1, *q.shape[1:]), WIDE if quick else BLOCK
    blocks = []
    for i in range(0, q.shape[1], step):
        at = q_pos[i : i + step]
        near = _seen_by_some(at, pos, window)
        mask, part = _mask(at, pos[near], window), None if bias is None else bias[:, near]
        rows, keys, values = groups[:, :, i : i + step], k[:, near], v[:, near]
        if quick and keys.numel():
            blocks.append(_flashed(rows, keys, values, mask, scale, part))
        else:
            blocks.append(_products(rows, keys, values, mask, scale, part, softcap))
    return _joined(blocks, q)


def _seen_by_some(at: Tensor, pos: Tensor, window: int | None) -> slice:  # [B], [T]
    oldest = -1 if window is None else int(at[0]) - window
    ends = torch.tensor([oldest, int(at[-1])], dtype=pos.dtype, device=pos.device)
    low, high = torch.searchsorted(pos.contiguous(), ends, right=True).tolist()
    return slice(low, max(low, high))


def _mask(at: Tensor, pos: Tensor, window: int | None) -> Tensor:  # [B], [T] -> [B, T] bool, what is not seen
    pos = pos.to(at.device)
    hidden = pos > at[:, None]
    return hidden if window is None else hidden | (pos <= at[:, None] - window)


def _products(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    hidden: Tensor,
    scale: float,
    bias: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # [H, G, B, D] -> [H, G, B, Dv] float32, [H, G, B] float32
    logit = capped(q.float() @ k[:, None].float().mT * scale, softcap)
    logit = logit if bias is None else logit + bias[:, None, None]
    logit = logit.masked_fill(hidden.to(q.device), -math.inf)
    lse = logit.logsumexp(-1)
    weight = (logit - lse[..., None]).exp().nan_to_num(0.0)  # nan: nothing seen
    return weight @ v[:, None].float(), lse


def capped(logit: Tensor, softcap: float | None) -> Tensor:
    """Logits kept within +-softcap, smoothly, as Gemma 2 does."""
    return logit if softcap is None else (logit / softcap).tanh() * softcap


def _flashed(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor, scale: float, bias: Tensor | None
) -> tuple[Tensor, Tensor]:  # [H, G, B, D] -> [H, G, B, Dv], [H, G, B] float32
    H, G, B, _ = q.shape
    mask = None if bias is None else bias[:, None, None]
    if bool(hidden.any()):
        mask = (0.0 if mask is None else mask) + torch.zeros(1, 1, B, k.shape[1]).masked_fill(hidden, -math.inf)
    if mask is not None:  # one for all heads where no bias tells them apart
        mask = mask.expand(-1, G, B, -1).reshape(1, len(mask), G * B, -1)
    out, lse = flash(q.reshape(1, H, G * B, -1), k[None], v[None], attn_mask=mask, scale=scale)
    blind = hidden.all(1)
    out, lse = out.reshape(H, G, B, -1), lse.reshape(H, G, B)
    return out.masked_fill(blind[:, None], 0.0), lse.masked_fill(blind, -math.inf)


def _joined(blocks: list[tuple[Tensor, Tensor]], q: Tensor) -> tuple[Tensor, Tensor]:
    out, lse = (torch.cat(part, 2).flatten(0, 1) for part in zip(*blocks, strict=True))
    return out.to(q.dtype), lse


def banded_attention_fused(
    q: Tensor,
    q_pos: Tensor,
    k: Tensor,
    v: Tensor,
    pos: Tensor,
    scale: float,
    bias: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv], [Hq, M] float32
    """The same in Triton, which finds the entries that a block of queries sees by their positions."""
    pos = pos.expand(len(k), -1)
    return flash_fused(q, k, v, scale, bias=bias, q_pos=q_pos, pos=pos, window=window, softcap=softcap)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, M, T, D = (case[name] for name in ("H", "G", "M", "T", "D"))
    generator = torch.Generator().manual_seed(seed)
    q = random((M, H * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    k, v = (random((H, 2 * T, size), dtype, generator)[:, :T] for size in (D, case.get("Dv", D)))  # a growing buffer
    bias = random((H, T), torch.float32, generator) if case["bias"] else None
    pos = torch.randperm(2 * T, generator=generator)[:T].sort().values.int()
    q_pos = torch.arange(M) + case["first"]
    q, bias = strained(case, q, bias)
    return q, q_pos, k, v, pos, D**-0.5, bias, case["window"], case["softcap"]


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, M, T = (case[name] for name in "HGMT")
    moved, flops = attention_cost(case, itemsize, H * T, H * G * M * min(T, case["window"] or T))
    return moved + 8 * M + 4 * T, flops


banded_attention = Op(
    name="banded_attention",
    ref=banded_attention_ref,
    cpu=banded_attention_sliced,
    fused=banded_attention_fused if triton else None,
    inputs=_inputs,
    usual={
        "H": 8,
        "G": 4,
        "M": 1024,
        "T": 32768,
        "D": 128,
        "bias": False,
        "first": 65536,
        "window": None,
        "softcap": 50.0,
    },
    variants=({}, {"bias": True}, {"window": 4096, "softcap": None}, {"M": 1, "bias": True}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "M": 1, "T": 1, "D": 16, "bias": False, "first": 3, "window": None, "softcap": None},
        {"H": 3, "G": 3, "M": 1, "T": 129, "D": 64, "bias": True, "first": 258, "window": 63, "softcap": None},
        {"H": 2, "G": 2, "M": 317, "T": 217, "D": 64, "bias": False, "first": 100, "window": 33, "softcap": None},
        {"H": 2, "G": 2, "M": 9, "T": 2003, "D": 16, "bias": True, "first": 4001, "window": 2900, "softcap": None},
        {"H": 2, "G": 4, "M": 65, "T": 63, "D": 80, "bias": True, "first": 20, "window": None, "softcap": 5.0},
        {"H": 2, "G": 1, "M": 129, "T": 65, "D": 20, "bias": True, "first": 0, "window": 9, "softcap": 2.0},
        {"H": 2, "G": 2, "M": 3, "T": 65, "D": 24, "Dv": 16, "bias": True, "first": 90, "window": 1, "softcap": None},
        {
            "H": 2,
            "G": 2,
            "M": 2,
            "T": 65,
            "D": 64,
            "bias": True,
            "first": 90,
            "window": 60,
            "softcap": None,
            "far": True,
            "loud": True,
        },
    ),
)
