"""Attention matching: what stays gets the mass and the values with which saved queries see about what they saw."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Annotated, Literal

import torch
from torch import Tensor

from ..errors import InfeasibleError
from ..fitting import RHOS, Sight, match
from ..kernels.banded import capped
from ..options import Limit, Positive
from ..probes import turned_queries
from ..registry import Ask, Scored, Source, reduce
from ..snapshot import LayerKV, Stats, gather, mask_index, top_mask

SOURCE = Source("arXiv:2602.16284", 2026, checked="worked examples")
FOLD = 4  # every fourth query is held out

Clip = Annotated[float, Limit(lambda x: 0 < x <= 20, "a number above 0, at most 20")]
Queries = Literal["auto", "repeat", "context"]


@reduce(needs=("q_last",), source=SOURCE, adds=lambda **_: ("bias",))
def matching(
    kv: LayerKV,
    stats: Stats,
    scored: Scored,
    count: Tensor,
    ask: Ask,
    *,
    queries: Queries = "auto",
    rho: Positive | Literal["auto"] = "auto",
    clip: Clip = 3.0,
) -> tuple[LayerKV, Tensor]:
    """Keep the highest scores of each head; fit their log-mass and values to queries, where that helps those held out.

    The queries are those of a repetition of the document (repeat: `prefill --collect kvzip`) or, auto and where there
    are none, those of the document itself, turned as if they stood behind it (context). `rho` is how strongly the fit
    is drawn to mass and values as they are, `clip` the most log-mass that is added or taken.
    """
    index = mask_index(top_mask(scored.score, count) & kv.real)
    small, lens = gather(kv, index), kv.lens.tolist()
    bias = torch.zeros(small.pos.shape, device=index.device) if small.bias is None else small.bias
    q, q_pos = _queries(stats, ask, queries)
    held = (torch.arange(len(q_pos), device=q.device) % FOLD == 1).repeat(len(q) // len(lens))
    for h, (logit, sink) in enumerate(_logits(kv, lens, q, q_pos, stats.sink_logit, ask)):
        kept = index[h][index[h] >= 0]
        if (n := len(kept)) < lens[h]:
            sight = Sight.of(logit, kv.v[h, : lens[h]], kept, sink)
            beta, small.v[h, :n] = match(sight, held, small.v[h, :n], RHOS if rho == "auto" else [rho], clip)
            bias[h, :n] += beta
    return replace(small, bias=bias), index


def _queries(stats: Stats, ask: Ask, queries: Queries) -> tuple[Tensor, Tensor]:  # -> [Hq, R, D] float32, [R]
    if queries != "context" and stats.q_repeat is not None and stats.q_repeat_pos is not None:
        return stats.q_repeat.float(), stats.q_repeat_pos
    if queries == "repeat":
        what = "matching:queries=repeat needs q_repeat, which this snapshot does not have"
        raise InfeasibleError(what, fix="kvcli score SNAPSHOT --collect kvzip adds it; or leave queries=repeat out")
    return turned_queries(stats, ask)


def _logits(
    kv: LayerKV, lens: list[int], q: Tensor, q_pos: Tensor, sink_logit: Tensor | None, ask: Ask
) -> Iterator[tuple[Tensor, Tensor]]:  # -> H x [n, T], [n] float32
    """The logits of all queries of each group, -inf for what they do not see, and those that no entry receives."""
    none = torch.full(q.shape[:1], -torch.inf, device=q.device)
    sinks = none if sink_logit is None else sink_logit.float()
    groups = torch.unflatten(q, 0, (len(lens), -1)), sinks.view(len(lens), -1)
    for h, (rows, sink) in enumerate(zip(*groups, strict=True)):
        logit = capped(rows @ kv.k[h, : lens[h]].float().mT * ask.scale, ask.softcap)  # [G, R, T]
        logit = logit if kv.bias is None else logit + kv.bias[h, : lens[h]]
        logit = logit.masked_fill(kv.pos[h, : lens[h]] > q_pos[:, None], -torch.inf)
        yield logit.flatten(0, 1), sink.repeat_interleave(len(q_pos))
