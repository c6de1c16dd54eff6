"""Runs that are not too long: cut those that are and join others for it, so that their number stays the same.

start [H, T] bool says where runs begin; score [H, T] how weak the link to the entry before is, +inf one that is never
closed; real [H, T] bool is False for the padding that ends a head. Plain Python for the few heads it concerns.
"""

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

from .flat import bounds


def fewest_runs(start: Tensor, real: Tensor, limit: int) -> Tensor:  # [H, T], [H, T] -> [H] int64
    """The fewest runs of at most `limit` entries that begin wherever `start` says, and elsewhere; 0 sets no limit."""
    if not limit:
        return (start & real).sum(1)
    first, size, lens = bounds(start, real)
    return torch.zeros_like(lens).index_add_(0, first // start.shape[1], (size + limit - 1) // limit)


def must_start(kept: Tensor) -> Tensor:  # [H, T] bool -> [H, T] bool
    """Where a run has to start: at the first entry, at one that is kept as it is and behind it."""
    start = kept.clone()
    start[:, 1:] |= kept[:, :-1]
    start[:, 0] = True
    return start


def first_fitting(
    rank: Tensor, most: Tensor, kept: Tensor, real: Tensor, room: int, limit: int
) -> Tensor:  # [H, T] int64, [H], [H, T], [H, T] -> [H, T] bool
    """The first by rank, up to `most`, that can be kept as they are beside `kept` in heads of `room` runs."""
    low, high = torch.zeros_like(most), most
    while bool((low < high).any()):
        middle = (low + high + 1) // 2
        fits = fewest_runs(must_start(kept | (rank < middle[:, None])), real, limit) <= room
        low, high = torch.where(fits, middle, low), torch.where(fits, high, middle - 1)
    return rank < low[:, None]


def smallest_limit(start: Tensor, real: Tensor, room: Tensor) -> int | None:  # [H, T], [H, T], [H]
    """The smallest limit that needs no more than `room` runs beginning wherever `start` says; None if none does."""
    limits = range(1, start.shape[1] + 1)
    at = bisect_left(limits, True, key=lambda limit: bool((fewest_runs(start, real, limit) <= room).all()))
    return limits[at] if at < len(limits) else None


def limit_runs(score: Tensor, start: Tensor, real: Tensor, limit: int) -> Tensor:  # [H, T] each -> [H, T] bool
    """As many runs a head as `start` has, none longer than `limit`; 0 sets no limit.

    A run that is too long is cut at its weakest link, of equal ones the first, until no piece is. Each cut so made is
    won back by closing the strongest open one, of equal ones the last, that leaves a run within the limit. Where that
    is not enough, runs are filled up to the limit from the first on. Needs at least `fewest_runs` of what is +inf.
    """
    start = start & real
    first, size, _ = bounds(start, real)
    for h in torch.unique(first[size > (limit or start.shape[1])] // start.shape[1]).tolist():
        begins = _limited(score[h][real[h]].tolist(), start[h].nonzero().flatten().tolist(), limit)
        start[h] = False
        start[h, begins] = True
    return start


def _limited(score: Sequence[float], begins: Sequence[int], limit: int) -> list[int]:
    total = len(score)
    cuts = {i for begin, end in pairwise([*begins, total]) for i in _too_long(score, begin, end, limit)}
    runs = sorted(cuts | set(begins))
    runs = _closed(score, runs, limit, len(cuts))
    return _filled(score, runs, limit, len(runs) - len(begins))


def _too_long(score: Sequence[float], begin: int, end: int, limit: int) -> Iterator[int]:
    # Where a run is cut: the links that are the weakest among more than `limit` entries. The stack falls from bottom
    # to top, so a link lies between what is below it and the first weaker one to come.
    stack = [begin]
    for i in range(begin + 1, end + 1):
        while len(stack) > 1 and (i == end or score[i] > score[stack[-1]]):
            link = stack.pop()
            if i - stack[-1] > limit:
                yield link
        stack.append(i)


def _closed(score: Sequence[float], begins: Sequence[int], limit: int, most: int) -> list[int]:
    # `most` cuts closed, strongest first, as far as the limit allows.
    after = dict(pairwise([*begins, len(score)]))
    before = {right: left for left, right in after.items()}
    for cut in sorted((i for i in begins[1:] if score[i] < math.inf), key=lambda i: (score[i], -i)):
        left, right = before[cut], after[cut]
        if most and right - left <= limit:
            after[left], before[right] = right, left
            del after[cut]
            most -= 1
    return sorted(after)


def _filled(score: Sequence[float], begins: Sequence[int], limit: int, most: int) -> list[int]:
    # `most` cuts fewer: each is moved on until its run is full, or dropped where the next run fits in as well.
    filled = [begins[0]]
    for cut, following in pairwise([*begins[1:], len(score)]):
        if not most or score[cut] == math.inf:
            filled.append(cut)
        elif filled[-1] + limit < following:
            filled.append(filled[-1] + limit)
        else:
            most -= 1
    return filled
