"""GUI-KV: salient tokens of the newest frame, and what earlier frames hold that it does not."""

from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor

from ..kernels.rope import rotate
from ..options import AtLeast1, Odd, Positive
from ..registry import Ask, Scored, Source, score
from ..rotations import need_freq
from ..snapshot import LayerKV, Stats
from ..window import before_window, last_queries, received, smooth

SOURCE = Source("arXiv:2510.00536", 2025, question=True, checked="worked examples")
CHUNK = 128  # tokens of a frame where the snapshot has no segments
EARLIER, CURRENT = 1, 2
REDUNDANT = -1.0  # ranks behind every other score, but is no padding


@score(needs=("q_last", "resid_norm", "attn_in_norm"), source=SOURCE, by_budget=True)
def guikv(
    kv: LayerKV,
    stats: Stats,
    ask: Ask,
    *,
    window: AtLeast1 = 8,
    kernel: Odd = 5,
    alpha: Positive = 2.0,
    temperature: Positive = 3.5,
    norm: Literal["resid", "attn_in"] = "resid",
    rank: AtLeast1 = 32,
    basis: Literal["svd", "first"] = "svd",
    keys: Literal["rotated", "pre"] = "rotated",
) -> Scored:
    """Window attention, more for tokens of large norm in the last frame, nothing for earlier frames that repeat it.

    A frame is a segment of the kind of the last one before the window. An earlier one repeats it where its keys lie in
    the `rank` (at most a quarter of the channels) main directions of the last one's, or of its first tokens' keys.
    `alpha` is added to the last frame in all, by `norm` of the hidden states, more evenly for a high `temperature`.
    """
    before = before_window(kv, stats, window)
    found, note = frames(ask, min(int(last_queries(stats, window)[1][0]), ask.N))
    norms = stats.attn_in_norm if norm == "attn_in" else stats.resid_norm
    if norms is None:
        raise ValueError("resid_norm and attn_in_norm are missing: name them in needs=")
    salient, kind = torch.zeros_like(norms), torch.zeros_like(norms, dtype=torch.int8)  # [N]
    for begin, end in found[:-1]:
        kind[begin:end] = EARLIER
    for begin, end in found[-1:]:
        kind[begin:end] = CURRENT
        salient[begin:end] = saliency(norms[begin:end], temperature)
    total = smooth(received(kv, stats, ask, window) * before, kernel, "avg") * before + alpha * kv.by_entry(salient)
    least = min(rank, max(1, kv.k.shape[2] // 4))
    drop = _redundant(kv, kv.by_entry(kind) * kv.real, ask.B, least, basis, ask.freq if keys == "pre" else None)
    return Scored(total.masked_fill(drop, REDUNDANT), note=note)


@guikv.check
def check(ask: Ask, *, keys: str, **_: Any) -> None:
    if keys == "pre":
        need_freq(ask, "keys=pre", "keys=rotated")


def frames(ask: Ask, end: int) -> tuple[list[tuple[int, int]], str]:
    """Begin and end of the frames before `end`, the current one last; and a note where they are of our making."""
    whole = [] if ask.segments is None else [row for row in ask.segments.tolist() if row[0] < row[1] <= end]
    if not whole:
        cuts = [*range(end, 0, -CHUNK), 0][::-1]
        return list(pairwise(cuts)), f"no segment ends before the window: every {CHUNK} tokens are taken for a frame"
    first, last, kind, _ = max(whole, key=lambda row: (row[1], row[0]))
    return [(row[0], row[1]) for row in whole if row[2] == kind and row[1] <= first] + [(first, last)], ""


def saliency(norm: Tensor, temperature: float) -> Tensor:  # [F] -> [F], adds up to 1
    """How much a token stands out by its norm; the same for all where norms differ by no more than rounding."""
    spread, mean = norm.std(correction=min(1, len(norm) - 1)), norm.mean()
    z = (norm - mean) / (spread + 1e-8)
    return torch.where(spread < 1e-4 * mean, 1 / len(norm), (z / temperature).softmax(0))


def subspace(keys: Tensor, rank: int, basis: str) -> Tensor:  # [F, D] -> [D, r] orthonormal
    """The `rank` main directions of the keys, or the span of the first `rank` of them."""
    wide = keys.double()
    if basis == "first":
        axes: Tensor = torch.linalg.qr(wide[:rank].mT).Q
    else:
        axes = torch.linalg.eigh(wide.mT @ wide).eigenvectors[:, -min(rank, len(keys)) :]
    return axes.float()


def outside(keys: Tensor, space: Tensor) -> Tensor:  # [P, D], [D, r] -> [P]
    """The length of what of each key lies outside the subspace."""
    return (keys - keys @ space @ space.mT).square().sum(1).sqrt()


def _redundant(
    kv: LayerKV, kind: Tensor, B: int, rank: int, basis: str, freq: Tensor | None
) -> Tensor:  # [H, T] -> [H, T] bool
    """The entries of earlier frames that lie least outside the current one: as large a part as B drops of the head."""
    drop = torch.zeros_like(kv.real)
    for h, held in enumerate(kv.lens.tolist()):
        now, past = (kind[h] == CURRENT).nonzero()[:, 0], (kind[h] == EARLIER).nonzero()[:, 0]
        n = max(held - B, 0) * len(past) // held
        if n == 0 or len(now) == 0:
            continue
        k = kv.k[h].float() if freq is None else rotate(kv.k[h], kv.pos[h], freq, back=True)
        far = outside(k[past], subspace(k[now], rank, basis))
        drop[h, past[far.argsort(stable=True)[:n]]] = True
    return drop
