"""CompressKV: only the heads that find answers vote, and layers share the entries by errors measured beforehand."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..kernels.window import window_scores
from ..options import AtLeast1, Odd, Positive
from ..profiles import numbers
from ..registry import Ask, Scored, Source, allocate, score
from ..shares import by_layer
from ..snapshot import LayerKV, Stats
from ..window import last_queries, smooth

SOURCE = Source("arXiv:2508.02401", 2025, question=True, checked="worked examples")


@score(needs=("q_last",), source=SOURCE, profile="answers")
def compresskv_score(
    kv: LayerKV, stats: Stats, ask: Ask, *, window: AtLeast1 = 8, kernel: Odd = 5, heads: AtLeast1 = 4
) -> Scored:
    """What the layer's `heads` best retrieval heads attend to from the last `window` queries: one score for all heads.

    It is summed over the window, averaged over `kernel` neighbours; the window itself scores 0. A profile says which
    heads these are: `kvcli calibrate --for compresskv` makes it, once for a model.
    """
    q, q_pos = last_queries(stats, window)
    profile = ask.profiles["compresskv"]
    found = torch.tensor(numbers(profile, "heads", [ask.layer], len(q))[0])
    best = found.argsort(descending=True, stable=True)[:heads].tolist()
    before = torch.arange(ask.N, device=kv.pos.device) < q_pos[0]
    vote = smooth(votes(kv, stats, ask, best, window) * before, kernel, "avg") * before
    return Scored(kv.by_entry(vote), weight=torch.tensor(numbers(profile, "errors", [ask.layer])))


def votes(kv: LayerKV, stats: Stats, ask: Ask, best: Sequence[int], window: int) -> Tensor:  # -> [N] float32
    """What each token of the document receives from the last queries of these heads, mean over the heads.

    Only the KV heads that own one of them are read.
    """
    q, q_pos = last_queries(stats, window)
    total, G = torch.zeros(ask.N, device=kv.pos.device), len(q) // len(kv.k)
    for h in dict.fromkeys(j // G for j in best):
        mine, one = [j for j in best if j // G == h], slice(h, h + 1)
        bias = None if kv.bias is None else kv.bias[one]
        sinks = None if stats.sink_logit is None else stats.sink_logit[mine]
        row = window_scores(q[mine], q_pos, kv.k[one], kv.pos[one], bias, ask.scale, ask.softcap, sinks)[0]
        real = kv.real[h]
        total[kv.pos[h, real].long()] += row[real] * len(mine)
    return total / len(best)


@allocate(source=SOURCE, after="compresskv")
def compresskv_share(
    scored: Sequence[Scored], n: int, ask: Ask, *, least: AtLeast1 = 32, most: Positive = 3.0
) -> list[Tensor]:
    """Layers share the entries by their errors in the profile: `least` entries a head, at most `most` even shares."""
    error = torch.cat([part.weight for part in scored if part.weight is not None]).double().cpu()
    must = torch.stack([part.low.amax() for part in scored]).cpu()
    held = torch.stack([part.high.amin() for part in scored]).cpu()
    low = must.clamp(min=min(least, ask.B)).minimum(held)
    high = held.clamp(max=max(ask.B, int(min(most * ask.B, ask.N)))).maximum(low)
    return by_layer(swept(error, ask.B * len(scored), low, high), scored, n)


def swept(error: Tensor, total: int, low: Tensor, high: Tensor) -> Tensor:  # [L] float64, [L], [L] int64 -> [L] int64
    """Entries of each layer: `low` and a share of the rest by error, clamped, until they add up to `total`.

    What the bounds take or free goes around, one entry a layer at a time: it is given from the largest error down, and
    taken from the smallest up. Where no layer has room the sum stays what it is.
    """
    share = error / error.sum() if float(error.sum()) > 0 else torch.full_like(error, 1 / len(error))
    count = (low + (share * (total - int(low.sum()))).round()).long().clamp(low, high)
    while missing := total - int(count.sum()):
        room = high - count if missing > 0 else count - low
        order = share.argsort(descending=missing > 0, stable=True)
        order = order[room[order] > 0][: abs(missing)]
        if not len(order):
            break
        rounds = max(1, min(int(room[order].min()), abs(missing) // len(order)))
        count[order] += rounds if missing > 0 else -rounds
    return count
