"""Global allocation against the ranking written out, and its floor."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.errors import InfeasibleError
from kvcli.methods.ranking import ranking
from kvcli.registry import Ask, Scored


def ask(B: int) -> Ask:
    return Ask(-1, 1, 0, B, 99, 0, 0, 0, 1.0)


def counts(scores: list[Tensor], n: int, B: int, floor: float, least: list[Tensor | None] | None = None) -> list[Any]:
    parts = [Scored(score, least=low) for score, low in zip(scores, least or [None] * len(scores), strict=True)]
    return [count.tolist() for count in ranking(parts, n, ask(B), floor=floor)]


def written_out(scores: list[Tensor], n: int, given: list[list[int]]) -> list[list[int]]:
    """Each head its `given` best, then one entry after the other from a single list of all the rest."""
    rest, count = [], [list(row) for row in given]
    for i, score in enumerate(scores):
        for h, row in enumerate(score.tolist()):
            ranked = sorted((-x, j) for j, x in enumerate(row) if x > -math.inf)
            rest += [(x, i, h, j) for x, j in ranked[given[i][h] :]]
    for _, i, h, _ in sorted(rest)[: n - sum(map(sum, given))]:
        count[i][h] += 1
    return count


@settings(deadline=None, max_examples=60)
@given(st.data())
def test_it_is_one_ranking_above_the_floor(data: st.DataObject) -> None:
    rng = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
    L, H, T = (data.draw(st.integers(1, most)) for most in (3, 3, 9))
    scores = [torch.randint(0, 5, (H, T + i), generator=rng).float() for i in range(L)]  # with ties
    for score in scores:
        score[torch.rand(score.shape, generator=rng) < 0.2] = math.inf
        score[0, T // 2 + 1 :] = -math.inf  # padding
    B, floor = data.draw(st.integers(1, T)), data.draw(st.sampled_from([0.0, 0.5, 1.0]))
    must = [score.isposinf().sum(1).clamp(min=1) for score in scores]
    real = [(score > -math.inf).sum(1) for score in scores]
    given = [
        torch.full_like(low, int(floor * B)).clamp(low, high).tolist() for low, high in zip(must, real, strict=True)
    ]
    n = data.draw(st.integers(sum(map(sum, given)), sum(int(high.sum()) for high in real)))
    assert counts(scores, n, B, floor) == written_out(scores, n, given)


def test_a_floor_that_does_not_fit_yields_to_what_must_stay() -> None:
    score = torch.zeros(3, 10)
    score[0, :9] = math.inf
    assert counts([score], 12, 4, 1.0) == [[9, 2, 1]]
    with pytest.raises(InfeasibleError):
        counts([score], 10, 4, 1.0)
    assert counts([torch.zeros(3, 10)], 12, 4, 0.0, [torch.tensor([1, 1, 7])]) == [[4, 1, 7]]


def test_layers_share_too() -> None:
    low, high = torch.full((2, 20), 0.1), torch.full((2, 20), 0.9)
    assert counts([low, high], 40, 10, 0.2) == [[2, 2], [20, 16]]  # of equal scores the lower head
    assert counts([low, high], 40, 10, 1.0) == [[10, 10], [10, 10]]
