"""Attention over keys and values that are codes, which are opened block by block as they are read.

q [Hq, M, D] is in groups of G heads, one for each KV head; codes lie head after head, and a head begins with a block of
them. out [Hq, M, Dv] in the dtype of q, lse [Hq, M] float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .attention import lens_of, ragged_attention_ref
from .codes import Codes, pack
from .dense import dense_attention_cpu, join
from .flash import Part
from .launch import triton
from .op import Op, random, strained
from .packed_card import packed_attention_fused

BLOCK = 2048  # entries opened at once on the CPU


def packed_attention_ref(
    q: Tensor,  # [Hq, M, D]
    k: Codes,  # [E, D]
    v: Codes,  # [E, Dv]
    lens: Sequence[int],  # [H], sum E
    bias: Tensor | None,  # [E] float32, added to the logits
    scale: float,
) -> Part:  # [Hq, M, Dv], [Hq, M] float32
    """Attention over the rows that the codes stand for, in the dtype of the queries: the definition."""
    return ragged_attention_ref(q, k.rows().to(q.dtype), v.rows().to(q.dtype), lens, bias, scale)


def packed_attention_cpu(
    q: Tensor, k: Codes, v: Codes, lens: Sequence[int], bias: Tensor | None, scale: float
) -> Part:  # [Hq, M, Dv], [Hq, M] float32
    """Some entries of a head at a time; never more than these are open."""
    first, heads = 0, []
    for rows, n in zip(q.chunk(len(lens)), lens, strict=True):
        nothing = q.new_zeros(*rows.shape[:2], v.D), q.new_full(rows.shape[:2], -torch.inf, dtype=torch.float32)
        parts = _blocks_of(rows, k, v, bias, scale, (first, first + n))
        heads.append(join(parts) if n else nothing)
        first += n
    return torch.cat([out for out, _ in heads]), torch.cat([lse for _, lse in heads])


def _blocks_of(
    q: Tensor, k: Codes, v: Codes, bias: Tensor | None, scale: float, span: tuple[int, int]
) -> Iterator[Part]:
    step = k.gt * v.gt * max(1, BLOCK // (k.gt * v.gt))
    for begin in range(*span, step):
        at = slice(begin, min(begin + step, span[1]))
        keys, values = (codes.rows(at.start, at.stop).to(q.dtype)[None] for codes in (k, v))
        yield dense_attention_cpu(q, keys, values, None if bias is None else bias[None, at], scale)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    lens, G, M, D = _lens(case), case["G"], case["M"], case["D"]
    generator = torch.Generator().manual_seed(seed)
    q = random((M, len(lens) * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    bits, group = case["bits"], case["group"]
    k = _codes((sum(lens), D), bits, group or 1, 1 if group else D, generator)
    v = _codes((sum(lens), case.get("Dv", D)), bits, 1, group or case.get("Dv", D), generator)
    bias = random((sum(lens),), torch.float32, generator) if case["bias"] else None
    q, bias = strained(case, q, bias)
    return q, k, v, lens, bias, D**-0.5


def _codes(shape: tuple[int, int], bits: int, gt: int, gc: int, generator: torch.Generator) -> Codes:
    """Codes of numbers that all dtypes hold: small whole ones by powers of 2. One alone in a row has a sign."""
    D, blocks = shape[1], (shape[0] // gt, -(-shape[1] // gc))
    code = torch.randint(0, 2**bits, shape, generator=generator)
    scale = 2.0 ** (torch.randint(0, 3, blocks, generator=generator) - bits)
    if gc == D > 1:
        return Codes((code - 128).to(torch.int8), scale, None, bits, gt, gc, D)
    zero = -scale * torch.randint(0, 2**bits, blocks, generator=generator)
    return Codes(pack(code.to(torch.uint8), bits), scale.half(), zero.half(), bits, gt, gc, D)


def _lens(case: Mapping[str, Any]) -> list[int]:
    """Whole groups a head."""
    group = case["group"] or 1
    return [n // group * group for n in lens_of(case)]


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    lens, D, Dv = _lens(case), case["D"], case.get("Dv", case["D"])
    E, queries, group, bits = sum(lens), len(lens) * case["G"] * case["M"], case["group"], case["bits"]
    codes = E * (-(-D * bits // 8) + -(-Dv * bits // 8))
    scales = 4 * (E // group * D + E * -(-Dv // group)) if group else 8 * E
    moved = queries * ((D + Dv) * itemsize + 4) + codes + scales + (4 * E if case["bias"] else 0)
    return moved, 2 * E * case["G"] * case["M"] * (D + Dv)


packed_attention = Op(
    name="packed_attention",
    ref=packed_attention_ref,
    cpu=packed_attention_cpu,
    fused=packed_attention_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "M": 1, "T": 32768, "D": 128, "bits": 4, "group": 32, "bias": True},
    variants=({}, {"bits": 2, "bias": False}, {"bits": 8, "group": 0}, {"M": 128}),
    cost=_cost,
    cases=(
        {"lens": [1], "G": 2, "M": 1, "D": 16, "bits": 8, "group": 0, "bias": False},
        {"lens": [128, 96, 32], "G": 3, "M": 1, "D": 64, "bits": 4, "group": 32, "bias": True},
        {"lens": [65, 130], "G": 2, "M": 63, "D": 20, "bits": 2, "group": 13, "bias": False},
        {"lens": [2, 2003, 0, 1], "G": 2, "M": 5, "D": 64, "bits": 8, "group": 0, "bias": True},
        {"lens": [189, 63], "G": 1, "M": 2, "D": 80, "bits": 2, "group": 63, "bias": True},
        {"lens": [129, 3], "G": 2, "M": 65, "D": 24, "Dv": 17, "bits": 4, "group": 3, "bias": True, "far": True},
        {"lens": [64, 2], "G": 2, "M": 2, "D": 64, "bits": 8, "group": 2, "bias": False, "loud": True},
    ),
)
