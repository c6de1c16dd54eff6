"""Runs no longer than a limit, against the rule written out step by step."""

import math
import time
from itertools import pairwise
from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvcli.kernels.limit import fewest_runs, first_fitting, limit_runs, must_start, smallest_limit


def pieces(score: list[float], begin: int, end: int, limit: int) -> list[int]:
    """Where a run is cut: at its weakest link, and again while a piece is too long."""
    if end - begin <= limit:
        return []
    weakest = max(range(begin + 1, end), key=lambda i: (score[i], -i))
    return [*pieces(score, begin, weakest, limit), weakest, *pieces(score, weakest, end, limit)]


def written_out(score: list[float], starts: list[int], limit: int) -> list[int]:
    n, total = len(starts), len(score)
    cuts = sorted({*starts, *(i for run in pairwise([*starts, total]) for i in pieces(score, *run, limit))})
    while len(cuts) > n:
        ends = [*cuts, total]
        closable = [ends[i] for i in range(1, len(cuts)) if ends[i + 1] - ends[i - 1] <= limit]
        if not (closable := [cut for cut in closable if score[cut] < math.inf]):
            break
        cuts.remove(min(closable, key=lambda i: (score[i], -i)))
    while len(cuts) > n:  # the first run with room takes one entry from the next
        at = next(i for i in range(1, len(cuts)) if score[cuts[i]] < math.inf and cuts[i] - cuts[i - 1] < limit)
        cuts[at] += 1
        if cuts[at] in [*cuts[at + 1 :], total]:
            del cuts[at]
    return cuts


@pytest.mark.parametrize("seed", range(8))
def test_it_is_the_rule_written_out(seed: int) -> None:
    draw = Random(seed)
    for _ in range(60):
        total, limit = draw.randint(1, 30), draw.randint(1, 8)
        score = [math.inf, *(draw.choice([0.0, 1.0, 2.0, draw.random(), math.inf]) for _ in range(total - 1))]
        score = [1.0 if draw.random() < 0.5 and i and x == math.inf else x for i, x in enumerate(score)]
        forced = torch.tensor([[x == math.inf for x in score] + [True, True]])
        real = torch.arange(total + 2)[None] < total
        least = int(fewest_runs(forced, real, limit))
        count = draw.choice([least, draw.randint(least, total)])
        best = sorted(range(total), key=lambda i, score=score: (-score[i], i))[:count]
        start = torch.zeros(1, total + 2, dtype=torch.bool)
        start[0, best] = True
        limited = limit_runs(torch.tensor([[*score, math.nan, math.nan]]), start, real, limit)
        begins = limited[0].nonzero().flatten().tolist()
        assert begins == written_out(score, sorted(best), limit)
        assert len(begins) == count and {i for i, x in enumerate(score) if x == math.inf} <= set(begins)
        assert max(b - a for a, b in pairwise([*begins, total])) <= limit


def test_runs_within_the_limit_stay_and_heads_are_apart() -> None:
    rng = torch.Generator().manual_seed(0)
    score = torch.rand(3, 40, generator=rng)
    score[:, 0] = math.inf
    start = score > torch.tensor([[0.5], [0.9], [0.7]])
    real = torch.ones_like(start)
    assert torch.equal(limit_runs(score, start, real, 0), start)
    limited = limit_runs(score, start, real, 9)
    assert torch.equal(limited.sum(1), start.sum(1)) and not torch.equal(limited, start)
    for h in range(3):
        assert torch.equal(limit_runs(score[h : h + 1], start[h : h + 1], real[:1], 9), limited[h : h + 1])


def test_a_cut_is_won_back_at_the_strongest_link() -> None:
    score = torch.tensor([[math.inf, -0.9, -0.5, -0.9, -0.8, -0.99, -0.7, -0.3]])
    start = torch.tensor([[1, 0, 0, 0, 0, 0, 0, 1]]).bool()
    limited = limit_runs(score, start, torch.ones_like(start), 6)
    assert limited[0].nonzero().flatten().tolist() == [0, 2]  # cut at .5, won back by closing .3


@pytest.mark.parametrize("limit", [1, 3, 64, 0])
def test_fewest_runs(limit: int) -> None:
    start = torch.tensor([[1, 0, 0, 0, 1, 0, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1]]).bool()
    real = torch.arange(8) < torch.tensor([[8], [6]])
    assert fewest_runs(start, real, limit).tolist() == {1: [8, 6], 3: [4, 3], 64: [2, 2], 0: [2, 2]}[limit]


def test_the_smallest_limit_is_the_smallest() -> None:
    start, real = torch.zeros(2, 50, dtype=torch.bool), torch.ones(2, 50, dtype=torch.bool)
    start[:, [0, 20]] = True
    for room in (2, 3, 7, 50):
        limit = smallest_limit(start, real, torch.tensor([room, room]))
        assert limit and int(fewest_runs(start, real, limit).max()) <= room
        assert limit == 1 or int(fewest_runs(start, real, limit - 1).max()) > room
    assert smallest_limit(start, real, torch.tensor([1, 9])) is None


@settings(deadline=None, max_examples=50)
@given(room=st.integers(1, 30), limit=st.integers(0, 9), seed=st.integers(0, 20))
def test_as_many_are_kept_as_fit(room: int, limit: int, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    rank = torch.rand(2, 24, generator=rng).argsort(-1)
    kept = torch.zeros(2, 24, dtype=torch.bool)
    kept[:, 0] = True
    real = torch.ones_like(kept)
    for most in (5, 24):
        more = first_fitting(rank, torch.tensor([most, most]), kept, real, room, limit)
        for h in range(2):
            runs = [int(fewest_runs(must_start(kept | (rank < n)), real, limit)[h]) for n in range(most + 1)]
            assert runs == sorted(runs)
            fitting = sum(n <= room for n in runs)
            assert int(more[h].sum()) == max(fitting - 1, 0)


def test_equal_keys_are_no_slower() -> None:
    score = torch.full((3, 8192), -1.0)
    score[:, 0] = math.inf
    start = torch.arange(8192).expand(3, -1) < 200
    began = time.process_time()
    limited = limit_runs(score, start, torch.ones_like(start), 64)
    assert limited.sum(1).tolist() == [200] * 3
    assert time.process_time() - began < 1.5
