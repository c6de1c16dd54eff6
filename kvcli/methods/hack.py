"""HACK: heads that look at the same tokens whatever is asked keep few entries, heads that follow the text keep many."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..budget import share_out
from ..kernels.nearest import nearest_key
from ..kernels.window import window_scores
from ..options import AtLeast1, Positive, Share
from ..profiles import numbers
from ..receivers import Receivers, average
from ..registry import Ask, Scored, Source, allocate, reduce, score
from ..snapshot import LayerKV, Stats, gather, mask_index, top_mask

SOURCE = Source("arXiv:2504.09261", 2025, checked="worked examples")
INITIAL, NEWEST = 4, 32  # tokens that take the place of segments


@score(needs=("q_probe",), source=SOURCE, profile="snapshots", by_budget=True)
def hack_score(
    kv: LayerKV, stats: Stats, ask: Ask, *, alpha: Share = 0.5, ratio: Positive = 5.0, queries: AtLeast1 = 32
) -> Scored:
    """Attention from `queries` spread evenly; structural heads keep the first two segments and the last as they are.

    Of all heads the share `alpha` whose attention varies least between queries is contextual, the rest is structural,
    with `ratio` times the entries. `kvcli calibrate --for hack` measures that variation, once for a model.
    """
    sigma = torch.tensor(numbers(ask.profiles["hack"], "sigma", ask.layers, len(kv.k)))  # [L, H]
    structural, at = classes(sigma, alpha), ask.layers.index(ask.layer)
    _, large = sizes(ask, 1 - float(structural.double().mean()), ratio)
    received = _received(kv, stats, ask, queries)
    first, last, note = ends(ask)
    key = torch.where(kv.pos >= last, received, -torch.inf)
    # Initial tokens come before the newest, and what the pipeline protects before both.
    key = torch.where(kv.pos < first, queries + 1.0 + ask.N - kv.pos, key)
    key = key.masked_fill((kv.pos < ask.sink) | (kv.pos >= ask.N - ask.recent), torch.inf)
    key = key.masked_fill(~kv.real | ~structural[at, :, None].to(key.device), -torch.inf)
    wanted = (key > -torch.inf).sum(1)
    fixed = top_mask(key, wanted.clamp(max=int(large)))
    if bool((wanted > int(large)).any()):
        note = "; ".join(filter(None, (note, "structural heads have no room for all of the first and last segments")))
    return Scored(received.masked_fill(fixed, torch.inf), torch.stack([structural[at].float(), sigma[at]]), note=note)


def classes(sigma: Tensor, alpha: float) -> Tensor:  # [L, H] -> [L, H] bool
    """Which heads are structural: all but the share `alpha` that varies least, ties by layer and head."""
    order = sigma.flatten().argsort(stable=True)
    structural = torch.ones(len(order), dtype=torch.bool)
    structural[order[: round(alpha * len(order))]] = False
    return structural.view_as(sigma)


def sizes(ask: Ask, share: float, ratio: float) -> tuple[float, float]:
    """Entries of a contextual and of a structural head, where this share of the heads is contextual.

    The first hold what is protected at least, the second no more than there is; both make up for it.
    """
    if not 0 < share < 1:
        return ask.B, ask.B
    small = max(ask.B / (share + ratio * (1 - share)), ask.sink + ask.recent, 1)
    large = min((ask.B - share * small) / (1 - share), ask.N)
    return (ask.B - (1 - share) * large) / share, large


def ends(ask: Ask) -> tuple[int, int, str]:
    """Where the first two segments end and where the last begins, and what to say if there are none."""
    if ask.segments is not None and len(ask.segments) > 2:
        begin, end = ask.segments[ask.segments[:, 0].argsort(stable=True), :2].T.tolist()
        return end[1], begin[-1], ""
    few = "no segments are known" if ask.segments is None else "there are fewer than three segments"
    return INITIAL, ask.N - NEWEST, f"{few}: the first {INITIAL} and the last {NEWEST} tokens take their place"


def _received(kv: LayerKV, stats: Stats, ask: Ask, queries: int) -> Tensor:  # -> [H, T] float32
    if stats.q_probe is None or stats.q_probe_pos is None:
        raise ValueError("q_probe is missing: name it in needs=")
    saved = stats.q_probe.shape[1]
    some = torch.linspace(0, saved - 1, min(queries, saved)).round().long().to(kv.pos.device)
    q, q_pos = stats.q_probe[:, some], stats.q_probe_pos[some]
    found: Tensor = window_scores(q, q_pos, kv.k, kv.pos, kv.bias, ask.scale, ask.softcap, stats.sink_logit)
    return found


@allocate(source=SOURCE, after="hack")
def hack_share(scored: Sequence[Scored], n: int, ask: Ask, *, ratio: Positive = 5.0) -> list[Tensor]:
    """A structural head gets `ratio` times the entries of a contextual one, whatever the layer."""
    structural, sigma = torch.cat([part.weight for part in scored if part.weight is not None], 1).cpu()
    small, large = sizes(ask, 1 - float(structural.double().mean()), ratio)
    want = torch.where(structural > 0, int(large), int(small))
    first = sigma.masked_fill(structural == 0, -1.0).argsort(descending=True, stable=True)
    first = first[: int(structural.sum()) or len(first)]
    each, left = divmod(n - int(want.sum()), len(first))
    want[first] += each
    want[first[:left]] += 1
    low, high = torch.cat([part.low for part in scored]), torch.cat([part.high for part in scored])
    return list(share_out(want, n, low, high).view(len(scored), -1))


@reduce(source=SOURCE, after="hack", adds=lambda merge, **_: ("span",) if merge else ())
def hack(
    kv: LayerKV, stats: Stats, scored: Scored, count: Tensor, ask: Ask, *, merge: bool = True
) -> tuple[LayerKV, Tensor]:
    """Contextual heads merge what they drop into the entry with the most similar key; structural ones drop it.

    To find that entry takes a product of all dropped with all kept keys: more than three times what kvmerger takes.
    """
    kept = top_mask(scored.score, count) & kv.real
    index = mask_index(kept)
    if not merge or scored.weight is None:
        return gather(kv, index), index
    contextual = (scored.weight[0] == 0).to(kept.device)
    gone = mask_index(kv.real & ~kept & contextual[:, None])
    return average(kv, Receivers(index, gone, nearest_key(kv.k, gone, index)[0]), 0.5), index
