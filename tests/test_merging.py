"""KVMerger's modes: a threshold instead of a budget, widths, and what all modes keep."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from make import make_snapshot, shrunk
from torch import Tensor

from kvcli.budget import Budget
from kvcli.errors import UsageError
from kvcli.kernels.adjacent import adjacent_cosine
from kvcli.methods.kvmerger import kvmerger, kvmerger_score
from kvcli.pipeline import make_plans, protect
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV, Rows, Snapshot, Stats

FREQ = [1.0, 0.1, 0.01]
ROPE = {"head_dim": 8, "inv_freq": FREQ}


def layer(k: Tensor, v: Tensor | None = None) -> LayerKV:
    return LayerKV(k, k if v is None else v, torch.arange(k.shape[1], dtype=torch.int32).repeat(len(k), 1))


def ask(B: int, N: int, sink: int = 0, recent: int = 0) -> Ask:
    return Ask(0, 1, B, B, N, sink, recent, 0, 1.0, rope=ROPE)


def smooth(tokens: int = 120, dtype: torch.dtype = torch.bfloat16) -> Snapshot:
    """A snapshot whose neighbouring keys are alike."""
    full = make_snapshot(tokens=tokens, dtype=dtype)
    rows = [replace(rows, k=_walk(rows, tokens).to(dtype)) for rows in full.rows]
    return replace(full, rows=rows)


def _walk(rows: Rows, tokens: int) -> Tensor:
    return rows.k.float().view(-1, tokens, 8).cumsum(1).flatten(0, 1)


def runs(size: int, count: int, total: int) -> tuple[Tensor, Tensor]:
    """Scores whose best `count` cut `total` entries into runs of `size`."""
    cut = torch.full((1, total), -1.0)
    cut[0, ::size] = math.inf
    return cut, torch.tensor([count])


# The threshold.


def test_a_threshold_cuts_where_the_cosine_is_no_larger(tmp_path: Path) -> None:
    small = shrunk(smooth(), "kvmerger:epsilon=0.9,max_run=0,sink=2,recent=5", tmp_path / "a", "")
    for i, rows in enumerate(smooth().rows):
        k = rows.k.view(2, 120, 8).double()
        cosine = torch.cosine_similarity(k[:, 1:], k[:, :-1], dim=-1)
        starts = small.layer(i)
        for h in range(2):
            spans = starts.span[h][starts.real[h]]  # type: ignore[index]
            begins = set((spans.cumsum(0) - spans).tolist())
            assert int(spans.sum()) == 120
            assert {1 + int(j) for j in (cosine[h] <= 0.9 - 1e-6).nonzero()} <= begins
            free = begins - {1 + int(j) for j in (cosine[h] <= 0.9 + 1e-6).nonzero()}
            # Any other start is one of a protected token or behind one: sinks, newest, and the heaviest of the rest.
            newest, heavy = round(0.08 * 120), round(0.02 * 120)
            assert {0, 1, 2, *range(120 - newest, 120)} <= begins
            assert len(free - {0, 1, 2, *range(120 - newest, 120)}) <= 2 * heavy
    entry = small.meta.history[-1]
    assert entry["budget"] == "" and entry["entries"] == sum(len(rows.k) for rows in small.rows) < entry["of"]


def test_worked_thresholds() -> None:
    angle = torch.tensor([0.0, 10, 12, 80, 85, 90, 95, 170]).deg2rad()
    kv = layer(torch.stack([angle.cos(), angle.sin()], -1)[None])
    stats = Stats(attn_mass=torch.tensor([[3, 0.2, 0.5, 0.1, 0.4, 0.3, 0.1, 0.6]]))
    for sink, expected in ((0, 3), (1, 4)):  # the newest is protected: it is a run of its own anyway
        scored = kvmerger_score(kv, stats, ask(8, 8, sink), epsilon=0.9)
        assert scored.count is not None and scored.count.tolist() == [expected]


def test_a_threshold_of_one_changes_nothing_and_below_minus_one_leaves_an_interval(tmp_path: Path) -> None:
    full = smooth(dtype=torch.float32)
    full.rows[0].k[:60] = full.rows[0].k[3] * torch.arange(1, 61)[:, None] / 7
    assert bool((adjacent_cosine(full.layer(0).k) > 1).any())  # by rounding
    same = shrunk(full, "kvmerger:epsilon=1", tmp_path / "a", "")
    for before, after in zip(full.rows, same.rows, strict=True):
        assert torch.equal(before.k, after.k) and torch.equal(before.v, after.v) and after.bias is None
    few = shrunk(full, "kvmerger:epsilon=-1.5,max_run=0,recent=32", tmp_path / "b", "").layer(0)
    mass = full.stats[0].attn_mass
    assert mass is not None
    for h in range(2):
        newest = 120 - 32
        heavy = mass[h, 4:newest].argsort(descending=True)[:2] + 4
        cuts = [3, *heavy.sort().values.tolist(), newest]
        intervals = sum(b - a > 1 for a, b in pairwise(cuts))
        assert int(few.lens[h]) == 4 + 2 + 32 + intervals


def test_long_runs_raise_the_count_of_a_threshold(tmp_path: Path) -> None:
    full = smooth()
    for rows in full.rows:
        rows.k[:] = 1.0
    for limit, text in ((10, ",max_run=10"), (64, "")):
        small = shrunk(full, f"kvmerger:epsilon=0.5,sink=1,recent=1{text}", tmp_path / "a", "")
        for i in range(2):
            span = small.layer(i).span
            assert span is not None and int(span.max()) <= limit and span.sum(1).tolist() == [120, 120]


def test_a_threshold_compresses_what_is_compressed(tmp_path: Path) -> None:
    once = shrunk(smooth(), "kvmerger+adakv", tmp_path / "a", "60%", keep_stats=True)
    twice = shrunk(once, "kvmerger:epsilon=0.8,recent=4", tmp_path / "b", "")
    assert [len(rows.k) for rows in twice.rows] < [len(rows.k) for rows in once.rows]
    for i in range(2):
        span = twice.layer(i).span
        assert span is not None and span.sum(1).tolist() == [120, 120]


@pytest.mark.parametrize(
    ("recipe", "budgets", "says"),
    [
        ("kvmerger:epsilon=0.75", ["35%"], "takes no --budget"),
        ("kvmerger", [], "needs a --budget"),
        ("raw", ["35%"], "keeps every entry"),
        ("kvmerger", ["35%", "35%"], "twice"),
    ],
)
def test_a_budget_is_given_where_it_says_something(recipe: str, budgets: list[str], says: str) -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.parse(recipe).budgets(budgets)
    assert says in "\n".join(caught.value.lines())


@pytest.mark.parametrize(("recipe", "budget"), [("kvmerger", None), ("raw", "35%"), ("kvmerger:epsilon=0.5", "35%")])
def test_plans_hold_a_budget_where_it_says_something(recipe: str, budget: str | None) -> None:
    with pytest.raises(ValueError, match="budget"):
        make_plans(smooth(), Recipe.parse(recipe), [budget and Budget.parse(budget)])


def test_what_must_stay_stays_whatever_a_score_counts() -> None:
    parsed = Recipe.parse("kvmerger:epsilon=-1.5,sink=7,recent=9")
    assert parsed.score
    greedy = replace(parsed.score.stage, fn=lambda kv, *_, **__: Scored(kv.pos.float(), count=torch.tensor([1, 500])))
    plan = make_plans(smooth(), replace(parsed, score=replace(parsed.score, stage=greedy)), [None])[0]
    assert [count.tolist() for count in plan.outline.counts] == [[16, 120]] * 2


def test_an_allocation_beside_a_threshold_is_refused() -> None:
    with pytest.raises(UsageError, match="fixes its own sizes"):
        Recipe.parse("kvmerger:epsilon=0.75+adakv")
    assert Recipe.parse("kvmerger:epsilon=none+adakv").allocate.stage.name == "adakv"


# Widths.


def test_a_fixed_width() -> None:
    kv = layer(torch.tensor([[[0.0], [3.0], [4.0]]]), torch.tensor([[[1.0], [2.0], [4.0]]]))
    cut, count = runs(3, 1, 3)
    stats = Stats(attn_mass=torch.tensor([[2.0, 1.0, 1.0]]))
    for sigma, mean, whole in ((5.0, 2.17658, 6.52974), (3.5, 2.01848, 6.05544), ("mean", 2.01848, 6.05544)):
        for values, expected in (("mean", mean), ("logcount", mean), ("count", whole)):
            small, _ = kvmerger(kv, stats, Scored(cut), count, ask(1, 3), sigma=sigma, values=values)
            assert small.v.item() == pytest.approx(expected, abs=2e-5)


def test_a_narrow_width_keeps_the_pivots_and_a_wide_one_does_not(tmp_path: Path) -> None:
    wide, narrow, mean_ = (
        shrunk(smooth(), f"kvmerger:sigma={sigma}", tmp_path / "a").rows[0].k for sigma in ("1000000", "0.001", "mean")
    )
    assert not torch.equal(wide, narrow) and not torch.equal(narrow, mean_)
    pivots = shrunk(smooth(), "kvmerger:keys=pivot", tmp_path / "a").rows[0].k
    torch.testing.assert_close(narrow, pivots)


@pytest.mark.parametrize("sigma", ["0", "-1", "nan", "inf", "median"])
def test_a_width_that_is_none_is_refused(sigma: str) -> None:
    with pytest.raises(UsageError):
        Recipe.parse(f"kvmerger:sigma={sigma}")


# What all modes keep.


@pytest.mark.parametrize("values", ["mean", "count", "logcount"])
def test_a_partition_into_intervals_with_values_inside_the_hull(values: str) -> None:
    rng = torch.Generator().manual_seed(2)
    k, v = torch.randn(3, 90, 8, generator=rng).cumsum(1), torch.randn(3, 90, 4, generator=rng)
    kv, stats = LayerKV(k, v, layer(k).pos), Stats(attn_mass=torch.rand(3, 90, generator=rng))
    asked = ask(30, 90, 2, 6)
    scored = protect(kvmerger_score(kv, stats, asked), kv, asked)
    small, pivot = kvmerger(kv, stats, scored, torch.tensor([30] * 3), asked, values=values)
    assert small.span is not None and stats.attn_mass is not None
    for h in range(3):
        ends = small.span[h].cumsum(0).tolist()
        assert ends[-1] == 90 and len(ends) == 30
        for run, (begin, end) in enumerate(pairwise([0, *ends])):
            assert begin <= int(pivot[h, run]) < end
            assert stats.attn_mass[h, begin:end].argmax() == int(pivot[h, run]) - begin
            factor = end - begin if values == "count" else 1
            inside = small.v[h, run] / factor
            low, high = v[h, begin:end].min(0).values, v[h, begin:end].max(0).values
            assert bool(((inside >= low - 1e-5) & (inside <= high + 1e-5)).all())
            bias = 0.0 if small.bias is None else small.bias[h, run].item()
            assert bias == pytest.approx(math.log(end - begin) if values == "logcount" else 0.0)
        assert small.pos[h, :2].tolist() == [0, 1] and small.pos[h, -6:].tolist() == list(range(84, 90))
