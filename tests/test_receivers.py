"""Methods by which entries that stay take up those that go: the worked examples of LOOK-M, D2O, WeightedKV and CaM."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make import make_snapshot, same, shrunk
from torch import Tensor

from kvcli.budget import Budget
from kvcli.errors import UsageError
from kvcli.methods.cam import cam
from kvcli.methods.d2o import d2o, d2o_score, d2o_share
from kvcli.methods.lookm import lookm
from kvcli.methods.weightedkv import weightedkv
from kvcli.pipeline import make_plans, protect
from kvcli.receivers import Receivers, alike, average, fold, receive, split
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored, named
from kvcli.snapshot import LayerKV, Stats, gather

# k_c, k_1, k_2 of the examples, the first of which takes up the others.
KEYS = torch.tensor([[[1.0, 0], [2, 0], [0, 3]]])
ONE = Receivers(torch.tensor([[0]]), torch.tensor([[1, 2]]), torch.tensor([[0, 0]]))
COSINE = torch.tensor([[0.9, 0.6]])


def layer(k: Tensor, v: Tensor | None = None) -> LayerKV:
    return LayerKV(k, k if v is None else v, torch.arange(k.shape[1], dtype=torch.int32).repeat(len(k), 1))


def ask(B: int, N: int, L: int = 1, sink: int = 0, recent: int = 0, seed: int = 0) -> Ask:
    return Ask(0, L, L * B, B, N, sink, recent, 0, 1.0, seed=seed)


def random(H: int = 3, T: int = 65, D: int = 8, lens: list[int] | None = None) -> LayerKV:
    k, v = torch.randn(2, H, T, D, generator=torch.Generator().manual_seed(1))
    real = torch.arange(T) < torch.tensor(lens or [T] * H)[:, None]
    kv = layer(k.masked_fill(~real[..., None], math.nan), v.masked_fill(~real[..., None], math.nan))
    return replace(kv, pos=kv.pos.masked_fill(~real, -1))


def reduced(method: Any, kv: LayerKV, stays: list[int], **options: Any) -> LayerKV:
    """What a reducer makes of a head whose entries `stays` are to stay; options `mass` and `how` are its input."""
    T, mass = kv.pos.shape[1], options.pop("mass", None)
    score = torch.zeros(len(kv.k), T).index_fill(1, torch.tensor(stays), 1.0)
    stats = Stats(attn_mass=None if mass is None else torch.tensor([mass]))
    how = options.pop("how", ask(len(stays), T))
    count = torch.full((len(kv.k),), len(stays))
    small, pivot = method(kv, stats, Scored(score), count, how, **options)
    assert pivot.tolist() == [stays] * len(kv.k) and small.lens.tolist() == count.tolist()
    return small  # type: ignore[no-any-return]


def close(got: Tensor, want: Any, places: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), atol=places, rtol=0)


# LOOK-M and D2O: the nearest key takes up what goes.


def test_worked_averages() -> None:
    kv = layer(KEYS)
    close(average(kv, ONE, 1.0).k, [[[1.0, 1.0]]])
    close(average(kv, ONE, 0.5).k, [[[1.0, 0.5]]])
    small = fold(kv, ONE, COSINE, torch.ones(1, 1), 1 + ONE.size)
    close(small.k, [[[0.93333, 0.6]]])
    close(small.v, [[[0.93333, 0.6]]])
    assert ONE.size.tolist() == [[2]]


@pytest.mark.parametrize(
    ("eps", "weights", "own"), [(0.1, (0.56133, 0.41585), 0.02282), (math.e, (0.35137, 0.26030), 0.38833)]
)
def test_worked_weights_of_the_paper_of_d2o(eps: float, weights: tuple[float, float], own: float) -> None:
    kv, weight = layer(KEYS, torch.eye(3)[None]), COSINE.exp()
    total = eps + ONE.total(weight)
    small = fold(kv, ONE, weight, torch.full((1, 1), eps), total)
    close(small.v, [[[own, *weights]]])
    assert float(small.v.sum()) == pytest.approx(1)


def test_the_pivotal_mean_is_half_way_to_the_plain_one() -> None:
    kv = random()
    plain, pivotal = (reduced(lookm, kv, [*range(0, 65, 3)], merge=merge) for merge in ("averaged", "pivotal"))
    kept = gather(kv, torch.arange(0, 65, 3).repeat(3, 1))
    for name in ("k", "v"):
        torch.testing.assert_close(getattr(pivotal, name), (getattr(kept, name) + getattr(plain, name)) / 2)


@pytest.mark.parametrize("method", [lookm, d2o])
def test_each_goes_to_the_key_most_like_it(method: Any) -> None:
    angle = torch.tensor([0.0, 90, 8, 80, 200]).deg2rad()
    kv = layer(torch.stack([angle.cos(), angle.sin()], -1)[None], torch.eye(5)[None])
    options = {"merge": "averaged"} if method is lookm else {"merge": "paper", "heavy": 1.0}
    small = reduced(method, kv, [0, 1], **options)
    taken = [[1, 0, 1, 0, 0], [0, 1, 0, 1, int(method is lookm)]]  # D2O drops what is less alike than the mean
    assert (small.v[0] > 0).int().tolist() == taken
    assert small.span is not None and small.span.tolist() == [[2, 3 if method is lookm else 2]]


@pytest.mark.parametrize("recipe", ["lookm", "lookm:merge=averaged", "lookm:merge=weighted", "d2o", "d2o:merge=paper"])
def test_equal_entries_merge_to_themselves(recipe: str) -> None:
    kv = layer(torch.tensor([1.5, -0.75, 3]).expand(2, 40, 3))
    step = Recipe.parse(recipe).reduce
    small, _ = step(kv, Stats(), Scored(torch.rand(2, 40)), torch.tensor([7, 9]), ask(8, 40))
    torch.testing.assert_close(small.k[small.real], kv.k[0, :16])
    assert small.span is not None and small.span.sum(1).tolist() == [40, 40]


@pytest.mark.parametrize("recipe", ["lookm", "d2o:merge=paper", "weightedkv", "weightedkv:mode=sequential"])
def test_what_takes_up_nothing_is_copied_bit_for_bit(recipe: str) -> None:
    kv, stats = random(), Stats(attn_mass=torch.rand(3, 65, generator=torch.Generator().manual_seed(6)))
    for part in (kv.k, kv.v):
        part[:, 30:40] = -part[:, 30:40].abs() * 0
    score = torch.arange(65.0).remainder(3).add(torch.arange(65) > 20).repeat(3, 1)
    small, pivot = Recipe.parse(recipe).reduce(kv, stats, Scored(score), torch.tensor([45] * 3), ask(45, 65))
    kept = gather(kv, pivot)
    assert small.span is not None
    alone = small.span == 1
    assert bool((alone & (kept.k == 0).all(-1)).any()) and 9 < int((~alone).sum()) <= 60
    for name in ("k", "v"):
        one, other = (getattr(part, name)[alone].view(torch.int32) for part in (small, kept))
        assert torch.equal(one, other)
    assert not (small.v == kept.v).all(-1)[~alone & (kept.v != 0).all(-1)].any()


def test_only_what_is_no_less_alike_than_the_mean_joins() -> None:
    cosine = torch.tensor([[0.9, 0.1, 0.5], [0.2, 0.3, 0.0]])
    to = Receivers(
        torch.zeros(2, 1).long(), torch.tensor([[1, 2, 3], [1, 2, -1]]), torch.tensor([[0, 0, 0], [0, 0, -1]])
    )
    assert alike(to, cosine, "head").at.tolist() == [[0, -1, 0], [-1, 0, -1]]  # means .5 and .25
    assert alike(to, cosine, "layer").at.tolist() == [[0, -1, 0], [0, -1, -1]]  # .55, .2, .5 against .4


def test_d2o_without_its_merging_is_h2o(monkeypatch: pytest.MonkeyPatch) -> None:
    full = make_snapshot(tokens=90, dtype=torch.float32)
    kv, stats, how = full.layer(0), full.stats[0], ask(30, 90, sink=3, recent=5)
    count = torch.tensor([30, 30])
    scored = protect(d2o_score(kv, stats, how), kv, how)
    monkeypatch.setattr("kvcli.methods.d2o.alike", lambda to, cosine, by: to.only(cosine > math.inf))
    small, _ = d2o(kv, stats, scored, count, how)
    other = protect(named("h2o")["score"](kv, stats, how), kv, how)
    wanted, _ = named("evict")["reduce"](kv, stats, other, count, how)
    same(replace(small, span=None), wanted)
    assert small.span is not None and bool((small.span == 1).all())


def test_the_newest_part_of_d2o_follows_the_size_of_a_head() -> None:
    kv = random()
    scored = Scored(-torch.arange(65.0).repeat(3, 1))
    for heavy in (0.25, 0.5, 1.0):
        small, _ = d2o(kv, Stats(), scored, torch.tensor([4, 8, 20]), ask(8, 65), heavy=heavy)
        for pos, n in zip(small.pos.tolist(), (4, 8, 20), strict=True):
            best = int(heavy * n)
            assert pos[:n] == [*range(best), *range(65 - n + best, 65)]


def test_d2o_keeps_what_must_stay_before_the_newest() -> None:
    score = torch.rand(3, 65).index_fill(1, torch.tensor([1, 5, 9, 30, 31]), math.inf)
    small, _ = d2o(random(), Stats(), Scored(score), torch.tensor([5, 6, 7]), ask(6, 65), heavy=0.0)
    assert [row[:n] for row, n in zip(small.pos.tolist(), (5, 6, 7), strict=True)] == [
        [1, 5, 9, 30, 31],
        [1, 5, 9, 30, 31, 64],
        [1, 5, 9, 30, 31, 63, 64],
    ]


# The layers of D2O.


def counts(L: int, N: int, B: int, **options: Any) -> tuple[list[int], list[Scored]]:
    how = ask(B, N, L, sink=min(4, B // 8), recent=min(32, B // 4))
    full = make_snapshot(layers=L, tokens=N)
    scored = [protect(d2o_score(full.layer(i), full.stats[i], how, **options), full.layer(i), how) for i in range(L)]
    shared = d2o_share(scored, L * 2 * B, how, **options)
    assert all(bool((count == count[0]).all()) for count in shared)
    assert sum(int(count.sum()) for count in shared) == L * 2 * B
    return [int(count[0]) for count in shared], scored


def test_some_layers_stay_whole_and_the_others_pay() -> None:
    got, scored = counts(32, 200, 70, layer="variance")
    assert [got[i] for i in (0, 1, 31)] == [200] * 3
    assert sum(got[2:31]) / 29 / 200 == pytest.approx(0.283, abs=1e-3)
    assert not any(part.note for part in scored)


@pytest.mark.parametrize(("L", "B"), [(32, 18), (32, 28), (2, 100), (3, 180)])
def test_where_none_can_stay_whole_it_is_told(L: int, B: int) -> None:
    got, scored = counts(L, 200, B)
    assert max(got) < 200
    assert all("not kept whole" in part.note for part in scored)
    got, scored = counts(L, 200, B, layer="uniform")
    assert got == [B] * L and not any(part.note for part in scored)


def test_layers_of_even_attention_get_more() -> None:
    variance = torch.tensor([[1.0, 3.0], [2.0, 2.0], [0.0, 400.0], [7.0, 7.0]])
    scored = [Scored(torch.rand(2, 100), weight=part) for part in variance]
    even = torch.tensor([-0.5, 0.0, -0.5, 0.0]).softmax(0) * 4 * 20
    got = d2o_share(scored, 160, ask(20, 100, 4, recent=20), layer="code")
    assert [int(part[0]) for part in got] == [round(x) for x in even.tolist()] == [15, 25, 15, 25]
    got = d2o_share(scored, 160, ask(20, 100, 4, recent=20), layer="variance")
    wide = (-variance.mean(1) / 100).softmax(0) * 4 * 20
    assert [int(part[0]) for part in got] == pytest.approx(wide.tolist(), abs=1)
    assert int(got[2][0]) < min(int(got[i][0]) for i in (0, 1, 3))


def test_the_variance_of_a_head_is_over_its_own_entries() -> None:
    kv = random(2, 6, 4, [6, 3])
    scored = d2o_score(kv, Stats(attn_mass=torch.tensor([[1.0, 2, 3, 4, 5, 6], [1, 1, 4, 99, 99, 99]])), ask(3, 6))
    assert scored.weight is not None
    close(scored.weight, [35 / 12, 2.0])


# WeightedKV.


def folded(received: list[float], stays: list[int], mode: str, v: Tensor | None = None) -> Tensor:
    """Values after WeightedKV, for mean attention `received`; the shares of each entry by default."""
    T = len(received)
    mass = [a * (T - i) for i, a in enumerate(received)]
    kv = layer(random(1, T).k, torch.eye(T)[None] if v is None else v)
    score = torch.tensor([received]).index_fill(1, torch.tensor(stays), math.inf)
    small, pivot = weightedkv(
        kv, Stats(attn_mass=torch.tensor([mass])), Scored(score), torch.tensor([len(stays)]), ask(1, T), mode=mode
    )
    assert pivot.tolist() == [stays] and torch.equal(small.k, kv.k[:, stays])
    return small.v[0]


@pytest.mark.parametrize("mode", ["run", "sequential"])
def test_worked_values_of_weightedkv(mode: str) -> None:
    close(folded([0.3, 0.1, 0.5], [0, 2], mode), [[1, 0, 0], [0, 1 / 6, 5 / 6]])
    shares = {"run": [0.2, 0.3, 0.5], "sequential": [0.15, 0.225, 0.625]}
    close(folded([0.2, 0.3, 0.5], [2], mode), [shares[mode]])
    close(folded([0.2, 0.0, 0.0], [0, 2], mode), [[1, 0, 0], [0, 0.5, 0.5]])
    close(folded([0.2, 0.1, 0.5], [0], mode), [[1, 0, 0]])  # nothing follows: they are lost
    close(folded([0.2, 0.1, 0.5, 0.4], [1], mode), [[2 / 3, 1 / 3, 0, 0]])


def test_values_that_are_handed_on_one_after_another() -> None:
    received = torch.rand(40, generator=torch.Generator().manual_seed(3))
    stays = [3, 11, 12, 30]
    v, alive = torch.eye(40), [*range(40)]
    for e in received.index_fill(0, torch.tensor(stays), 9.0).argsort()[:36].tolist():
        here = alive.index(e)
        alive.remove(e)
        if here < len(alive):
            right = alive[here]
            v[right] = (received[e] * v[e] + received[right] * v[right]) / (received[e] + received[right])
    assert alive == stays
    close(folded(received.tolist(), stays, "sequential"), v[stays].tolist())


@pytest.mark.parametrize("mode", ["run", "sequential"])
def test_values_stay_in_the_hull_of_their_run(mode: str) -> None:
    v = torch.rand(1, 90, 5, generator=torch.Generator().manual_seed(2))
    received = torch.rand(90, generator=torch.Generator().manual_seed(4)).tolist()
    stays, begin = [7, 8, 40, 89], 0
    got = folded(received, stays, mode, v)
    for row, last in zip(got, stays, strict=True):
        low, high = v[0, begin : last + 1].aminmax(dim=0)
        assert bool(((row >= low - 1e-6) & (row <= high + 1e-6)).all())
        begin = last + 1
    close(folded(received, stays, mode, torch.full((1, 90, 2), 0.3)), [[0.3, 0.3]] * 4)


# CaM.

MASS = [5, 1.2, 0.9, 0.6, 0.8, 0.5]


@pytest.mark.parametrize(
    ("gone", "against", "chance"), [(1, "mean", 1.0), (3, "mean", 0.92308), (1, "max", 0.24), (3, "max", 0.12)]
)
def test_worked_chances_of_cam(gone: int, against: str, chance: float) -> None:
    kv, stays = layer(torch.eye(6)[None]), [i for i in range(6) if i != gone]
    options = {"mass": MASS, "window": 2, "against": against, "mode": "expected", "how": ask(5, 6, sink=1)}
    want = torch.eye(6)[stays]
    want[gone : gone + 2, gone] = chance / 2
    close(reduced(cam, kv, stays, **options).v[0], want.tolist())
    small = reduced(cam, kv, stays, **options, normalize=True)
    close(small.v[0], (want / want.sum(1, keepdim=True)).tolist())
    assert torch.equal(small.k, kv.k[:, stays])


def test_values_are_neither_lost_nor_made_where_all_windows_are_full() -> None:
    kv = random(2, 400, 8)
    stays = [*range(0, 380, 7), *range(380, 400)]
    mass = (torch.arange(400) % 7 > 0) * 9.0 + 1  # what goes is attended more than what stays
    stats, score = Stats(attn_mass=mass.repeat(2, 1)), torch.zeros(2, 400).index_fill(1, torch.tensor(stays), 1.0)
    small, _ = cam(kv, stats, Scored(score), torch.tensor([75, 75]), ask(75, 400), window=5)
    torch.testing.assert_close(small.v.sum(1), kv.v.sum(1), atol=1e-4, rtol=1e-5)
    for window in (1, 5, 64):
        small, _ = cam(kv, stats, Scored(score), torch.tensor([75, 75]), ask(75, 400), window=window, mode="expected")
        want = kv.v[:, stays].double()
        for e in sorted({*range(400)} - {*stays}):
            to = [j for j, stay in enumerate(stays) if stay > e][:window]
            chance = min(1.0, float(mass[e] / mass[stays][to].mean()))
            want[:, to] += chance * kv.v[:, e, None].double() / len(to)
        torch.testing.assert_close(small.v.double(), want, atol=2e-5, rtol=1e-5)


def test_receivers_of_cam_near_an_end() -> None:
    kv = layer(torch.eye(6)[None])
    options: dict[str, Any] = {"mass": [1.0] * 6, "mode": "expected"}
    close(reduced(cam, kv, [0, 1, 4], window=9, **options).v[0, :, 2:4], [[0.0, 0], [0, 0], [1, 1]])
    sinks = reduced(cam, kv, [1, 3, 5], window=2, how=ask(3, 6, sink=2), **options)
    close(sinks.v[0, :, 0], [0.0, 0.5, 0.5])  # the first token, here gone, would go to a sink


def test_unattended_entries_change_nothing() -> None:
    kv = random(1, 30)
    small = reduced(cam, kv, [*range(0, 30, 2)], mass=[1.0, 0.0] * 15)
    assert torch.equal(small.v, kv.v[:, ::2])
    small = reduced(cam, kv, [*range(0, 30, 2)], mass=[0.0, 1.0] * 15, mode="expected", window=1)
    close(small.v[0, 1:], (kv.v[0, 2::2] + kv.v[0, 1:28:2]).tolist())


def test_lots_tend_to_the_expected_and_differ_by_head_layer_and_seed() -> None:
    v = torch.ones(2, 60, 1)
    mass = torch.rand(60, generator=torch.Generator().manual_seed(5)).repeat(2, 1)
    score = torch.arange(60).remainder(3).eq(2).float().repeat(2, 1)

    def run(mode: str, seed: int, at: int = 0) -> Tensor:
        how = replace(ask(20, 60, seed=seed), layer=at)
        args = (layer(torch.ones(2, 60, 4), v), Stats(attn_mass=mass), Scored(score), torch.tensor([20, 20]), how)
        return cam(*args, window=2, mode=mode)[0].v[..., 0]  # type: ignore[no-any-return]

    drawn = torch.stack([run("sample", seed) for seed in range(400)])
    torch.testing.assert_close(drawn.mean(0), run("expected", 0), atol=0.12, rtol=0)
    assert torch.equal(run("sample", 7), drawn[7])
    assert not torch.equal(drawn[0, 0], drawn[0, 1]) and not torch.equal(drawn[0], run("sample", 0, at=1))


def test_lots_do_not_follow_a_score_that_is_drawn() -> None:
    kv, stats = layer(torch.ones(1, 2000, 2)), Stats(attn_mass=torch.full((1, 2000), 0.5))
    how = ask(1000, 2000)
    scored = named("random")["score"](kv, stats, how)
    kept = split(kv, scored, torch.tensor([1000]))[0][0]
    stats.attn_mass[:, kept] = 1.0  # type: ignore[index]
    small, _ = cam(kv, stats, scored, torch.tensor([1000]), how, window=1)
    assert float(small.v[0, :, 0].sum()) == pytest.approx(1500, abs=60)


def test_cam_alone_has_no_score() -> None:
    with pytest.raises(UsageError) as caught:
        Recipe.parse("cam")
    assert "names no score" in caught.value.what and caught.value.fix == "put one before it: snapkv+cam"


# All of them.

ALL = ["lookm", "d2o", "weightedkv", "weightedkv:mode=sequential", "h2o+cam", "d2o:layer=variance,filter=layer"]


@pytest.mark.parametrize("recipe", ALL)
@pytest.mark.parametrize("H", [1, 2, 3, 8])
def test_any_budget_and_number_of_heads(recipe: str, H: int, tmp_path: Path) -> None:
    full = make_snapshot(layers=4, heads=H, q_heads=H, tokens=300)
    for budget in ("90%", "50%", "35%", "20%", "10%", "5%"):
        small = shrunk(full, recipe, tmp_path / "a", budget)
        assert sum(len(rows.k) for rows in small.rows) == 4 * H * Budget.parse(budget).per_head(300, 1, int)
        assert all(part.isfinite().all() for rows in small.rows for part in (rows.k, rows.v))


@pytest.mark.parametrize("recipe", ["lookm:merge=averaged", "weightedkv", "weightedkv:mode=sequential"])
def test_spans_of_a_compressed_layer_add_up(recipe: str) -> None:
    rows = make_snapshot(heads=3, q_heads=3, tokens=60, ragged=True, bias=True, dtype=torch.float32)
    kv, stats, how = rows.layer(0), rows.stats[0], ask(6, 60, recent=2)
    kv = replace(
        kv, pos=kv.pos.clamp(max=57), bias=None if kv.bias is None else kv.bias.masked_fill(~kv.real, math.nan)
    )
    scored = protect(Scored(kv.pos.float()), kv, how)
    count = kv.lens.clamp(max=6)
    small, pivot = Recipe.parse(recipe).reduce(kv, stats, scored, count, how)
    assert small.span is not None and kv.span is not None and small.bias is not None and kv.bias is not None
    assert torch.equal(small.span.sum(1), kv.span.sum(1))
    kept = kv.bias.gather(1, pivot.clamp(min=0))
    if "weightedkv" in recipe:  # keys are those of the receivers, and so is their bias
        assert torch.equal(small.bias[small.real], kept[small.real])
        return
    to, _ = receive(kv, scored, count)
    for h, j in small.real.nonzero().tolist():
        members = [int(pivot[h, j]), *to.gone[h][to.at[h] == j].tolist()]
        assert float(small.bias[h, j]) == pytest.approx(float(kv.bias[h, members].exp().mean().log()), abs=1e-5)


def test_the_fallback_of_d2o_is_told_once(tmp_path: Path) -> None:
    plan = make_plans(make_snapshot(layers=5, tokens=100), Recipe.parse("d2o"), [Budget.parse("20%")])[0]
    assert len(plan.notes) == 1 and plan.notes[0].startswith("layers 0-4: not kept whole")
