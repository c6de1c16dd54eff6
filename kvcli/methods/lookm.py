"""LOOK-M: the heavy hitters and the newest tokens stay, and each other goes into the one whose key is most like it."""

from typing import Literal

import torch
from torch import Tensor

from ..options import Share
from ..receivers import alike, average, fold, receive
from ..registry import Ask, Scored, Source, reduce, score
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2406.18139", 2024, question=True, checked="worked examples")


@score(name="lookm", needs=("attn_mass",), source=SOURCE, by_budget=True)
def lookm_score(kv: LayerKV, stats: Stats, ask: Ask, *, heavy: Share = 0.5) -> Scored:
    """The newest tokens and, `heavy` of the budget, the most attended before. A text has no images to put last."""
    recent = min(ask.B - int(heavy * ask.B), ask.B - ask.sink)
    return Scored(stats.mass_of(kv).masked_fill(kv.pos >= ask.N - recent, torch.inf))


@reduce(source=SOURCE, adds=lambda **_: ("span",))
def lookm(
    kv: LayerKV,
    stats: Stats,
    scored: Scored,
    count: Tensor,
    ask: Ask,
    *,
    merge: Literal["pivotal", "averaged", "weighted"] = "pivotal",
) -> tuple[LayerKV, Tensor]:
    """What goes is averaged into the most similar entry that stays, in halves (pivotal), whole, or by its cosine.

    `weighted` takes up only what is no less alike than the mean of its head, and does not make up for weights below 1.
    All that goes is compared with all that stays: the time grows with the square of the length.
    """
    to, cosine = receive(kv, scored, count)
    if merge == "weighted":
        to = alike(to, cosine, "head")
        return fold(kv, to, cosine, torch.ones_like(to.size), 1 + to.size), to.kept
    return average(kv, to, 0.5 if merge == "pivotal" else 1.0), to.kept
