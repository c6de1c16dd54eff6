"""Merge each run of neighbouring entries into one, by Gaussian weights around its most attended member.

k [H, T, D], v [H, T, Dv], mass [H, T], start [H, T] -> flat rows k' [E, D], v' [E, Dv], head after head, with
lens [H], pivot [E], size [E] int64. KVMerger, arXiv:2407.08454; the count factor on values is the caller's. On a card
a program owns a run; its keys are read again, from the cache, once its width is known. How many runs there are the
host has to know to make room for them: the one time it waits for the card.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .flash import pad
from .flat import ROUNDS, Merged, bounds, merge_runs_flat, weights
from .launch import Kernel, tl, triton
from .op import Op, random

ROWS = 512  # numbers in a block of keys or values


def merge_runs_ref(
    k: Tensor,  # [H, T, D]
    v: Tensor,  # [H, T, Dv]
    mass: Tensor,  # [H, T] float32; the largest of a run, of equal ones the first, is its pivot
    start: Tensor,  # [H, T] bool, True where a run begins, as at each head's first entry
    sigma: str | float = "mean",  # mean, rms, literal or a number
    real: Tensor | None = None,  # [H, T] bool, False for the padding that ends a head
) -> Merged:
    """The definition, run by run; an entry on its own is copied bit for bit."""
    rows_k, rows_v, pivot, size = [], [], [], []
    lens = (start if real is None else start & real).sum(1)
    for h, end in enumerate([k.shape[1]] * len(k) if real is None else real.sum(1).tolist()):
        for i, j in pairwise([*start[h, :end].nonzero().flatten().tolist(), end]):
            p = int(mass[h, i:j].argmax())
            keys, values = k[h, i:j].float(), v[h, i:j].float()
            dist = torch.linalg.vector_norm(keys - keys[p], dim=-1)
            n, norm = lens.new_tensor([j - i]), torch.linalg.vector_norm(keys[p : p + 1], dim=-1)
            weight = weights(dist, n, norm, sigma) if j - i > 1 else None
            rows_k.append(k[h, i] if weight is None else (weight @ keys).to(k.dtype))
            rows_v.append(v[h, i] if weight is None else (weight @ values).to(v.dtype))
            pivot.append(i + p)
            size.append(j - i)
    if not size:
        return k[0, :0].clone(), v[0, :0].clone(), lens, lens[:0], lens[:0]
    return torch.stack(rows_k), torch.stack(rows_v), lens, lens.new_tensor(pivot), lens.new_tensor(size)


@Kernel
def _merge_run(  # type: ignore[no-untyped-def]
    k, v, mass, first, size, new_k, new_v, pivot,
    sigma, T,
    k_h, k_t, k_d, v_h, v_t, v_d,
    RULE: tl.constexpr, ROUNDS: tl.constexpr, D: tl.constexpr, Dv: tl.constexpr,
    BM: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BDv: tl.constexpr,
):  # fmt: skip
    """Row i_e of new_k [E, D], new_v [E, Dv] and pivot [E]: a run of n entries, of which the first is t of head h."""
    i_e = tl.program_id(0).to(tl.int64)
    begin, n = tl.load(first + i_e), tl.load(size + i_e)
    h, t = begin // T, begin % T
    o_t, o_d, o_v = tl.arange(0, BT), tl.arange(0, BD).to(tl.int64), tl.arange(0, BDv).to(tl.int64)
    m_d, m_v = o_d < D, o_v < Dv
    k += h * k_h + t * k_t + o_d * k_d
    v += h * v_h + t * v_t + o_v * v_d
    new_k += i_e * D + o_d
    new_v += i_e * Dv + o_v
    if n == 1:
        tl.store(new_k, tl.load(k, mask=m_d), mask=m_d)
        tl.store(new_v, tl.load(v, mask=m_v), mask=m_v)
        tl.store(pivot + i_e, t)
    else:
        peak, top = tl.full([], 0, tl.int64), tl.full([], float("-inf"), tl.float32)
        for i in range(0, n, BM):
            o_m = i + tl.arange(0, BM)
            b_mass = tl.load(mass + begin + o_m, mask=o_m < n, other=float("-inf"))
            b_top = tl.max(b_mass, 0)
            peak = tl.where(b_top > top, tl.min(tl.where(b_mass == b_top, o_m, n), 0), peak)
            top = tl.maximum(b_top, top)
        tl.store(pivot + i_e, t + peak)
        b_p = tl.load(k + peak * k_t, mask=m_d, other=0.0).to(tl.float32)
        width = tl.full([], 0.0, tl.float32) + sigma
        for _ in range(ROUNDS):
            total = tl.full([], 0.0, tl.float32)
            for i in range(0, n, BT):
                m_t, at = i + o_t < n, (i + o_t)[:, None]
                b_k = tl.load(k[None, :] + at * k_t, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
                b_x = tl.sum((b_k - b_p[None, :]) * (b_k - b_p[None, :]), 1)  # squared distances
                if RULE == "mean":
                    b_x = tl.sqrt(b_x)
                elif RULE == "literal":
                    b_x = tl.where(width > 0, tl.exp(-0.5 * b_x / width / width), 1.0)
                total += tl.sum(tl.where(m_t, b_x, 0.0), 0)
            if RULE == "mean":
                width = tl.maximum(total / (n - 1), 1e-6 * tl.sqrt(tl.sum(b_p * b_p, 0)))
            elif RULE == "rms":
                width = tl.sqrt(total / (n - 1))
            else:
                width = total / (1.4142135623730951 * n)
        b_new_k, b_new_v = tl.zeros([BD], tl.float32), tl.zeros([BDv], tl.float32)
        total = tl.full([], 0.0, tl.float32)
        for i in range(0, n, BT):
            m_t, at = i + o_t < n, (i + o_t)[:, None]
            b_k = tl.load(k[None, :] + at * k_t, mask=m_t[:, None] & m_d[None, :], other=0.0).to(tl.float32)
            b_v = tl.load(v[None, :] + at * v_t, mask=m_t[:, None] & m_v[None, :], other=0.0).to(tl.float32)
            b_x = tl.sum((b_k - b_p[None, :]) * (b_k - b_p[None, :]), 1)
            b_x = tl.where(width > 0, tl.exp(-0.5 * b_x / width / width), 1.0)  # width 0: all lie on the pivot
            b_x = tl.where(m_t, b_x, 0.0)
            total += tl.sum(b_x, 0)
            b_new_k += tl.sum(b_x[:, None] * b_k, 0)
            b_new_v += tl.sum(b_x[:, None] * b_v, 0)
        tl.store(new_k, b_new_k / total, mask=m_d)
        tl.store(new_v, b_new_v / total, mask=m_v)


def merge_runs_fused(
    k: Tensor, v: Tensor, mass: Tensor, start: Tensor, sigma: str | float = "mean", real: Tensor | None = None
) -> Merged:
    """The same in one Triton kernel."""
    first, size, lens = bounds(start, real)
    new_k, new_v = (part.new_empty(len(first), part.shape[-1]) for part in (k, v))
    pivot, (rule, rounds, width) = torch.empty_like(first), _rule(sigma)
    _merge_run[len(first),](
        k, v, mass.contiguous(), first, size, new_k, new_v, pivot, width, k.shape[1], *k.stride(), *v.stride(),
        RULE=rule, ROUNDS=rounds, **_blocks(k.shape[-1], v.shape[-1]),
    )  # fmt: skip
    return new_k, new_v, lens, pivot, size


def _blocks(D: int, Dv: int) -> dict[str, Any]:
    # most runs have a few members: a warp each, and few rows at once, let many be on their way
    BD, BDv = (pad(size) for size in (D, Dv))
    BT = max(1, ROWS // max(BD, BDv))
    options = {"num_warps": 1, "enable_fp_fusion": True}
    return {"D": D, "Dv": Dv, "BD": BD, "BDv": BDv, "BT": BT, "BM": 64, **options}


def _rule(sigma: str | float) -> tuple[str, int, float]:
    # the rounds it takes to know the width, and the width before the first
    if not isinstance(sigma, str):
        return "fixed", 0, float(sigma)
    if sigma not in ("mean", "rms", "literal"):
        raise ValueError(f"sigma={sigma}: mean, rms, literal or a number")
    return sigma, ROUNDS if sigma == "literal" else 1, math.sqrt(0.5)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, T = case["H"], case["T"]
    generator = torch.Generator().manual_seed(seed)
    k, v = (random((H, T, size), dtype, generator) for size in (case["D"], case.get("Dv", case["D"])))
    mass = torch.rand(H, T, generator=generator).mul(8).floor() + torch.arange(T) // 100  # ties, the largest late
    lens = torch.tensor([T] * H if (given := case.get("lens")) is None else given)
    real = torch.arange(T) < lens[:, None]
    for part in (k, v, mass):
        part[~real] = math.nan
    order = torch.rand(H, T, generator=generator).masked_fill(~real, 2.0)
    order[:, :1] -= 2.0  # a head's first entry starts a run
    start = order.argsort(1).argsort(1) < torch.tensor(_runs(case))[:, None]
    return k, v, mass, start, case.get("sigma", "mean"), None if given is None else real


def _runs(case: Mapping[str, Any]) -> list[int]:
    return [min(n, max(1, round(n * case["share"]))) for n in case.get("lens", [case["T"]] * case["H"])]


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, T, runs = case["H"], case["T"], sum(_runs(case))
    row = (case["D"] + case.get("Dv", case["D"])) * itemsize
    per_entry = row + 4 + 1 + ("lens" in case)  # key and value, mass, start, real
    return H * T * per_entry + runs * (row + 16) + 8 * H, 8 * H * T * case["D"]


merge_runs = Op(
    name="merge_runs",
    ref=merge_runs_ref,
    cpu=merge_runs_flat,
    fused=merge_runs_fused if triton else merge_runs_flat,
    inputs=_inputs,
    usual={"H": 8, "T": 32768, "D": 128, "share": 0.35},
    variants=({}, {"sigma": "literal"}),
    cost=_cost,
    cases=(
        {"H": 1, "T": 1, "D": 8, "Dv": 8, "share": 1.0},
        {"H": 3, "T": 2, "D": 16, "Dv": 8, "share": 0.0, "sigma": "rms"},
        {"H": 4, "T": 65, "D": 63, "Dv": 64, "share": 0.35, "lens": (65, 9, 0, 1)},
        {"H": 2, "T": 129, "D": 80, "Dv": 16, "share": 0.0, "sigma": 5.0},
        {"H": 2, "T": 63, "D": 20, "Dv": 96, "share": 0.9},
        {"H": 1, "T": 9, "D": 16, "Dv": 16, "share": 0.5, "sigma": "literal"},
        {"H": 1, "T": 2003, "D": 16, "Dv": 8, "share": 0.002},
    ),
)
