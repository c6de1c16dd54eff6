"""TOVA, LagKV and CriticalKV against the worked examples of their specifications, and exact counts at all sizes."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import make_snapshot, shrunk
from torch import Tensor

from kvcli.budget import Budget
from kvcli.methods.critical import critical
from kvcli.methods.lagkv import lag_scores, lagkv, ranks
from kvcli.methods.tova import tova
from kvcli.pipeline import make_plans, protect
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV, Stats, mask_index, top_mask

KEYS = torch.tensor([[0.0, 0], [1, 2], [2, 2], [0, 4], [1, 1], [3, 5]])
VALUES = 2 * KEYS + torch.tensor([0.0, 1])


def ask(B: int, N: int, sink: int = 0, recent: int = 0) -> Ask:
    return Ask(0, 1, B, B, N, sink, recent, 0, 1.0)


def layer(k: Tensor, v: Tensor | None = None) -> LayerKV:  # [H, T, D]
    return LayerKV(k, k if v is None else v, torch.arange(k.shape[1], dtype=torch.int32).repeat(len(k), 1))


def seen_by(weight: Tensor, at: list[int]) -> tuple[LayerKV, Stats]:  # [H, G, W, T]
    """A layer and queries at these positions whose attention is `weight`."""
    H, _, _, T = weight.shape
    q = weight.clamp(min=1e-30).log().flatten(0, 1)
    return layer(torch.eye(T).repeat(H, 1, 1)), Stats(q_last=q, q_last_pos=torch.tensor(at, dtype=torch.int32))


def kept(scored: Scored, n: int) -> list[list[int]]:
    score = scored.score
    return mask_index(top_mask(score, torch.full((len(score),), n))).tolist()


HEADS = torch.tensor([[0.5, 0.3, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1]])


def test_tova_keeps_what_the_heads_of_a_layer_attend_to_on_average() -> None:
    group, heads = HEADS.view(1, 2, 1, 4), HEADS.view(2, 1, 1, 4)
    for weight in (group, heads):
        scored = tova(*seen_by(weight, [3]), ask(2, 4))
        for score in scored.score:
            assert score.tolist() == pytest.approx([0.3, 0.25, 0.35, 0.1])
        assert kept(scored, 2)[0] == [0, 2] and kept(scored, 3)[0] == [0, 1, 2]
    own = tova(*seen_by(heads, [3]), ask(2, 4), heads="kv")
    assert kept(own, 2) == [[0, 1], [1, 2]]
    torch.testing.assert_close(own.score, HEADS)


def test_tova_averages_the_last_rows_that_were_asked_for() -> None:
    rows = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.1, 0.2, 0.6, 0.1], [0.1, 0.5, 0.3, 0.1]]).view(1, 1, 3, 4)
    kv, stats = seen_by(rows, [4, 5, 6])
    assert kept(tova(kv, stats, ask(1, 4)), 1) == [[1]]
    assert kept(tova(kv, stats, ask(1, 4), rows=2), 1) == [[2]]
    assert kept(tova(kv, stats, ask(1, 4), rows=9), 1) == [[2]]


def test_tova_of_heads_that_hold_different_tokens_goes_by_position() -> None:
    _, stats = seen_by(HEADS.view(2, 1, 1, 4), [3])
    pos = torch.tensor([[0, 1, 2, 3], [1, 2, -1, -1]], dtype=torch.int32)
    k = torch.eye(4)[pos.long()].masked_fill(pos[..., None] < 0, torch.nan)
    score = tova(LayerKV(k, k, pos), stats, ask(2, 4)).score
    # the second head has .2 and .6 of .8 left, nothing at 0 and 3
    assert score[0].tolist() == pytest.approx([0.25, 0.275, 0.425, 0.05])
    assert score[1, :2].tolist() == pytest.approx([0.275, 0.425])


def test_lagkv_scores_by_the_range_of_the_next_lag() -> None:
    found = (lag_scores(KEYS, 2) + lag_scores(VALUES, 2)) / 2
    assert found.flatten().tolist() == pytest.approx([0.5622, 0.4378, 0.3775, 0.6225], abs=5e-5)
    assert ranks(found).tolist() == [[0.5, 0], [0, 0.5]]
    assert ranks(torch.tensor([[1.0, 3, 3, 2]])).tolist() == [[0, 0.75, 0.5, 0.25]]


@pytest.mark.parametrize(
    ("B", "sink", "expected"),
    [
        (6, 0, [0, 1, 2, 3, 4, 5]),
        (5, 0, [0, 1, 3, 4, 5]),
        (4, 0, [0, 3, 4, 5]),
        (3, 0, [0, 4, 5]),
        (1, 0, [5]),
        (5, 1, [0, 2, 3, 4, 5]),  # of (1, 1/3) and (2, 1/3) in the range of tokens 3 and 4 the second varies more
        (3, 1, [0, 4, 5]),
    ],
)
def test_lagkv_keeps_the_last_lag_and_of_the_others_the_best(B: int, sink: int, expected: list[int]) -> None:
    kv = layer(KEYS[None], VALUES[None])
    scored = lagkv(kv, Stats(), ask(B, 6, sink), lag=2)
    assert kept(protect(scored, kv, ask(B, 6, sink)), B) == [expected]
    tail = 2 if sink == 0 else 3
    assert int(scored.score.isposinf().sum()) == min(tail, B - sink)
    assert bool(scored.note) == (tail > B - sink)


def test_lagkv_of_a_head_shorter_than_two_lags_keeps_the_newest() -> None:
    pos = torch.tensor([[0, 1, 2, 3, 4, 5], [0, 2, 5, -1, -1, -1]], dtype=torch.int32)
    k = KEYS[pos.long()].masked_fill(pos[..., None] < 0, torch.nan)
    kv = LayerKV(k, k, pos)
    scored = protect(lagkv(kv, Stats(), ask(3, 6), lag=2), kv, ask(3, 6))
    assert kept(scored, 3) == [[0, 4, 5], [0, 1, 2]]
    assert bool(scored.score[1, :3].isposinf().all())


NORM = torch.tensor([[1.0, 1, 1, 2, 5, 1]])


def test_critical_takes_half_by_attention_and_half_by_what_values_write() -> None:
    kv, stats = seen_by(torch.tensor([0.4, 0.3, 0.1, 0.08, 0.07, 0.05]).view(1, 1, 1, 6), [6])
    stats = Stats(q_last=stats.q_last, q_last_pos=stats.q_last_pos, value_norm=NORM)
    score = critical(kv, stats, ask(4, 6), kernel=1).score
    assert score[0, :2].isposinf().all() and int(score.isposinf().sum()) == 2
    assert score[0, 2:].tolist() == pytest.approx([0.1001, 0.1602, 0.3505, 0.0501], rel=1e-4)
    assert kept(Scored(score), 4) == [[0, 1, 3, 4]]
    tight = ask(4, 6, sink=1, recent=2)  # leaves one for the first half
    assert critical(kv, stats, tight, kernel=1).score.isposinf().tolist() == [[True] + 5 * [False]]
    assert not critical(kv, stats, ask(4, 6, sink=1, recent=3), kernel=1).score.isposinf().any()


def test_critical_reads_norms_by_position_and_a_short_head_is_kept_whole() -> None:
    _, stats = seen_by(torch.full((2, 1, 1, 6), 1 / 6), [6])
    stats = Stats(q_last=stats.q_last, q_last_pos=stats.q_last_pos, value_norm=NORM.repeat(2, 1))
    pos = torch.tensor([[0, 3, 4, 5], [4, -1, -1, -1]], dtype=torch.int32)
    k = torch.zeros(2, 4, 6).masked_fill(pos[..., None] < 0, torch.nan)
    score = critical(LayerKV(k, k, pos), stats, ask(4, 6), kernel=1).score
    assert score[0].tolist() == pytest.approx([torch.inf, torch.inf, 0.2501 * 5, 0.2501])
    assert score[1, 0] == torch.inf


RECIPES = ["cake", "tova", "pyramidkv", "lagkv", "critical", "zipvl", "critical+adakv", "lagkv+global"]
RECIPES += ["h2o+pyramidkv", "kvmerger+pyramidkv", "expected", "expected+adakv", "expected+global"]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("tokens", [300, 4000])
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_counts_are_exact_at_all_sizes(recipe: str, tokens: int, heads: int) -> None:
    full = make_snapshot(layers=2, heads=heads, q_heads=heads, tokens=tokens, dim=4)
    budgets = [Budget.parse(f"{share}%") for share in (90, 50, 35, 20, 10, 5)]
    for budget, plan in zip(budgets, make_plans(full, Recipe.parse(recipe), budgets), strict=True):
        counts = plan.outline.counts
        assert sum(int(count.sum()) for count in counts) == 2 * heads * int((budget.share or 0) * tokens)
        for part, count in zip(plan.scored, counts, strict=True):
            assert part is not None and bool((count >= part.low).all()) and bool((count <= tokens).all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_merged_and_ragged_entries_are_scored_again(recipe: str, tmp_path: Path) -> None:
    full = make_snapshot(layers=3, heads=3, q_heads=6, tokens=200, dtype=torch.float32)
    once = shrunk(full, "kvmerger+global", tmp_path / "a.kv.safetensors", "60%", keep_stats=True)
    assert once.layer(0).bias is not None and len({int(n) for rows in once.rows for n in rows.lens}) > 1
    twice = shrunk(once, recipe, tmp_path / "b.kv.safetensors", "25%")
    assert sum(len(rows.k) for rows in twice.rows) == 3 * 3 * 50


@pytest.mark.parametrize("recipe", RECIPES)
def test_queries_of_a_probe_come_after_the_document(recipe: str, tmp_path: Path) -> None:
    full = make_snapshot(tokens=200)
    later = [replace(part, q_last_pos=torch.arange(200, 204, dtype=torch.int32)) for part in full.stats]
    small = shrunk(replace(full, stats=later), f"{recipe}+random:recent=0", tmp_path / "a.kv.safetensors", "25%")
    assert sum(len(rows.k) for rows in small.rows) == 2 * 2 * 50
