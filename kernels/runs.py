"""Merge each run of neighbouring entries into one, by Gaussian weights around its most attended member.

k [H, T, D], v [H, T, Dv], mass [H, T], start [H, T] -> flat rows k' [E, D], v' [E, Dv], head after head, with
lens [H], pivot [E], size [E] int64. KVMerger, arXiv:2407.08454; the count factor on values is the caller's.
"""

import math
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from .op import Op, random

BLOCK = 4096  # rows merged at once: their float32 copy stays in the cache
ROUNDS = 64  # of the fixed point of sigma="literal"

Merged = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # k' [E, D], v' [E, Dv], lens [H], pivot [E], size [E]


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
            weight = _weights(dist, n, norm, sigma) if j - i > 1 else None
            rows_k.append(k[h, i] if weight is None else (weight @ keys).to(k.dtype))
            rows_v.append(v[h, i] if weight is None else (weight @ values).to(v.dtype))
            pivot.append(i + p)
            size.append(j - i)
    if not size:
        return k[0, :0].clone(), v[0, :0].clone(), lens, lens[:0], lens[:0]
    return torch.stack(rows_k), torch.stack(rows_v), lens, lens.new_tensor(pivot), lens.new_tensor(size)


def merge_runs_flat(
    k: Tensor, v: Tensor, mass: Tensor, start: Tensor, sigma: str | float = "mean", real: Tensor | None = None
) -> Merged:
    """The same on flat rows, blocks of whole runs at a time; plain torch, for every device."""
    flat_k, flat_v, flat_mass = k.flatten(0, 1), v.flatten(0, 1), mass.flatten()
    first, size, lens = bounds(start, real)
    rows_k, rows_v, pivot = flat_k.index_select(0, first), flat_v.index_select(0, first), first.clone()
    for runs in _blocks(size):
        n = size[runs]
        offset = n.cumsum(0) - n
        run = torch.repeat_interleave(n)  # [R], which of the block's runs a row belongs to
        row = (first[runs] - offset)[run] + torch.arange(len(run), device=k.device)
        peak = _peaks(flat_mass[row], run, len(n))
        pivot[runs] = row[peak]
        keys, values = flat_k.index_select(0, row).float(), flat_v.index_select(0, row).float()
        dist = torch.linalg.vector_norm(keys.index_select(0, peak[run]).sub_(keys), dim=-1)
        weight = _weights(dist, n, torch.linalg.vector_norm(keys[peak], dim=-1), sigma)
        rows_k.index_copy_(0, runs, _sums(keys, offset, weight).to(k.dtype))
        rows_v.index_copy_(0, runs, _sums(values, offset, weight).to(v.dtype))
    return rows_k, rows_v, lens, pivot % start.shape[1], size


def bounds(start: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # [H, T] bool, [H, T] bool
    """The flat index of the first entry [E] and the length [E] of each run, runs a head [H]."""
    H, T = start.shape
    begin = torch.arange(H, device=start.device) * T
    stop = begin + (T if real is None else real.sum(1))
    start = start if real is None else start & real
    first = start.flatten().nonzero().flatten()
    follows = torch.cat([first[1:], first.new_tensor([H * T])])
    return first, torch.minimum(follows, stop[first // max(T, 1)]) - first, start.sum(1)


def _blocks(size: Tensor) -> Iterator[Tensor]:
    # the runs of several entries, in groups of about BLOCK entries
    several = (size > 1).nonzero().flatten()
    if len(several):
        group = (size[several].cumsum(0) - 1) // BLOCK
        yield from torch.split(several, torch.unique_consecutive(group, return_counts=True)[1].tolist())


def _peaks(mass: Tensor, run: Tensor, n: int) -> Tensor:  # [R], [R] -> [n] row of the largest mass, the first of equals
    top = mass.new_full((n,), -math.inf).scatter_reduce_(0, run, mass, "amax")
    row = torch.where(mass == top[run], torch.arange(len(run), device=run.device), len(run))
    return run.new_full((n,), len(run)).scatter_reduce_(0, run, row, "amin")


def _weights(dist: Tensor, n: Tensor, norm: Tensor, sigma: str | float) -> Tensor:  # [R], [runs], [runs] -> [R]
    def total(x: Tensor) -> Tensor:
        return torch.segment_reduce(x, "sum", lengths=n)

    def near(width: Tensor) -> Tensor:
        # width 0: all members lie on the pivot
        width = width.repeat_interleave(n)
        return torch.where(width > 0, (-0.5 * (dist / width).square()).exp(), 1.0)

    if sigma == "mean":
        width = torch.maximum(total(dist) / (n - 1), 1e-6 * norm)
    elif sigma == "rms":
        width = (total(dist.square()) / (n - 1)).sqrt()
    elif sigma == "literal":
        width = torch.full_like(norm, math.sqrt(0.5))
        for _ in range(ROUNDS):
            width = total(near(width)) / (math.sqrt(2) * n)
    elif isinstance(sigma, str):
        raise ValueError(f"sigma={sigma}: mean, rms, literal or a number")
    else:
        width = torch.full_like(norm, sigma)
    kernel = near(width)
    return kernel / total(kernel).repeat_interleave(n)


def _sums(rows: Tensor, offset: Tensor, weight: Tensor) -> Tensor:  # [R, D], [runs], [R] -> [runs, D]
    index = torch.arange(len(rows), device=rows.device)
    return embedding_bag(index, rows, offset, mode="sum", per_sample_weights=weight)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, T = case["H"], case["T"]
    generator = torch.Generator().manual_seed(seed)
    k, v = random((H, T, case["D"]), dtype, generator), random((H, T, case["Dv"]), dtype, generator)
    mass = torch.rand(H, T, generator=generator).mul(8).floor()  # with ties
    start = torch.rand(H, T, generator=generator) < case["share"]
    start[:, :1] = True
    return k, v, mass, start


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, T, row = case["H"], case["T"], (case["D"] + case["Dv"]) * itemsize
    runs = round(H * T * case["share"])  # expected
    return H * T * (row + 5) + runs * (row + 16) + 8 * H, 8 * H * T * case["D"]


merge_runs = Op(
    name="merge_runs",
    ref=merge_runs_ref,
    cpu=merge_runs_flat,
    fused=merge_runs_flat,
    inputs=_inputs,
    usual={"H": 8, "T": 32768, "D": 128, "Dv": 128, "share": 0.35},
    cost=_cost,
    cases=(
        {"H": 1, "T": 1, "D": 8, "Dv": 8, "share": 1.0},
        {"H": 3, "T": 2, "D": 16, "Dv": 8, "share": 0.0},
        {"H": 2, "T": 65, "D": 63, "Dv": 64, "share": 0.35},
        {"H": 2, "T": 129, "D": 64, "Dv": 16, "share": 0.0},
        {"H": 3, "T": 517, "D": 16, "Dv": 16, "share": 0.8},
    ),
)
