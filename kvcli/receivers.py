"""Entries that go are taken up by entries that stay: who receives whom, and what becomes of the receivers."""

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from .kernels.nearest import nearest_key
from .registry import Scored
from .snapshot import LayerKV, gather, mask_index, top_mask


@dataclass(frozen=True)
class Receivers:
    """Which entry that stays takes up which that goes; indices are ascending in a head, -1 is padding, last."""

    kept: Tensor  # [H, n] int64, index of entries
    gone: Tensor  # [H, M] int64, index of entries
    at: Tensor  # [H, M] int64, index in `kept`; -1 for what is lost

    def only(self, joins: Tensor) -> "Receivers":  # [H, M] bool
        """The same, but what does not join is lost."""
        return replace(self, at=self.at.masked_fill(~joins, -1))

    @property
    def size(self) -> Tensor:  # [H, n] float32
        """How many entries each receiver takes up."""
        return self._order()[1].view_as(self.kept).float()

    def total(self, part: Tensor) -> Tensor:  # [H, M] -> [H, n]
        """The sum of `part` over what each receiver takes up."""
        order, size = self._order()
        return torch.segment_reduce(part.flatten()[order], "sum", lengths=size).view_as(self.kept)

    def _order(self) -> tuple[Tensor, Tensor]:  # [R] int64 of H * M, [H * n] int64
        # what is taken up, one receiver's after another's: sums of segments come out the same in every run
        H, n = self.kept.shape
        to = (self.at + torch.arange(H, device=self.at.device)[:, None] * n).flatten()
        joined = (self.at.flatten() >= 0).nonzero().flatten()
        to, order = to[joined].sort(stable=True)
        return joined[order], torch.bincount(to, minlength=H * n)


def split(kv: LayerKV, scored: Scored, count: Tensor) -> tuple[Tensor, Tensor]:  # -> [H, n], [H, M] int64
    """The indices of what stays, the `count` highest scores of each head, and of the other entries."""
    stays = top_mask(scored.score, count) & kv.real
    return mask_index(stays), mask_index(kv.real & ~stays)


def receive(kv: LayerKV, scored: Scored, count: Tensor) -> tuple[Receivers, Tensor]:  # -> [H, M] float32
    """Each entry that goes is taken up by the one that stays whose key is most like its own, at this cosine."""
    kept, gone = split(kv, scored, count)
    at, cosine = nearest_key(kv.k, gone, kept)
    return Receivers(kept, gone, at), cosine


def alike(to: Receivers, cosine: Tensor, by: Literal["head", "layer"]) -> Receivers:
    """Only what is no less like its receiver than the mean of its head joins it; else it is lost.

    by="layer": the first entries that go of all heads join or are lost together, by their mean, then the second ones.
    """
    real = to.gone >= 0
    wide = cosine.double().masked_fill(~real, 0.0)  # the mean of equal numbers is exactly theirs
    if by == "layer":
        mean = wide.sum() / real.sum()
        return to.only(wide.sum(0) / real.sum(0) >= mean)
    return to.only(wide >= wide.sum(1, keepdim=True) / real.sum(1, keepdim=True))


def average(kv: LayerKV, to: Receivers, pull: float) -> LayerKV:
    """Receivers become the mean of themselves and what they take up, each of that drawn to them first.

    pull: how much of it is left of its distance to the receiver; 1 is the plain mean, 1/2 LOOK-M's pivotal one.
    """
    size = to.size
    return fold(kv, to, torch.full(to.at.shape, pull, device=size.device), 1 + (1 - pull) * size, 1 + size)


def fold(
    kv: LayerKV, to: Receivers, weight: Tensor, own: Tensor, total: Tensor, *, keys: bool = True
) -> LayerKV:  # [H, M], [H, n], [H, n]
    """What stays; each receiver is (own * itself + sum of weight * what it takes up) / total, spans add up.

    keys=False merges values alone. Other entries are copied bit for bit. The bias of merged keys is that of the mean
    mass: nothing is added for what they took up.
    """
    kept = gather(kv, to.kept)
    order, size = to._order()
    head = order // max(to.gone.shape[1], 1)
    source, share = (head, to.gone.flatten()[order]), weight.flatten()[order, None]
    joined = (size > 0).view_as(to.kept)

    def sums(rows: Tensor) -> Tensor:  # [R, ...] -> [H, n, ...]
        return torch.segment_reduce(rows, "sum", lengths=size, axis=0).view(*to.kept.shape, *rows.shape[1:])

    def merged(part: Tensor, old: Tensor) -> Tensor:  # [H, T, D], [H, n, D] -> [H, n, D]
        new = (own[..., None] * old.float() + sums(part[source].float() * share)) / total[..., None]
        return torch.where(joined[..., None], new.to(old.dtype), old)

    span = torch.ones_like(kept.pos) if kept.span is None else kept.span
    more = torch.ones(len(order), device=span.device) if kv.span is None else kv.span[source]
    span = (span + sums(more.double())).int().masked_fill(~kept.real, 0)
    bias = kept.bias
    if keys and kv.bias is not None and bias is not None:
        mean = (bias.double().exp() + sums(kv.bias[source].double().exp())) / (1 + to.size)
        bias = torch.where(joined, mean.log().float(), bias)
    k = merged(kv.k, kept.k) if keys else kept.k
    return LayerKV(k, merged(kv.v, kept.v), kept.pos, bias, span)
