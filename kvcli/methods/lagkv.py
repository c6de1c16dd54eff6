"""LagKV: tokens whose channels vary most when measured by the range of the tokens behind them."""

import torch
from torch import Tensor

from ..options import AtLeast1
from ..registry import Ask, Scored, Source, score
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2504.04704", 2025, question=False, checked="worked examples")


@score(source=SOURCE, by_budget=True)
def lagkv(kv: LayerKV, stats: Stats, ask: Ask, *, lag: AtLeast1 = 128) -> Scored:
    """How much the channels vary on the scale of the next `lag` entries, as rank inside the lag; the last lag stays.

    The last lag and the entries behind it, which no full lag follows, stay as far as the budget goes, newest first.
    """
    score, note = torch.ones(kv.pos.shape, device=kv.pos.device), ""
    for h, (real, pos) in enumerate(zip(kv.real, kv.pos, strict=True)):
        body = (real & (pos >= ask.sink)).nonzero().flatten()  # [M]
        begin = lag * max(len(body) // lag - 1, 0)
        room = ask.B - int(real.sum()) + len(body)
        if begin:
            k, v = (lag_scores(part[h, body[: begin + lag]], lag) for part in (kv.k, kv.v))
            score[h, body[:begin]] = ranks(k + v).flatten()
        score[h, body[max(begin, len(body) - room) :]] = torch.inf
        if len(body) - begin > room:
            note = f"the budget holds no more than the newest entries: lag={lag} is too long for it"
    return Scored(score, note=note)


def lag_scores(x: Tensor, lag: int) -> Tensor:  # [(P + 1) * lag, C] -> [P, lag] float32
    """Softmax inside each lag of the spread over channels, each measured by its range in the next lag."""
    lags = x.float().view(-1, lag, x.shape[1])
    low, high = lags[1:].amin(1, keepdim=True), lags[1:].amax(1, keepdim=True)
    scaled = (lags[:-1] - low).div_((high - low).clamp(min=1e-6))
    # The population's standard deviation, at a tenth of the time of torch.std.
    spread: Tensor = torch.linalg.vector_norm(scaled - scaled.mean(-1, keepdim=True), dim=-1) / x.shape[1] ** 0.5
    return spread.softmax(-1)


def ranks(score: Tensor) -> Tensor:  # [P, lag] -> [P, lag] in [0, 1)
    """How large a part of its lag each entry beats; of equal ones the earlier wins."""
    worse = score.shape[1] - 1 - score.argsort(dim=1, descending=True, stable=True).argsort(1)
    return worse / score.shape[1]
