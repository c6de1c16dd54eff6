"""How CAKE, PyramidKV and ZipVL share a file between its layers, from the worked examples of their specifications."""

import math
from pathlib import Path

import pytest
import torch
from make import make_snapshot, shrunk
from test_evictors import ask, kept, seen_by
from torch import Tensor

from kvcli.errors import UsageError
from kvcli.methods.cake import cake_score, cake_share, moments
from kvcli.methods.pyramidkv import pyramid_share
from kvcli.methods.zipvl import zipvl_score, zipvl_share
from kvcli.pipeline import protect
from kvcli.probes import needed, probe_mass, remaining
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored, named
from kvcli.snapshot import LayerKV, Stats


def holding(must: int, others: int, weight: Tensor | None = None) -> Scored:
    """A layer of one head with entries that must stay and others."""
    return Scored(torch.cat([torch.full((1, must), torch.inf), torch.zeros(1, others)], 1), weight=weight)


def shares(counts: list[Tensor], must: int = 0) -> list[int]:
    return [int(count) - must for count in counts]


ROWS = [[0.4, 0.1, 0.1, 0.1, 0.05, 0.05, 0.2, 1e-9], [0.1, 0.1, 0.4, 0.1, 0.05, 0.05, 0.1, 0.1]]


def test_cake_scores() -> None:
    kv, stats = seen_by(torch.tensor(ROWS).view(1, 1, 2, 8), [6, 7])
    scored = cake_score(kv, stats, ask(4, 8))
    assert scored.score[0].tolist() == pytest.approx([3.72, 3.74, 3.75, 1.91, 1.89, 0.04, 0, 0], abs=1e-5)
    assert scored.weight is not None and scored.weight.tolist() == pytest.approx([2.71373, 0.09], rel=1e-5)
    assert kept(scored, 3) == [[0, 1, 2]] and kept(scored, 1) == [[2]] and not scored.note
    raw = cake_score(kv, stats, ask(4, 8), kernel=1)
    assert raw.score[0].tolist() == pytest.approx([9.25, 0.1, 9.25, 0.1, 0.05, 0.05, 0, 0], abs=1e-5)


def test_cake_scores_against_float64_in_groups() -> None:
    rng = torch.Generator().manual_seed(0)
    k, q = torch.randn(2, 30, 8, generator=rng), torch.randn(4, 4, 8, generator=rng)
    kv = LayerKV(k, k, torch.arange(30, dtype=torch.int32).repeat(2, 1))
    scored = cake_score(kv, Stats(q_last=q, q_last_pos=torch.arange(26, 30, dtype=torch.int32)), ask(9, 30), gamma=7.0)
    hidden = torch.arange(30) > torch.arange(26, 30)[:, None]
    logit = q.double() @ k.double().repeat_interleave(2, 0).mT
    rows = logit.masked_fill(hidden, -math.inf).softmax(-1)[..., :26]  # [4, 4, 26]
    each = torch.nn.functional.pad(rows.mean(1) + 7 * rows.var(1), (2, 2))
    smooth = sum(each[:, i : i + 26] for i in range(5)) / 5
    torch.testing.assert_close(scored.score[:, :26].double(), smooth.view(2, 2, 26).mean(1), atol=1e-6, rtol=1e-5)
    entropy = -(rows * rows.log()).sum()
    want = torch.stack([entropy, rows.var(1).sum()])
    torch.testing.assert_close(scored.weight, want.float(), atol=0, rtol=1e-4)


def test_cake_of_small_and_of_no_variance() -> None:
    column = torch.tensor([1e-4, 3e-4]).repeat(16).view(1, 32, 1)
    assert moments(column)[1].item() == pytest.approx(1.0323e-8, rel=1e-4)
    kv, stats = seen_by(torch.full((1, 1, 2, 6), 0.15), [6, 7])  # 0.15 / 0.9 each
    level = cake_score(kv, stats, ask(4, 6))
    assert level.score[0].tolist() == pytest.approx([x / 0.9 for x in (0.09, 0.12, 0.15, 0.15, 0.12, 0.09)])
    alone = cake_score(kv, stats, ask(4, 6), window=1)
    assert "one query" in alone.note and not level.note
    for scored in (level, alone):
        assert scored.weight is not None and scored.weight[1] == 0
    assert shares(cake_share([level, alone, alone], 9, ask(3, 6))) == [3, 3, 3]


@pytest.mark.parametrize(
    ("pull", "total", "cap", "expected"),
    [
        ([1, 2, 3, 4], 100, 1000, [10, 20, 30, 40]),
        ([1, 2, 3, 4], 103, 1000, [10, 21, 31, 41]),
        ([1, 1, 1, 7], 100, 40, [20, 20, 20, 40]),
        ([1, 1, 9, 9], 200, 60, [40, 40, 60, 60]),
        ([1, 4, 9, 9], 200, 60, [20, 60, 60, 60]),
        ([0.001, 1, 1, 1], 100, 1000, [0, 34, 33, 33]),
        ([3, 9, 1], 9, 3, [3, 3, 3]),
        ([0, 0, 0], 9, 9, [3, 3, 3]),
        ([0, 1, 3], 8, 9, [0, 2, 6]),
    ],
)
def test_cake_shares(pull: list[float], total: int, cap: int, expected: list[int]) -> None:
    for must in (1, 5):
        layers = [holding(must, cap, torch.tensor([1.0, x])) for x in pull]
        n = total + must * len(layers)
        assert shares(cake_share(layers, n, ask(n // len(layers), cap + must)), must) == expected
        louder = [holding(must, cap, torch.tensor([1e30, x * 1e-30])) for x in pull]
        assert shares(cake_share(louder, n, ask(1, 1), tau1=0.1), must) == expected  # 1e300 and beyond


def test_cake_temperatures() -> None:
    one, other = holding(1, 10**5, torch.tensor([2.71373, 0.09])), holding(1, 10**5, torch.tensor([1.0, 1.0]))
    for taus, power in (((1.0, 1.0), 0.244236), ((1.6, 0.4), 0.00453508)):
        found = cake_share([one, other], 10**5 + 2, ask(1, 1), tau1=taus[0], tau2=taus[1])
        assert int(found[0]) - 1 == pytest.approx(1e5 * power / (1 + power), abs=1)


@pytest.mark.parametrize(
    ("N", "expected"), [(8000, [195, 132, 68, 5]), (158, [150, 117, 83, 50]), (108, [100, 100, 100, 100])]
)
def test_pyramid(N: int, expected: list[int]) -> None:
    layers = [holding(8, N - 8)] * 4
    assert shares(pyramid_share(layers, 432, ask(108, N)), 8) == expected
    assert shares(pyramid_share(layers, 432, ask(108, N), beta=1), 8) == [100] * 4
    assert shares(pyramid_share(layers[:1], 40, ask(40, N)), 8) == [32]


def test_pyramid_beside_a_score_that_needs_much() -> None:
    layers = [holding(50, 50), holding(10, 90), holding(10, 90)]
    found = shares(pyramid_share(layers, 120, ask(40, 100), beta=4))
    assert found == [50 + 29, 10 + 17, 10 + 4]  # 50 are free: 29.17, 16.67, 4.17
    assert sum(found) == 120


def test_pyramid_scores_as_snapkv() -> None:
    full = make_snapshot(tokens=60)
    args = full.layer(0), full.stats[0], ask(20, 60)
    for options in ({}, {"window": 2, "kernel": 3, "pool": "avg"}):
        assert torch.equal(
            named("pyramidkv")["score"](*args, **options).score, named("snapkv")["score"](*args, **options).score
        )


CAUSAL = torch.tensor(
    [[1, 1e-30, 1e-30, 1e-30], [0.6, 0.4, 1e-30, 1e-30], [0.5, 0.1, 0.4, 1e-30], [0.4, 0.1, 0.1, 0.4]]
)


def probed(last: list[int], spread: list[int]) -> tuple[LayerKV, Stats, Ask]:
    """One head asked by these rows of CAUSAL."""
    kv, stats = seen_by(CAUSAL[last].view(1, 1, -1, 4), last)
    q = CAUSAL[spread].log()[None]
    probes = {"q_probe": q, "q_probe_pos": torch.tensor(spread, dtype=torch.int32)}
    return kv, Stats(q_last=stats.q_last, q_last_pos=stats.q_last_pos, **probes), ask(4, 4)


@pytest.mark.parametrize(("last", "spread"), [([0, 1, 2, 3], [0, 3]), ([2, 3], [0, 1, 3]), ([3], [0, 1, 2])])
def test_zipvl_takes_how_many_from_one_ranking_and_which_from_another(last: list[int], spread: list[int]) -> None:
    args = probed(last, spread)
    mass, by_query = probe_mass(*args)
    assert mass.tolist() == pytest.approx([2.5, 0.6, 0.5, 0.4])
    assert by_query.tolist() == pytest.approx([0.625, 0.2, 0.25, 0.4])
    for tau, expected in ((0.6, [0]), (0.7, [0, 3]), (0.9, [0, 2, 3]), (0.96, [0, 1, 2, 3]), (1.0, [0, 1, 2, 3])):
        scored = zipvl_score(*args, tau=tau)
        assert scored.count is not None and kept(scored, int(scored.count)) == [expected]


def test_zipvl_divides_by_the_queries_that_see() -> None:
    mass, by_query = probe_mass(*probed([1, 3], []))
    assert mass.tolist() == pytest.approx([1, 0.5, 0.1, 0.4])
    assert by_query.tolist() == pytest.approx([0.5, 0.25, 0.1, 0.4])


L0, L1 = torch.tensor([0.03, 0.70, 0.02, 0.20, 0.05]), torch.tensor([0.30, 0.25, 0.20, 0.15, 0.10])


@pytest.mark.parametrize(
    ("n", "expected"), [(2, [1, 1]), (3, [1, 2]), (4, [1, 3]), (5, [2, 3]), (6, [2, 4]), (7, [3, 4])]
)
def test_zipvl_shares(n: int, expected: list[int]) -> None:
    layers = [holding(0, 5, remaining(mass)) for mass in (L0, L1)]
    assert shares(zipvl_share(layers, n, ask(n // 2, 5))) == expected


def test_zipvl_keeps_its_order_within_what_must_stay_and_what_is_held() -> None:
    layers = [holding(3, 2, remaining(L0)), holding(1, 2, remaining(L1))]
    assert shares(zipvl_share(layers, 5, ask(2, 5))) == [3, 2]
    assert shares(zipvl_share(layers, 7, ask(3, 5))) == [4, 3]
    rest = torch.tensor([[1, 0.3, 0.1, 0.05, 0.02], [1, 0.9, 0.8, 0.7, 0.6], [1, 0.29, 0.28, 0.27, 0.26]])
    layers = [holding(must, 5 - must, part) for must, part in zip((5, 0, 0), rest, strict=True)]
    assert shares(zipvl_share(layers, 12, ask(4, 5))) == [5, 5, 2]  # what the first needs is the last one's to give


def test_zipvl_of_even_attention_and_of_nothing() -> None:
    for tau in (0.1, 0.5, 0.96, 0.975, 1.0):
        assert needed(remaining(torch.rand(1) * torch.ones(200)), tau) == math.ceil(round(tau * 200, 6))
    assert needed(remaining(torch.tensor([0.0, 1.0, 1e-30, 0.0])), 1.0) == 2
    assert needed(remaining(torch.zeros(200)), 0.5) == 100
    small = torch.tensor([1.0, *[1e-12] * 9])  # beyond what 1 - x can tell apart in float32
    layers = [holding(0, 10, remaining(small)), holding(0, 10, remaining(small.square()))]
    assert shares(zipvl_share(layers, 11, ask(5, 10))) == [10, 1]


def test_zipvl_with_tau_needs_no_budget_and_keeps_one_set_a_layer(tmp_path: Path) -> None:
    full = make_snapshot(heads=3, q_heads=6, tokens=83, dtype=torch.float32)
    less, more = (shrunk(full, f"zipvl:tau={tau}", tmp_path / "a.kv.safetensors", "") for tau in (0.5, 0.9))
    for i in range(2):
        assert bool((less.layer(i).pos == less.layer(i).pos[0]).all())
        assert 4 + 20 <= less.rows[i].lens[0] < more.rows[i].lens[0] < 83  # the first 4 and newest 20 stay
    mass = probe_mass(full.layer(0), full.stats[0], Ask(0, 2, 0, 0, 83, 0, 0, 0, 8**-0.5))[0]
    assert more.rows[0].lens.tolist() == [needed(remaining(mass), 0.9)] * 3
    with pytest.raises(UsageError, match="fixes its own sizes"):
        Recipe.parse("zipvl:tau=0.9+allocate=adakv")


def test_protection_is_counted() -> None:
    kv, stats, asked = probed([0, 1, 2, 3], [])
    scored = protect(zipvl_score(kv, stats, asked), kv, Ask(0, 1, 2, 2, 4, 0, 1, 0, 1.0))
    assert shares(zipvl_share([scored], 2, asked)) == [2] and kept(scored, 2) == [[0, 3]]
