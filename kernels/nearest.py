"""The kept key most like each dropped one: k [H, T, D], dropped [H, M], kept [H, n] -> at [H, M] int64, cosine [H, M].

`dropped` and `kept` are indices of entries, -1 for padding; `at` counts inside `kept`, the lowest of equals, and is -1,
with a cosine of 0, for padding and where a head keeps nothing. On a card a program owns a block of dropped keys and
walks the kept ones, as attention does, with a running maximum in place of the sum: nothing of size M x n is written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .flash import pad
from .launch import Kernel, tl, triton
from .op import Op, random

BLOCK = 512  # dropped and kept keys at once on the CPU: their products stay in the cache


def nearest_key_ref(
    k: Tensor,  # [H, T, D]
    dropped: Tensor,  # [H, M] int64
    kept: Tensor,  # [H, n] int64
) -> tuple[Tensor, Tensor]:  # [H, M] int64, [H, M] float32
    """The definition; the cosine of a zero vector is 0."""
    at, cosine = torch.full_like(dropped, -1), torch.zeros(dropped.shape, device=k.device)
    for h in range(len(k) if kept.shape[1] else 0):
        keys, blank = _unit(k[h, kept[h].clamp(min=0)]), kept[h] < 0
        for i in range(0, dropped.shape[1], BLOCK):
            asked = dropped[h, i : i + BLOCK]
            best = (_unit(k[h, asked.clamp(min=0)]) @ keys.T).masked_fill(blank, -torch.inf).max(1)
            found = (asked >= 0) & ~blank.all()
            at[h, i : i + BLOCK] = best.indices.masked_fill(~found, -1)
            cosine[h, i : i + BLOCK] = best.values.masked_fill(~found, 0.0)
    return at, cosine


def _unit(keys: Tensor) -> Tensor:  # [..., D] -> [..., D] float32
    keys = keys.float()
    return keys * _inverse(keys)[..., None]


def _inverse(keys: Tensor) -> Tensor:  # [..., D] -> [...] float32
    norm = torch.linalg.vector_norm(keys, dim=-1, dtype=torch.float32)
    return torch.where(norm > 0, 1 / norm, 0.0)


@Kernel
def _nearest(  # type: ignore[no-untyped-def]
    k, inverse, dropped, kept, at, cosine,
    T, M, N,
    k_h, k_t, k_d,
    D: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
    UPCAST: tl.constexpr,
):  # fmt: skip
    """at, cosine [H, M]: BM dropped keys of head i_h against its N kept ones; inverse [H, T] is 1 / |k|."""
    i_m, i_h = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    o_m, o_d = i_m * BM + tl.arange(0, BM), tl.arange(0, BD).to(tl.int64)
    m_m, m_d = o_m < M, o_d < D
    k, inverse, kept = k + i_h * k_h, inverse + i_h * T, kept + i_h * N
    b_m = tl.load(dropped + i_h * M + o_m, mask=m_m, other=-1)
    b_q = tl.load(k + b_m[:, None] * k_t + o_d[None, :] * k_d, mask=(b_m >= 0)[:, None] & m_d[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)
    # each column of the block has a maximum of its own, so that they meet only once
    b_top, b_from = tl.full([BM, BN], float("-inf"), tl.float32), tl.zeros([BM, BN], tl.int32)
    for i in range(0, N, BN):
        o_n = i + tl.arange(0, BN)
        b_n = tl.load(kept + o_n, mask=o_n < N, other=-1)
        m_n = b_n >= 0
        b_k = tl.load(k + b_n[None, :] * k_t + o_d[:, None] * k_d, mask=m_n[None, :] & m_d[:, None], other=0.0)
        b_inverse = tl.load(inverse + b_n, mask=m_n, other=0.0)
        if UPCAST:
            b_k = b_k.to(tl.float32)
        b_x = tl.dot(b_q, b_k, input_precision="ieee") * b_inverse[None, :]
        b_x = tl.where(m_n[None, :], b_x, float("-inf"))
        b_from = tl.where(b_x > b_top, i, b_from)
        b_top = tl.maximum(b_x, b_top)
    b_best = tl.max(b_top, 1)
    b_at = tl.min(tl.where(b_top == b_best[:, None], b_from + tl.arange(0, BN)[None, :], 2**31 - 1), 1)
    found = (b_m >= 0) & (b_best > float("-inf"))
    b_cosine = b_best * tl.load(inverse + b_m, mask=b_m >= 0, other=0.0)
    tl.store(at + i_h * M + o_m, tl.where(found, b_at, -1).to(tl.int64), mask=m_m)
    tl.store(cosine + i_h * M + o_m, tl.where(found, b_cosine, 0.0), mask=m_m)


def nearest_key_fused(k: Tensor, dropped: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:  # [H, M] int64, float32
    """The same in one Triton kernel, behind the norms in plain torch."""
    (H, T, D), M, N = k.shape, dropped.shape[1], kept.shape[1]
    at, cosine = torch.empty(H, M, dtype=torch.int64, device=k.device), torch.empty(H, M, device=k.device)
    blocks = _blocks(D, k.element_size())
    _nearest[triton.cdiv(M, blocks["BM"]), H](
        k, _inverse(k), dropped.contiguous(), kept.contiguous(), at, cosine, T, M, N, *k.stride(), **blocks
    )
    return at, cosine


def _blocks(D: int, itemsize: int) -> dict[str, int]:
    # float32 products run in registers, not tensor cores, where larger tiles would spill
    BD = pad(D)
    BM, BN = (32, 16) if itemsize == 4 else (128 if BD <= 128 else 64, 64)
    return {
        "D": D,
        "BD": BD,
        "BM": BM,
        "BN": BN,
        "num_warps": max(4, BM // 16),
        "num_stages": 2,
        "enable_fp_fusion": True,
    }


def nearest_key_cpu(k: Tensor, dropped: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:  # [H, M] int64, float32
    """A head at a time, and of its keys a tile: float32 products, of which the best so far is remembered."""
    at, cosine = torch.full_like(dropped, -1), torch.zeros(dropped.shape)
    for h, keys in enumerate(k):
        rows, columns = ((part[h] >= 0).nonzero().flatten() for part in (dropped, kept))
        units = _unit(keys[kept[h, columns]])
        for part in torch.split(rows, BLOCK) if len(rows) and len(columns) else ():
            place, best = _best(_unit(keys[dropped[h, part]]), units)
            at[h, part], cosine[h, part] = columns[place], best
    return at, cosine


def _best(asked: Tensor, units: Tensor) -> tuple[Tensor, Tensor]:  # [M, D], [n, D] -> [M] int64, [M]
    place, best = torch.zeros(len(asked), dtype=torch.int64), torch.full((len(asked),), -torch.inf)
    for i in range(0, len(units), BLOCK):
        top = (asked @ units[i : i + BLOCK].T).max(1)
        place = torch.where(top.values > best, top.indices + i, place)
        best = torch.maximum(top.values, best)
    return place, best


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, T, D = (case[name] for name in "HTD")
    generator = torch.Generator().manual_seed(seed)
    k = random((H, T, D), dtype, generator) * (3000 if case.get("loud") else 1)
    lens, stay = (torch.tensor(part)[:, None] for part in _sizes(case))
    real = torch.arange(T) < lens
    k[~real] = torch.nan
    kept = torch.rand(H, T, generator=generator).masked_fill(~real, 2.0).argsort(1).argsort(1) < stay
    return k, _index(real & ~kept), _index(kept)


def _sizes(case: Mapping[str, Any]) -> tuple[list[int], list[int]]:  # entries, and those kept, of each head
    lens = case.get("lens", [case["T"]] * case["H"])
    return lens, [min(n, max(1, round(n * case["share"]))) for n in lens]


def _index(mask: Tensor) -> Tensor:  # [H, T] bool -> [H, n] int64
    order = mask.int().argsort(dim=1, descending=True, stable=True)[:, : int(mask.sum(1).max())]
    return torch.where(mask.gather(1, order), order, -1)


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, T, D = (case[name] for name in "HTD")
    lens, stay = _sizes(case)
    M, n = max(a - b for a, b in zip(lens, stay, strict=True)), max(stay)
    return H * (T * D * itemsize + 20 * M + 8 * n), 2 * H * M * n * D


nearest_key = Op(
    name="nearest_key",
    ref=nearest_key_ref,
    cpu=nearest_key_cpu,
    fused=nearest_key_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "T": 32768, "D": 128, "share": 0.35},
    cost=_cost,
    cases=(
        {"H": 1, "T": 1, "D": 8, "share": 1.0},
        {"H": 3, "T": 2, "D": 16, "share": 0.5},
        {"H": 4, "T": 65, "D": 63, "share": 0.35, "lens": (65, 9, 0, 1)},
        {"H": 2, "T": 129, "D": 80, "share": 0.01},
        {"H": 1, "T": 63, "D": 256, "share": 0.9},
        {"H": 2, "T": 129, "D": 20, "share": 0.5, "loud": True},
        {"H": 1, "T": 2003, "D": 64, "share": 0.4},
    ),
)
