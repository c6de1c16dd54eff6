"""KVMerger: runs of consecutive tokens with similar keys become one entry each."""

from typing import Literal

import torch
from torch import Tensor

from ..kernels.adjacent import adjacent_cosine
from ..kernels.runs import merge_runs
from ..registry import Ask, Scored, reduce, score
from ..snapshot import LayerKV, Rows, Stats, top_mask

PAPER = "arXiv:2407.08454"


@score(needs=("attn_mass",), paper=PAPER, by_budget=True)
def kvmerger_score(kv: LayerKV, stats: Stats, ask: Ask) -> Scored:
    """How unlike its left neighbour a key is; +inf where a run must start. The best `count` are the starts of runs."""
    cut = torch.full(kv.pos.shape, torch.inf, device=kv.pos.device)
    cut[:, 1:] = -adjacent_cosine(kv.k)
    return Scored(cut.masked_fill(must_start(protected(kv, _mass(kv, stats), ask)), torch.inf))


@reduce(
    needs=("attn_mass",),
    paper=PAPER,
    after="kvmerger",
    adds=lambda values, **_: ("span", "bias") if values == "logcount" else ("span",),
)
def kvmerger(
    kv: LayerKV,
    stats: Stats,
    scored: Scored,
    count: Tensor,
    ask: Ask,
    *,
    values: Literal["mean", "count", "logcount"] = "logcount",
    sigma: Literal["mean", "rms", "literal"] = "mean",
) -> tuple[LayerKV, Tensor]:
    """Merge each run around its most attended token; `values` keeps its weight, `sigma` is the width."""
    start, real = top_mask(scored.score, count) & kv.real, kv.real
    k, v, lens, pivot, size = merge_runs(kv.k, kv.v, _mass(kv, stats), start, sigma, real)
    head = torch.arange(len(lens), device=k.device).repeat_interleave(lens)
    weight = size.float() if kv.bias is None else _sums(kv.bias[real].exp(), size)  # [E] what a run weighs in a softmax
    if values == "count":
        v = (v.float() * size[:, None]).to(v.dtype)
    bias = weight.log() if values == "logcount" else None if kv.bias is None else (weight / size).log()
    span = size if kv.span is None else _sums(kv.span[real].double(), size)
    merged = LayerKV.from_rows(Rows(k, v, kv.pos[head, pivot], lens, bias, span.int()))
    index = torch.full(merged.pos.shape, -1, device=k.device)
    index[merged.real] = pivot
    return merged, index


def protected(kv: LayerKV, mass: Tensor, ask: Ask) -> Tensor:  # [H, T], [H, T] -> [H, T] bool
    """Sinks, newest and heavy tokens; the last two shrink, heavy first, until the runs they force fit the budget."""
    # The paper's shares at 35 % (.08 recent, .02 heavy) and 50 % (.17, .12), a line through both, clamped [spec 6].
    share = ask.B / ask.N
    recent = round(ask.N * min(max(0.08 + 0.60 * (share - 0.35), 0.20 * share), 0.50 * share))
    recent = max(ask.recent, min(recent, ask.B - ask.sink - 1))
    kept = kv.real & ((kv.pos < ask.sink) | (kv.pos >= ask.N - recent))
    rank = mass.masked_fill(kept | ~kv.real, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    low = torch.zeros(len(mass), dtype=torch.int64, device=mass.device)
    high = low + round(ask.N * min(max(0.02 + 0.667 * (share - 0.35), 0.05 * share), 0.30 * share))
    high = torch.minimum(high, (kv.real & ~kept).sum(1))
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        fits = must_start(kept | (rank < middle[:, None])).sum(1) <= ask.B
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return kept | (rank < low[:, None])


def must_start(kept: Tensor) -> Tensor:  # [H, T] bool -> [H, T] bool
    """Where a run has to start: at the first entry, at a protected one and behind it."""
    start = kept.clone()
    start[:, 1:] |= kept[:, :-1]
    start[:, 0] = True
    return start


def _mass(kv: LayerKV, stats: Stats) -> Tensor:  # [H, T]
    if stats.attn_mass is None:
        raise ValueError("kvmerger needs attn_mass")
    return stats.attn_mass.gather(1, kv.pos.clamp(min=0).long())


def _sums(part: Tensor, size: Tensor) -> Tensor:  # [E real entries], [R] -> [R]
    return torch.segment_reduce(part, "sum", lengths=size)
