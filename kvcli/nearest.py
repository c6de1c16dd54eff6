"""Entries that are dropped join those that stay: whose key is most similar, and the mean of what comes together."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import normalize

from .snapshot import LayerKV, gather

TILE = 1 << 22  # cosines at once


def nearest_key(k: Tensor, dropped: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:  # [H, T, D], [H, M], [H, n] int64
    """Where in `kept` the key most similar to each dropped one is [H, M], and their cosine [H, M]; -1 is padding."""
    at, cosine = torch.full_like(dropped, -1), torch.zeros(dropped.shape, device=k.device)
    for h in range(len(k)):
        real = dropped[h] >= 0
        there, here = (normalize(k[h, index[index >= 0]].float(), dim=-1) for index in (dropped[h], kept[h]))
        tiles = [(part @ here.T).max(1) for part in torch.split(there, max(1, TILE // len(here)))]
        at[h, real] = torch.cat([tile.indices for tile in tiles])
        cosine[h, real] = torch.cat([tile.values for tile in tiles])
    return at, cosine


def joined(kv: LayerKV, kept: Tensor, dropped: Tensor) -> LayerKV:  # [H, n], [H, M] int64, -1 = padding
    """What stays, each entry the mean of itself and of the middles between it and the entries it takes up (LOOK-M).

    Spans add up; entries that take up nothing stay bit for bit.
    """
    small, n = gather(kv, kept), kept.shape[1]
    at, _ = nearest_key(kv.k, dropped, kept)
    h, m = (dropped >= 0).nonzero(as_tuple=True)
    to = at[h, m] + h * n
    # One receiver after the other: sums of segments are the same in every run.
    order, size = to.argsort(stable=True), torch.bincount(to, minlength=kept.numel())
    source = h[order], dropped[h, m][order]
    span = torch.ones_like(kv.pos) if kv.span is None else kv.span
    more = torch.segment_reduce(span[source].double(), "sum", lengths=size).view_as(kept)
    span = (span.gather(1, kept.clamp(min=0)) + more).int().masked_fill(~small.real, 0)
    return replace(small, k=_mean(kv.k[source], small.k, size), v=_mean(kv.v[source], small.v, size), span=span)


def _mean(rows: Tensor, old: Tensor, size: Tensor) -> Tensor:  # [M, D], [H, n, D], [H * n] -> [H, n, D]
    flat, n = old.flatten(0, 1), size[:, None]
    total = torch.segment_reduce(rows.float(), "sum", lengths=size) + (n + 2) * flat.float()
    return torch.where(n > 0, (total / (2 * (n + 1))).to(old.dtype), flat).view_as(old)
