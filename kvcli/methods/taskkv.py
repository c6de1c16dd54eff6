"""Task-KV: heads whose summary of the text is unlike the others' keep all of it."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from ..budget import share_out
from ..options import AtLeast0, AtLeast1, Odd, Share
from ..registry import Ask, Scored, Source, allocate, score
from ..snapshot import LayerKV, Stats, mask_index, top_mask
from ..window import last_queries, received, smooth

SOURCE = Source("arXiv:2501.15113", 2025, question=True, checked="worked examples")
Center = Literal["inside", "extra", "off"]


@score(needs=("q_last",), source=SOURCE, by_budget=True)
def taskkv_score(
    kv: LayerKV,
    stats: Stats,
    ask: Ask,
    *,
    beta: Share | None = None,
    m: AtLeast0 | None = None,
    center: Center = "inside",
    first: AtLeast0 = 16,
    last: AtLeast0 = 256,
    top: AtLeast1 = 256,
    window: AtLeast1 = 32,
    kernel: Odd = 7,
) -> Scored:
    """Attention of the last `window` queries, the `first` and `last` tokens kept; some heads, unlike others, keep all.

    Heads are told apart by the values of their `top` entries. `beta` of the heads are whole in the first layer, `m` in
    the last; none says by the number of heads. `center` counts the most usual head among the whole ones, or beside.
    """
    seen = received(kv, stats, ask, window) / len(last_queries(stats, window)[1])  # [H, T]
    planned = whole_heads(len(seen), ask.place, ask.L, beta, m)
    ends = max(first, ask.sink), max(last, ask.recent)
    full, note = choose(distance(kv, seen, top), kv.lens, planned, center, sum(ends), ask.B)
    if not bool(full.any()) and min(sum(ends), int(kv.lens.max())) > ask.B:
        ends = shrunk(*ends, ask, window)
        note += f"{'; ' * bool(note)}the first {ends[0]} and last {ends[1]} tokens fill the budget"
    kept = (kv.pos < ends[0]) | (kv.pos >= ask.N - ends[1])
    return Scored(smooth(seen, kernel, "avg").masked_fill(kept, torch.inf), weight=full, note=note)


@allocate(source=SOURCE, after="taskkv")
def taskkv(scored: Sequence[Scored], n: int, ask: Ask) -> list[Tensor]:
    """Some heads keep all they hold, the others of the layer share the rest evenly."""
    high = torch.stack([part.high for part in scored]).cpu()  # [L, H]
    full = torch.stack([part.weight for part in scored if part.weight is not None]).cpu()
    low = torch.where(full, high, torch.stack([part.low for part in scored]).cpu())
    even = torch.full((len(high),), n / len(high), dtype=torch.float64)
    totals = share_out(even, n, low.sum(1), high.sum(1))
    left = totals - (high * full).sum(1)
    want = torch.where(full, high, (left / (~full).sum(1).clamp(min=1))[:, None])
    return [share_out(*part) for part in zip(want, totals.tolist(), low, high, strict=True)]


def whole_heads(H: int, place: int, L: int, beta: float | None = None, m: int | None = None) -> int:
    """How many of H heads are to be whole in a layer: on a line from H beta in the first to m in the last."""
    start = H * ((0.25 if H >= 16 else 0.3) if beta is None else beta)
    stop = max(1, round(H / 8)) if m is None else m
    share = start - (start - stop) * place / max(L - 1, 1)
    return min(math.floor(share + 0.5 + 1e-9), H)  # what is a half but for rounding is a half


def pick(far: Tensor, count: int, center: Center) -> Tensor:  # [H] -> [H] bool
    """The `count` farthest heads; the one nearest to the centre is the last of them, or one more."""
    inside = center == "inside" and count >= 2
    order = far.argsort(descending=True, stable=True)
    full = torch.zeros_like(far, dtype=torch.bool)
    full[order[: count - inside]] = True
    if inside or (center == "extra" and count >= 1):
        full[far.masked_fill(full, torch.inf).argsort(stable=True)[0]] = True
    return full


def choose(
    far: Tensor, lens: Tensor, planned: int, center: Center, ends: int, B: int
) -> tuple[Tensor, str]:  # [H], [H] -> [H] bool
    """The whole heads, fewer than planned where the others would not keep their ends; and what to say of it."""
    if planned and len(far) <= 2 and int(lens.max()) > B:
        return torch.zeros_like(far, dtype=torch.bool), "no head is whole: one or two are equally far from their centre"
    for count in range(planned, -1, -1):
        full = pick(far, count, center)
        if count == 0 or int(torch.where(full, lens, lens.clamp(max=ends)).sum()) <= B * len(far):
            break
    return full, f"whole heads: {planned} planned, {count} fit" if count < planned else ""


def shrunk(first: int, last: int, ask: Ask, window: int) -> tuple[int, int]:
    """The first and last tokens that fit B: the last are fewer, down to the window, and then the first."""
    last = max(ask.B - first, min(last, window), ask.recent)
    first = min(first, max(ask.B - last, ask.sink))
    return first, min(last, ask.B - first)


def distance(kv: LayerKV, seen: Tensor, top: int) -> Tensor:  # [H, T] -> [H]
    """How far the mean value of a head, by its `top` weights, lies from the mean of all heads."""
    best = top_mask(seen.masked_fill(~kv.real, -torch.inf), kv.lens.clamp(max=top))
    index = mask_index(best)  # [H, t]
    at = index.clamp(min=0)
    weight = seen.gather(1, at).masked_fill(index < 0, 0.0)
    values = kv.v.gather(1, at[..., None].expand(-1, -1, kv.v.shape[2])).float()
    mean = (weight[..., None] * values).sum(1)  # [H, Dv]
    return (mean - mean.mean(0)).square().sum(1).sqrt()
