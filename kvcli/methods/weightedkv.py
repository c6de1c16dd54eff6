"""WeightedKV: keys are dropped, and their values go into the value that follows, by the attention of both."""

from typing import Literal

import torch
from torch import Tensor

from ..receivers import Receivers, fold, split
from ..registry import Ask, Scored, Source, reduce, score
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2503.01330", 2025, checked="worked examples")


@score(name="weightedkv", needs=("attn_mass",), source=SOURCE)
def weightedkv_score(kv: LayerKV, stats: Stats, ask: Ask) -> Scored:
    """Attention an entry has received from each query that saw it."""
    return Scored(_mean_attention(kv, stats, ask))


@reduce(needs=("attn_mass",), source=SOURCE, adds=lambda **_: ("span",))
def weightedkv(
    kv: LayerKV, stats: Stats, scored: Scored, count: Tensor, ask: Ask, *, mode: Literal["run", "sequential"] = "run"
) -> tuple[LayerKV, Tensor]:
    """Values of what goes join the next value that stays, by mean attention; keys stay as they are.

    sequential: as the paper does while it reads, from the lowest score on, each into the value that is then next, in
    plain Python. What has no follower is lost.
    """
    kept, gone = split(kv, scored, count)
    last = kv.pos.shape[1]
    follower = torch.searchsorted(kept.masked_fill(kept < 0, last), gone.masked_fill(gone < 0, last))
    to = Receivers(kept, gone, follower.masked_fill(follower >= (kept >= 0).sum(1, keepdim=True), -1))
    received = _mean_attention(kv, stats, ask)
    if mode == "sequential":
        heads = zip(received, scored.score, gone, kv.lens.tolist(), strict=True)
        received = torch.tensor([_chained(*head) for head in heads], device=gone.device)
    weight, own = (received.gather(1, index.clamp(min=0)) for index in (gone, kept))
    total = own + to.total(weight)
    even = total <= 0  # nothing was attended: all alike
    weight = torch.where(even.gather(1, to.at.clamp(min=0)), 1.0, weight)
    return fold(kv, to, weight, own.masked_fill(even, 1.0), torch.where(even, 1 + to.size, total), keys=False), kept


def _chained(received: Tensor, score: Tensor, gone: Tensor, end: int) -> list[float]:  # [T], [T], [M] -> [T]
    """What share each of the first `end` entries has in the value it ends up in, where they go by ascending score."""
    attended, gone = received.tolist(), gone[gone >= 0]
    after, before, links = [*range(1, end + 1)], [*range(-1, end)], list[tuple[int, int]]()
    for e in gone[score[gone].argsort(stable=True)].tolist():
        left, right = before[e], after[e]
        links.append((e, right))
        before[right] = left
        if left >= 0:
            after[left] = right
    share = [1.0] * len(attended)
    for e, right in reversed(links):  # what a value became is known first
        both = attended[e] + attended[right] if right < end else 0.0
        part = attended[e] / both if both > 0 else 0.5
        share[e] = part * share[right] if right < end else 0.0
        if right < end:
            share[right] *= 1 - part
    return share


def _mean_attention(kv: LayerKV, stats: Stats, ask: Ask) -> Tensor:  # -> [H, T] float32
    return stats.mass_of(kv) / (ask.N - kv.pos)
