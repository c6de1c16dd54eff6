"""CompressKV and HACK: the worked examples of their specifications, and what is peculiar to them."""

import math
from dataclasses import replace

import pytest
import torch
from make import make_profiles, make_snapshot
from torch import Tensor

from kvcli.budget import Budget
from kvcli.errors import FormatError, InfeasibleError
from kvcli.methods.compresskv import compresskv_score, compresskv_share, swept, votes
from kvcli.methods.hack import classes, ends, hack, hack_score, hack_share, sizes
from kvcli.pipeline import make_plans, protect
from kvcli.profiles import numbers
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV, Stats, mask_index, top_mask
from kvcli.window import smooth

PUBLISHED = """
.01841 .01904 .03627 .02814 .02801 .0368 .02606 .03069 .04422 .04262 .04387 .03951 .01815 .04303 .03742 .03771 .03028
.03543 .03463 .03621 .04203 .02521 .03464 .03755 .03399 .02892 .02836 .03191 .02222 .01824 .02336 .00706"""
C256 = """164 168 292 234 233 296 219 252 350 338 346 315 162 340 300 302 249 286 280 292 333 213 280 301 276 239 235
261 191 163 199 83"""
C128 = """89 90 143 118 118 145 112 126 169 163 168 153 88 165 147 148 125 141 138 143 161 109 138 147 136 121 119 130
100 88 104 54"""


def tensor(text: str) -> Tensor:
    return torch.tensor([float(word) for word in text.split()], dtype=torch.float64)


def attending(rows: list[list[float]], heads: int) -> tuple[LayerKV, Stats]:
    """A layer whose query head j gives entry i the attention rows[j][i], in a window of one query behind them all."""
    T = len(rows[0])
    k = torch.eye(T)[None].repeat(heads, 1, 1)
    pos = torch.arange(T, dtype=torch.int32).repeat(heads, 1)
    return LayerKV(k, k, pos), Stats(q_last=torch.tensor(rows).log()[:, None], q_last_pos=torch.tensor([T]))


@pytest.mark.parametrize(
    ("error", "total", "most", "expected"),
    [
        (".1 .2 .3 .4", 400, 300, [59, 86, 114, 141]),
        (".1 .2 .3 .4", 400, 110, [76, 104, 110, 110]),
        (".05 .15 .3 .5", 512, 150, [86, 126, 150, 150]),
        (".7 .1 .1 .1", 400, 120, [120, 94, 93, 93]),
        (".25 .25 .25 .25", 130, 96, [33, 33, 32, 32]),
        (".1 .2 .3 .4", 100, 75, [32, 32, 32, 32]),
        (PUBLISHED, 8192, 768, [int(n) for n in C256.split()]),
        (PUBLISHED, 4096, 384, [int(n) for n in C128.split()]),
    ],
)
def test_layers_share_by_error(error: str, total: int, most: int, expected: list[int]) -> None:
    share = tensor(error)
    low, high = torch.full(share.shape, 32), torch.full(share.shape, most)
    assert swept(share, total, low, high).tolist() == expected


def one_at_a_time(error: Tensor, total: int, low: Tensor, high: Tensor) -> list[int]:
    """The sweep as it is written down."""
    share = (error / error.sum()).tolist()
    room = total - int(low.sum())
    count = [min(max(int(a) + round(e * room), int(a)), int(b)) for e, a, b in zip(share, low, high, strict=True)]
    while (missing := total - sum(count)) != 0:
        order = sorted(range(len(share)), key=lambda i: -share[i] if missing > 0 else share[i])
        able = [i for i in order if (count[i] < high[i] if missing > 0 else count[i] > low[i])]
        if not able:
            break
        for i in able[: abs(missing)]:
            count[i] += 1 if missing > 0 else -1
    return count


def test_many_rounds_at_once_are_the_same_sweep() -> None:
    rng = torch.Generator().manual_seed(0)
    for _ in range(100):
        error = torch.randint(1, 9, (6,), generator=rng).double() ** 2
        low, high = torch.randint(1, 40, (2, 6), generator=rng)
        high = low + high
        total = int(torch.randint(int(low.sum()), int(high.sum()) + 1, (1,), generator=rng))
        assert swept(error, total, low, high).tolist() == one_at_a_time(error, total, low, high)


def test_layers_hold_what_is_protected_and_no_more_than_there_is() -> None:
    def parts(errors: list[float], kept: int, T: int) -> list[Scored]:
        score = torch.zeros(2, T)
        score[:, :kept] = math.inf
        return [Scored(score, torch.tensor([error])) for error in errors]

    ask = Ask(-1, 4, 4 * 2 * 60, 60, 90, 0, 0, 0, 1.0)
    found = compresskv_share(parts([0.0, 0.1, 0.1, 0.8], 40, 90), ask.n, ask)
    assert [count.tolist() for count in found] == [[44] * 2, [53] * 2, [53] * 2, [90] * 2]
    small = Ask(-1, 4, 4 * 2 * 20, 20, 90, 0, 0, 0, 1.0)  # an even share is less than `least`
    assert [c.tolist() for c in compresskv_share(parts([0.1, 0.2, 0.3, 0.4], 5, 90), small.n, small)] == [[20] * 2] * 4


HEAD_ROWS = [
    [1.3, 0.15, 0.1, 0.1, 0.1, 0.1],
    [0.2, 0.1, 0.6, 0.5, 0.2, 0.1],
    [1.6, 0.04, 0.04, 0.04, 0.04, 0.04],
    [0.15, 0.2, 0.2, 0.6, 0.3, 0.15],
]


@pytest.mark.parametrize(
    ("heads", "pooled", "top"),
    [
        (2, [0.1083, 0.2417, 0.3667, 0.4000, 0.3083, 0.1250], [2, 3, 4]),
        (4, [0.3117, 0.3900, 0.2225, 0.2350, 0.1892, 0.0858], [0, 1, 3]),
    ],
)
def test_retrieval_heads_alone_vote(heads: int, pooled: list[float], top: list[int]) -> None:
    # The example's rows are sums over a window: what one query gives adds up to 1.
    rows = [[x / sum(row) for x in row] for row in HEAD_ROWS]
    kv, stats = attending(rows, heads=2)
    ask = Ask(0, 1, 6, 3, 6, 0, 0, 0, 1.0)
    order = [1, 3, 0, 2][:heads]
    mean = sum(torch.tensor(rows[j]) for j in order) / heads
    torch.testing.assert_close(votes(kv, stats, ask, order, 8), mean)
    example = smooth(torch.tensor([HEAD_ROWS[j] for j in order]), 3, "avg").mean(0)
    assert example.tolist() == pytest.approx(pooled, abs=1e-4)
    assert mask_index(top_mask(example[None], torch.tensor([3])))[0].tolist() == top
    known = {"method": "compresskv", "heads": [[0.1, 0.9, 0.0, 0.8]], "errors": [0.25]}
    scored = compresskv_score(kv, stats, replace(ask, profiles={"compresskv": known}), window=1, kernel=3, heads=heads)
    torch.testing.assert_close(scored.score, smooth(mean, 3, "avg").expand(2, 6))
    assert scored.weight is not None and scored.weight.tolist() == [0.25]


def layer(**sizes: int) -> tuple[LayerKV, Stats, Ask]:
    full = make_snapshot(layers=1, **sizes, dtype=torch.float32)
    profiles = make_profiles(full)
    N = full.meta.seq.tokens
    return full.layer(0), full.stats[0], Ask(0, 1, 2 * 20, 20, N, 0, 0, 0, 0.3, profiles=profiles)


def test_heads_that_are_no_retrieval_heads_are_not_read() -> None:
    kv, stats, ask = layer(heads=3, q_heads=6, tokens=50)
    best = torch.tensor(ask.profiles["compresskv"]["heads"][0]).argsort(descending=True)[:2]
    before = compresskv_score(kv, stats, ask, heads=2).score
    assert bool((before == before[0]).all())  # all KV heads of a layer share their entries
    assert stats.q_last is not None
    others = torch.ones(6, dtype=torch.bool).index_fill(0, best, False)
    q = stats.q_last.masked_fill(others[:, None, None], math.nan)
    k = kv.k.clone()
    k[[h for h in range(3) if h not in (best // 2).tolist()]] = math.nan
    again = compresskv_score(replace(kv, k=k), replace(stats, q_last=q), ask, heads=2).score
    assert torch.equal(before, again)


def test_positions_vote_where_heads_hold_different_entries() -> None:
    kv, stats, ask = layer(heads=2, q_heads=2, tokens=50)
    some = torch.stack([torch.arange(0, 50, 2), torch.arange(25, 50)]).int()
    part = LayerKV(*(x.gather(1, some.long()[..., None].expand(-1, -1, 8)) for x in (kv.k, kv.v)), some)
    score = compresskv_score(part, stats, ask, heads=2, kernel=1).score
    shared = [pos for pos in range(26, 46) if pos % 2 == 0]
    assert score[0, [pos // 2 for pos in shared]].tolist() == score[1, [pos - 25 for pos in shared]].tolist()
    assert bool((score[:, some[0] >= 46][0] == 0).all())


def test_a_profile_of_another_shape_or_layer_is_refused() -> None:
    profile = {"method": "hack", "sigma": [[0.1, 0.2], None, [0.1, "x"], [0.1], [math.nan, 0.2]]}
    assert numbers(profile, "sigma", [0], 2) == [[0.1, 0.2]]
    with pytest.raises(InfeasibleError, match="not calibrated for layer 1"):
        numbers(profile, "sigma", [0, 1], 2)
    for at in (2, 3, 4, 5):
        with pytest.raises(FormatError):
            numbers(profile, "sigma", [at], 2)
    with pytest.raises(FormatError, match="no heads"):
        numbers(profile, "heads", [0], 2)


def test_classes_by_the_least_variation_of_all_layers() -> None:
    sigma = torch.tensor([[0.1, 0.4], [0.3, 0.2]])
    assert classes(sigma, 0.5).tolist() == [[False, True], [True, False]]
    assert classes(sigma, 0.0).all() and not classes(sigma, 1.0).any()
    assert classes(torch.zeros(2, 2), 0.5).tolist() == [[False, False], [True, True]]


def test_sizes_of_the_two_classes() -> None:
    def ask(B: int, N: int, sink: int = 0) -> Ask:
        return Ask(0, 2, 4 * B, B, N, sink, 0, 0, 1.0)

    assert sizes(ask(340, 680), 0.5, 5.0) == pytest.approx((113.333, 566.667), abs=1e-3)
    assert sizes(ask(300, 1000), 0.5, 5.0) == pytest.approx((100, 500))  # 10 % and 50 % at 30 %
    assert sizes(ask(600, 680), 0.5, 5.0) == pytest.approx((520, 680))  # no more than there is
    assert sizes(ask(12, 680, sink=6), 0.5, 5.0) == pytest.approx((6, 18))  # no fewer than are protected
    assert sizes(ask(12, 680), 0.0, 5.0) == sizes(ask(12, 680), 1.0, 5.0) == (12, 12)


SCALES = torch.tensor([[0, 1, 4, 0], [1, 5, 4, 1], [5, 9, 4, 2], [9, 14, 4, 3]], dtype=torch.int32)
MASS = [0.2, 0.1, 0.05, 0.3, 0.01, 0.4, 0.02, 0.03, 0.5, 0.1, 0.2, 0.05, 0.07, 0.09]


def scaled(B: int, segments: Tensor | None = SCALES) -> tuple[LayerKV, Stats, Ask]:
    """Two heads, the first contextual, that both give the entries the attention MASS."""
    rows = torch.tensor([MASS] * 2)
    k = torch.eye(14)[None].repeat(2, 1, 1)
    kv = LayerKV(k, k, torch.arange(14, dtype=torch.int32).repeat(2, 1))
    stats = Stats(q_probe=(rows / rows.sum(1, keepdim=True)).log()[:, None], q_probe_pos=torch.tensor([14]))
    known = {"hack": {"method": "hack", "sigma": [[0.1, 0.9]]}}
    return kv, stats, Ask(0, 1, 2 * B, B, 14, 0, 0, 0, 1.0, segments=segments, profiles=known)


def test_structural_heads_keep_the_first_and_last_scales() -> None:
    kv, stats, ask = scaled(8)
    scored = hack_score(kv, stats, ask, ratio=3.0)  # 4 and 12 entries
    assert scored.score[1].isposinf().tolist() == [True] * 5 + [False] * 4 + [True] * 5
    assert not scored.score[0].isposinf().any() and scored.note == ""
    count = hack_share([scored], 16, ask, ratio=3.0)[0]
    assert count.tolist() == [4, 12]
    kept = mask_index(top_mask(scored.score, torch.tensor([3, 12])))
    assert kept[0, :3].tolist() == [3, 5, 8] and kept[1].tolist() == [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]


def test_too_few_for_both_ends_keep_the_first_and_the_most_attended_of_the_last() -> None:
    kv, stats, ask = scaled(4)
    scored = hack_score(kv, stats, ask, ratio=7.0)  # 1 and 7 entries
    assert mask_index(scored.score.isposinf())[1].tolist() == [0, 1, 2, 3, 4, 9, 10]
    assert "no room" in scored.note
    assert hack_share([scored], 8, ask, ratio=7.0)[0].tolist() == [1, 7]
    tiny = hack_score(kv, stats, scaled(2)[2], ratio=3.0)  # 1 and 3
    assert mask_index(tiny.score.isposinf())[1].tolist() == [0, 1, 2]


def test_what_the_pipeline_protects_counts_within_the_ends() -> None:
    kv, stats, ask = scaled(4)
    ask = replace(ask, sink=1, recent=2)
    scored = protect(hack_score(kv, stats, ask, ratio=7.0), kv, ask)  # 3 and 5
    assert mask_index(scored.score.isposinf()).tolist() == [[0, 12, 13, -1, -1], [0, 1, 2, 12, 13]]
    assert hack_share([scored], 8, ask, ratio=7.0)[0].tolist() == [3, 5]


def test_documents_without_segments_have_ends_too() -> None:
    _, _, ask = scaled(8, None)
    assert ends(ask)[:2] == (4, -18) and "no segments are known" in ends(ask)[2]
    assert "fewer than three" in ends(scaled(8, SCALES[:2])[2])[2]
    assert ends(scaled(8, SCALES.flip(0))[2]) == (5, 9, "")


def test_what_floors_leave_goes_to_the_most_structural_heads() -> None:
    sigma = torch.tensor([[0.1, 0.4, 0.3], [0.3, 0.2, 0.9]])
    parts = [Scored(torch.zeros(3, 50), torch.stack([(row > 0.25).float(), row])) for row in sigma]
    ask = Ask(-1, 2, 60, 10, 50, 0, 0, 0, 1.0)
    found = hack_share(parts, 60, ask)  # 10 / (1/3 + 5 * 2/3) = 2.73 and 13.64: floors leave 60 - 4 - 52 = 4
    assert [count.tolist() for count in found] == [[2, 14, 14], [14, 2, 14]]
    found = hack_share(parts, 58, ask)
    assert [count.tolist() for count in found] == [[2, 14, 13], [13, 2, 14]]


def test_dropped_entries_join_the_nearest_key_of_contextual_heads() -> None:
    k = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.8, 0.6]]).repeat(2, 1, 1)
    kv = LayerKV(k, 10 * k, torch.arange(3, dtype=torch.int32).repeat(2, 1))
    scored = Scored(torch.tensor([[3.0, 2.0, 1.0]]).repeat(2, 1), torch.tensor([[0.0, 1.0], [0.1, 0.9]]))
    small, pivot = hack(kv, Stats(), scored, torch.tensor([2, 2]), scaled(8)[2])
    assert small.k[0].flatten().tolist() == pytest.approx([0.95, 0.15, 0, 1])
    assert small.v[0].flatten().tolist() == pytest.approx([9.5, 1.5, 0, 10])
    assert torch.equal(small.k[1], k[1, :2]) and pivot.tolist() == [[0, 1]] * 2
    assert small.span is not None and small.span.tolist() == [[2, 1], [1, 1]]
    plain, _ = hack(kv, Stats(), scored, torch.tensor([2, 2]), scaled(8)[2], merge=False)
    assert torch.equal(plain.k, k[:, :2]) and plain.span is None


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_one_class_alone_is_even(alpha: float) -> None:
    full = make_snapshot(layers=2, heads=3, q_heads=3, tokens=60)
    make_profiles(full)
    plan = make_plans(full, Recipe.parse(f"hack:alpha={alpha}"), [Budget.parse("30%")])[0]
    assert [count.tolist() for count in plan.outline.counts] == [[18] * 3] * 2


@pytest.mark.parametrize("budget", ["90%", "50%", "35%", "20%", "10%", "5%"])
@pytest.mark.parametrize(("heads", "tokens"), [(1, 300), (2, 300), (8, 300), (3, 4000)])
@pytest.mark.parametrize("recipe", ["compresskv", "hack"])
def test_any_budget(recipe: str, heads: int, tokens: int, budget: str) -> None:
    full = make_snapshot(layers=2, heads=heads, q_heads=2 * heads, tokens=tokens, dim=8)
    make_profiles(full)
    plan = make_plans(full, Recipe.parse(recipe), [Budget.parse(budget)])[0]
    each = int(float(budget[:-1]) * tokens / 100)
    assert plan.outline.entries == 2 * heads * each
