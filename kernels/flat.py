"""Runs of entries on flat rows: where they lie, what their members weigh, and their merging in plain torch."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

BLOCK = 4096  # rows merged at once: their float32 copy stays in the cache
ROUNDS = 64  # of the fixed point of sigma="literal"

Merged = tuple[Tensor, Tensor, Tensor, Tensor, Tensor]  # k' [E, D], v' [E, Dv], lens [H], pivot [E], size [E]


def bounds(start: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:  # [H, T] bool, [H, T] bool
    """The flat index of the first entry [E] and the length [E] of each run, runs a head [H]."""
    H, T = start.shape
    begin = torch.arange(H, device=start.device) * T
    stop = begin + (T if real is None else real.sum(1))
    start = start if real is None else start & real
    first = start.flatten().nonzero().flatten()
    follows = torch.cat([first[1:], first.new_tensor([H * T])])
    return first, torch.minimum(follows, stop[first // max(T, 1)]) - first, start.sum(1)


def weights(dist: Tensor, n: Tensor, norm: Tensor, sigma: str | float) -> Tensor:  # [R], [runs], [runs] -> [R]
    """The shares of a run's n members, by their distance to its pivot, whose norm bounds the width from below."""

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


def merge_runs_flat(
    k: Tensor, v: Tensor, mass: Tensor, start: Tensor, sigma: str | float = "mean", real: Tensor | None = None
) -> Merged:
    """What `merge_runs_ref` gives, from blocks of whole runs at a time; plain torch, for every device."""
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
        pivots = keys.index_select(0, peak)
        dist = torch.linalg.vector_norm(pivots.index_select(0, run).sub_(keys), dim=-1)
        weight = weights(dist, n, torch.linalg.vector_norm(pivots, dim=-1), sigma)
        rows_k.index_copy_(0, runs, _sums(keys, offset, weight).to(k.dtype))
        rows_v.index_copy_(0, runs, _sums(values, offset, weight).to(v.dtype))
    return rows_k, rows_v, lens, pivot % start.shape[1], size


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


def _sums(rows: Tensor, offset: Tensor, weight: Tensor) -> Tensor:  # [R, D], [runs], [R] -> [runs, D]
    index = torch.arange(len(rows), device=rows.device)
    return embedding_bag(index, rows, offset, mode="sum", per_sample_weights=weight)
