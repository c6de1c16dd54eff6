"""KVMerger's modes: a threshold instead of a budget, widths, limits of runs, and which keys are averaged."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from make import make_snapshot
from torch import Tensor

from kvcli.budget import Budget
from kvcli.errors import InfeasibleError, UsageError
from kvcli.kernels.adjacent import adjacent_cosine
from kvcli.kernels.rope import rotate
from kvcli.methods.kvmerger import kvmerger, kvmerger_score
from kvcli.pipeline import carry_out, make_plans, protect
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV, Rows, Snapshot, Stats
from kvcli.storage import Reader

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


def compress(full: Snapshot, recipe: str, path: Path, budget: str = "", **options: Any) -> Snapshot:
    parsed = Recipe.parse(recipe)
    plans = make_plans(full, parsed, parsed.budgets([budget] if budget else []), **options)
    carry_out(full, plans, [path], force=True)
    return Reader(path).snapshot()


def runs(size: int, count: int, total: int) -> tuple[Tensor, Tensor]:
    """Scores whose best `count` cut `total` entries into runs of `size`."""
    cut = torch.full((1, total), -1.0)
    cut[0, ::size] = math.inf
    return cut, torch.tensor([count])


# The threshold.


def test_a_threshold_cuts_where_the_cosine_is_no_larger(tmp_path: Path) -> None:
    small = compress(smooth(), "kvmerger:epsilon=0.9,max_run=0,sink=2,recent=5", tmp_path / "a")
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
    same = compress(full, "kvmerger:epsilon=1", tmp_path / "a")
    for before, after in zip(full.rows, same.rows, strict=True):
        assert torch.equal(before.k, after.k) and torch.equal(before.v, after.v) and after.bias is None
    few = compress(full, "kvmerger:epsilon=-1.5,max_run=0,recent=32", tmp_path / "b").layer(0)
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
        small = compress(full, f"kvmerger:epsilon=0.5,sink=1,recent=1{text}", tmp_path / "a")
        for i in range(2):
            span = small.layer(i).span
            assert span is not None and int(span.max()) <= limit and span.sum(1).tolist() == [120, 120]


def test_a_threshold_compresses_what_is_compressed(tmp_path: Path) -> None:
    once = compress(smooth(), "kvmerger+adakv", tmp_path / "a", "60%", keep_stats=True)
    twice = compress(once, "kvmerger:epsilon=0.8,recent=4", tmp_path / "b")
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
        compress(smooth(), f"kvmerger:sigma={sigma}", tmp_path / "a", "30%").rows[0].k
        for sigma in ("1000000", "0.001", "mean")
    )
    assert not torch.equal(wide, narrow) and not torch.equal(narrow, mean_)
    pivots = compress(smooth(), "kvmerger:keys=pivot", tmp_path / "a", "30%").rows[0].k
    torch.testing.assert_close(narrow, pivots)


@pytest.mark.parametrize("sigma", ["0", "-1", "nan", "inf", "median"])
def test_a_width_that_is_none_is_refused(sigma: str) -> None:
    with pytest.raises(UsageError):
        Recipe.parse(f"kvmerger:sigma={sigma}")


# Limits of runs.


@pytest.mark.parametrize("recipe", ["kvmerger", "kvmerger+adakv", "kvmerger+global"])
@pytest.mark.parametrize("limit", [4, 9, 0])
def test_no_run_is_longer_than_its_limit(recipe: str, limit: int, tmp_path: Path) -> None:
    name, *more = recipe.split("+")
    text = "+".join([f"{name}:max_run={limit},sink=2,recent=3", *more])
    small, free = (compress(smooth(), one, tmp_path / "a", "35%") for one in (text, text.replace("run=4", "run=0")))
    longest = max(int(rows.span.max()) for rows in small.rows if rows.span is not None)
    assert longest <= limit or not limit
    assert limit != 4 or max(int(rows.span.max()) for rows in free.rows if rows.span is not None) > 4
    assert sum(len(rows.k) for rows in small.rows) == 4 * 42
    for i in range(2):
        kv = small.layer(i)
        assert kv.span is not None and kv.span.sum(1).tolist() == [120, 120]
        for h in range(2):
            assert {0, 1, 117, 118, 119} <= set(kv.pos[h][kv.span[h] == 1].tolist())


@pytest.mark.parametrize("budget", ["4", "7", "10"])
@pytest.mark.parametrize("recipe", ["kvmerger", "kvmerger+global"])
def test_a_limit_that_does_not_fit_names_one_that_does(budget: str, recipe: str, tmp_path: Path) -> None:
    name, *more = recipe.split("+")
    with pytest.raises(InfeasibleError) as caught:
        compress(smooth(), "+".join([f"{name}:max_run=11,recent=0", *more]), tmp_path / "a", budget)
    named = int(caught.value.fix.rpartition("=")[2])
    small = compress(smooth(), "+".join([f"{name}:max_run={named},recent=0", *more]), tmp_path / "a", budget)
    assert sum(len(rows.k) for rows in small.rows) == 4 * int(budget)
    with pytest.raises(InfeasibleError):
        compress(smooth(), "+".join([f"{name}:max_run={named - 1},recent=0", *more]), tmp_path / "a", budget)


def test_a_budget_times_the_limit_below_the_tokens_is_infeasible(tmp_path: Path) -> None:
    """Where nothing need be protected, exactly below."""
    for limit, fits in ((12, True), (11, False)):
        recipe = f"kvmerger:max_run={limit},sink=0,recent=0"
        if fits:
            compress(smooth(), recipe, tmp_path / "a", "10")
        else:
            with pytest.raises(InfeasibleError, match="do not fit"):
                compress(smooth(), recipe, tmp_path / "b", "10")
    assert not (tmp_path / "b").exists()


def test_heads_whose_runs_need_more_get_more() -> None:
    """In a ragged file a head may hold more entries than the limit times an even share."""
    kv = layer(torch.randn(2, 60, 8, generator=torch.Generator().manual_seed(0)))
    kv = replace(kv, pos=torch.where(torch.tensor([[True], [False]]) | (kv.pos < 6), kv.pos, -1))
    asked, stats = ask(8, 60), Stats(attn_mass=torch.rand(2, 60))
    scored = protect(kvmerger_score(kv, stats, asked, max_run=5), kv, asked)
    assert scored.low.tolist()[0] >= 12
    for name in ("uniform", "adakv", "global"):
        count = Recipe.parse(f"kvmerger+allocate={name}").allocate([scored], 16, asked)[0]
        small, _ = kvmerger(kv, stats, scored, count, asked, max_run=5)
        assert small.span is not None and int(small.span.max()) <= 5 and int(small.lens.sum()) == 16


def test_a_longer_limit_of_the_score_than_of_the_reduction_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InfeasibleError, match="max_run=2 "):
        compress(smooth(), "score=kvmerger:max_run=0,recent=0+kvmerger:max_run=2", tmp_path / "a", "12")
    assert not (tmp_path / "a").exists()


# Keys.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pivots_key_stays_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    full = smooth(dtype=dtype)
    small, rotated = (compress(full, f"kvmerger:keys={keys}", tmp_path / keys, "30%") for keys in ("pivot", "rotated"))
    for before, after, other in zip(full.rows, small.rows, rotated.rows, strict=True):
        head = torch.arange(2).repeat_interleave(after.lens)
        assert torch.equal(after.k, before.k.view(2, 120, 8)[head, after.pos.long()])
        assert torch.equal(after.v, other.v) and torch.equal(after.pos, other.pos) and not torch.equal(after.k, other.k)


@pytest.mark.parametrize(
    ("freq", "size", "share"),
    [
        (1.0, 2, 0.8776), (1.0, 3, 0.6935), (1.0, 4, 0.4742), (1.0, 8, 0.1973), (1.0, 16, 0.1290),
        (0.1, 8, 0.9740), (0.1, 32, 0.6250),
    ],
)  # fmt: skip
def test_averaging_rotated_keys_shrinks_them_and_averaging_unrotated_keys_does_not(
    freq: float, size: int, share: float
) -> None:
    """Equal keys before rotation: one that is turned back and averaged is the pivot's own."""
    plain = torch.tensor([3.0, -4.0]).expand(1, size, 2)
    turned = rotate(plain, torch.arange(size).expand(1, -1), torch.tensor([freq]))
    cut, count = runs(size, 1, size)
    stats = Stats(attn_mass=torch.eye(size)[size // 2][None])
    asked = replace(ask(1, size), rope={"head_dim": 2, "inv_freq": [freq]})
    for keys, left in (("rotated", share), ("rerotate", 1.0), ("pivot", 1.0)):
        small, pivot = kvmerger(layer(turned), stats, Scored(cut), count, asked, keys=keys, sigma=1e9)
        assert float(small.k.norm()) == pytest.approx(5 * left, abs=5e-4)
        if keys != "rotated":
            torch.testing.assert_close(small.k[0, 0], turned[0, int(pivot)], atol=2e-6, rtol=0)


def test_keys_turned_back_against_float64(tmp_path: Path) -> None:
    """By the complex numbers of the definition, partial rotation included; entries on their own stay bit for bit."""
    rng = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 60, 8, generator=rng), torch.randn(2, 60, 3, generator=rng)
    cut = torch.rand(2, 60, generator=rng)
    cut[:, 0] = math.inf
    stats = Stats(attn_mass=torch.rand(2, 60, generator=rng))
    kv, count = LayerKV(k, v, layer(k).pos), torch.tensor([20, 20])
    small, pivot = kvmerger(kv, stats, Scored(cut), count, ask(20, 60), keys="rerotate", sigma=2.0)
    angle = torch.arange(60)[:, None] * torch.tensor(FREQ, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)  # [N, 3]
    plain = torch.complex(k[..., :3].double(), k[..., 3:6].double()) / turn
    whole = torch.cat([plain.real, plain.imag, k[..., 6:].double()], -1)
    assert small.span is not None
    for h in range(2):
        ends = small.span[h].cumsum(0).tolist()
        for run, (begin, end) in enumerate(pairwise([0, *ends])):
            p = int(pivot[h, run])
            weight = (-((whole[h, begin:end] - whole[h, p]).norm(dim=-1) ** 2) / 8).exp()
            mean = (weight / weight.sum()) @ whole[h, begin:end]
            back = torch.complex(mean[:3], mean[3:6]) * turn[p]
            expected = torch.cat([back.real, back.imag, mean[6:]])
            torch.testing.assert_close(small.k[h, run].double(), expected, atol=2e-5, rtol=0)
            torch.testing.assert_close(small.v[h, run].double(), (weight / weight.sum()) @ v[h, begin:end].double())
            assert end - begin > 1 or torch.equal(small.k[h, run], k[h, begin])


@pytest.mark.parametrize("freq", [None, [], ["1.0"], [1.0, math.nan], [1.0] * 5, "1.0", 1.0])
def test_without_frequencies_no_key_is_turned_back(freq: object, tmp_path: Path) -> None:
    full = smooth()
    rope = {"rope_type": "longrope", "head_dim": 8, "inv_freq": freq}
    strange = replace(full, meta=replace(full.meta, rope=rope))
    with pytest.raises(InfeasibleError, match="longrope"):
        make_plans(strange, Recipe.parse("kvmerger:keys=rerotate"), [Budget.parse("30%")])
    make_plans(strange, Recipe.parse("kvmerger:keys=pivot"), [Budget.parse("30%")])


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
