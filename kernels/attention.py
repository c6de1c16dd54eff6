"""Attention over a snapshot's flat rows and over new tokens, with the log-sum-exp that joins such parts into one.

q [Hq, M, D] is in groups of G heads, one for each KV head; out [Hq, M, Dv] in the dtype of q, lse [Hq, M] float32.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from .dense import attention_cost, count_pieces, dense_attention_ref, flash, join, pieces, unbound
from .flash import Part, flash_fused
from .launch import triton
from .op import Op, random, strained

BLOCK = 64  # queries at once in the reference


def ragged_attention_ref(
    q: Tensor,  # [Hq, M, D]
    k: Tensor,  # [E, D], head after head
    v: Tensor,  # [E, Dv]
    lens: Sequence[int] | Tensor,  # [H], sum E
    bias: Tensor | None,  # [E] float32, added to the logits
    scale: float,
    tail: tuple[Tensor, Tensor] | None = None,  # [H, S, D], [H, S, Dv]: as many more entries of every head, bias 0
) -> Part:  # [Hq, M, Dv], [Hq, M] float32
    """Every query sees every entry of its KV head: the definition. A head without entries gives 0 and -inf."""
    each = []
    for h, (rows, keys, values, added) in enumerate(_heads(q, k, v, _ints(lens), bias)):
        if tail is not None:
            keys, values = torch.cat([keys, tail[0][h : h + 1]], 1), torch.cat([values, tail[1][h : h + 1]], 1)
            added = None if added is None else torch.nn.functional.pad(added, (0, tail[0].shape[1]))
        each.append(dense_attention_ref(rows, keys, values, added, scale))
    return _cat(each, 0)


def ragged_attention_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Sequence[int] | Tensor,
    bias: Tensor | None,
    scale: float,
    tail: tuple[Tensor, Tensor] | None = None,
) -> Part:  # [Hq, M, Dv], [Hq, M] float32
    """Flash calls over all heads at once if they are equally long, else over each, and over the tail."""
    lens = _ints(lens)
    if k.shape[1] != v.shape[1] or not q.numel() or not min(lens):
        return ragged_attention_ref(q, k, v, lens, bias, scale, tail)
    rows = q.reshape(len(lens), 1, -1, q.shape[-1])
    if lens.count(lens[0]) == len(lens):
        keys, values = (part.view(len(lens), lens[0], -1) for part in (k, v))
        P = count_pieces(len(lens), rows.shape[2], lens[0])
        found = pieces(rows, keys, values, None if bias is None else bias.view(keys.shape[:2]), scale, P)
    else:
        P = min(count_pieces(1, rows.shape[2], max(lens)), *lens)
        each = _heads(rows, k, v, lens, bias)
        found = _cat([pieces(own, keys, values, added, scale, P) for own, keys, values, added in each], 0)
    behind = () if tail is None or not tail[0].shape[1] else unbound(pieces(rows, *tail, None, scale, 1))
    out, lse = join(chain(unbound(found), behind))
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def ragged_attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lens: Sequence[int] | Tensor,
    bias: Tensor | None,
    scale: float,
    tail: tuple[Tensor, Tensor] | None = None,
) -> Part:  # [Hq, M, Dv], [Hq, M] float32
    """Triton on flat rows and tail. Lengths in a tensor of the card have to be waited for; a list has not."""
    return flash_fused(q, k, v, scale, bias=bias, lens=_ints(lens), tail=tail)


def causal_attention_ref(
    q: Tensor,  # [Hq, M, D]
    k: Tensor,  # [H, M, D]
    v: Tensor,  # [H, M, Dv]
    scale: float,
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv], [Hq, M] float32
    """Query i sees the entries j <= i of its KV head: the definition."""
    groups, keys, values = torch.unflatten(q.float(), 0, (len(k), -1)), k[:, None].float().mT, v[:, None].float()
    order = torch.arange(k.shape[1], device=k.device)
    blocks = []
    for i in torch.split(order, BLOCK):
        logit = (groups[:, :, i] @ keys * scale).masked_fill(order > i[:, None], -math.inf)  # [H, G, B, M]
        lse = logit.logsumexp(-1)
        blocks.append(((logit - lse[..., None]).exp() @ values, lse))
    out, lse = _cat(blocks, 2)
    return out.flatten(0, 1).to(q.dtype), lse.flatten(0, 1)


def causal_attention_cpu(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """One flash call."""
    if k.shape[-1] != v.shape[-1] or not q.numel():
        return causal_attention_ref(q, k, v, scale)
    out, lse = flash(q[None], k[None], v[None], is_causal=True, scale=scale)
    return out[0], lse[0]


def causal_attention_fused(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Part:
    """The same in Triton, which skips what lies ahead of a block of queries."""
    return flash_fused(q, k, v, scale, causal=True)


def _heads(q: Tensor, k: Tensor, v: Tensor, lens: list[int], bias: Tensor | None) -> Iterator[tuple[Any, ...]]:
    keys, values = torch.split(k[None], lens, 1), torch.split(v[None], lens, 1)
    biases = [None] * len(lens) if bias is None else torch.split(bias[None], lens, 1)
    return zip(q.chunk(len(lens)), keys, values, biases, strict=True)


def _cat(parts: Sequence[Part], dim: int) -> Part:
    return torch.cat([out for out, _ in parts], dim), torch.cat([lse for _, lse in parts], dim)


def _ints(lens: Sequence[int] | Tensor) -> list[int]:
    return lens if isinstance(lens, list) else [int(n) for n in lens]


def _ragged_inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    lens, G, M, D = lens_of(case), case["G"], case["M"], case["D"]
    generator = torch.Generator().manual_seed(seed)
    q = random((M, len(lens) * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    k = random((sum(lens), D), dtype, generator)
    v = random((sum(lens), case.get("Dv", D)), dtype, generator)
    bias = random((sum(lens),), torch.float32, generator) if case["bias"] else None
    q, bias = strained(case, q, bias)
    sizes = (D, case.get("Dv", D)) if "S" in case else ()
    buffers = tuple(random((len(lens), 2 * case["S"], size), dtype, generator) for size in sizes)  # they grow
    return q, k, v, lens, bias, D**-0.5, tuple(part[:, : case["S"]] for part in buffers) or None


def lens_of(case: Mapping[str, Any]) -> list[int]:
    """As given, or H of them from T / 2 to 3 T / 2."""
    if "lens" in case:
        return list(case["lens"])
    H, T = case["H"], case["T"]
    return [T // 2 + T * h // max(H - 1, 1) for h in range(H)]


def _ragged_cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    lens = lens_of(case)
    new = len(lens) * case.get("S", 0)  # without biases
    entries = sum(lens) + new
    moved, flops = attention_cost(case, itemsize, entries, entries * case["G"] * case["M"])
    return moved - (4 * new if case["bias"] else 0), flops


def _causal_cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, M = case["H"], case["G"], case["M"]
    return attention_cost(case, itemsize, H * M, H * G * M * (M + 1) // 2)


def _causal_inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, M, D = case["H"], case["G"], case["M"], case["D"]
    generator = torch.Generator().manual_seed(seed)
    shapes = ((M, H * G, D), (M, H, D), (M, H, case.get("Dv", D)))
    q, k, v = (random(shape, dtype, generator).transpose(0, 1) for shape in shapes)
    return strained(case, q, None)[0], k, v, D**-0.5


ragged_attention = Op(
    name="ragged_attention",
    ref=ragged_attention_ref,
    cpu=ragged_attention_cpu,
    fused=ragged_attention_fused if triton else None,
    inputs=_ragged_inputs,
    usual={"H": 8, "G": 4, "M": 1, "T": 32768, "D": 128, "bias": True, "S": 64},
    variants=({}, {"bias": False, "S": 0}),
    cost=_ragged_cost,
    cases=(
        {"lens": [1], "G": 1, "M": 1, "D": 16, "bias": False},
        {"lens": [129, 129, 129], "G": 3, "M": 1, "D": 64, "bias": True},
        {"lens": [65, 65], "G": 2, "M": 63, "D": 20, "bias": False},
        {"lens": [2, 2003, 0, 1], "G": 2, "M": 5, "D": 64, "bias": True},
        {"lens": [63, 1], "G": 4, "M": 1, "D": 80, "bias": False},
        {"lens": [3, 65], "G": 2, "M": 65, "D": 24, "Dv": 16, "bias": True, "far": True},
        {"lens": [65, 2], "G": 2, "M": 2, "D": 64, "bias": False, "loud": True},
        {"lens": [65, 65], "G": 3, "M": 1, "D": 64, "bias": False, "S": 63},
        {"lens": [129, 2], "G": 1, "M": 2, "D": 64, "bias": True, "S": 1},
    ),
)

causal_attention = Op(
    name="causal_attention",
    ref=causal_attention_ref,
    cpu=causal_attention_cpu,
    fused=causal_attention_fused if triton else None,
    inputs=_causal_inputs,
    usual={"H": 8, "G": 4, "M": 1024, "D": 128},
    cost=_causal_cost,
    cases=(
        {"H": 1, "G": 1, "M": 1, "D": 16},
        {"H": 3, "G": 3, "M": 2, "D": 64},
        {"H": 2, "G": 4, "M": 129, "D": 80},
        {"H": 2, "G": 2, "M": 65, "D": 24, "Dv": 16},
        {"H": 1, "G": 1, "M": 517, "D": 16},
        {"H": 1, "G": 2, "M": 63, "D": 64, "loud": True},
    ),
)
