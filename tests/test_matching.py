"""Attention matching: the oracles of its specification, the gate, and which queries it is fitted to."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from make import make_snapshot, shrunk
from test_architectures import IDS, MORE
from torch import Tensor

from kvcli.errors import InfeasibleError, UsageError
from kvcli.fitting import RHOS, Sight, _within, masses, match, penalty, ridges, values
from kvcli.methods.matching import matching
from kvcli.model.load import Model
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix, logits
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored, named
from kvcli.snapshot import LayerKV, Stats

FREQ = [1.0, 0.1, 0.01]
WEAK = [1e-15]  # a ridge that is only what Cholesky needs
D = 64
QUERIES: tuple[Any, ...] = ("auto", "repeat", "context")


def rand(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def no_sink(n: int) -> Tensor:
    return torch.full((n,), -math.inf, dtype=torch.float64)


def held(n: int) -> Tensor:
    return torch.arange(n) % 4 == 1


def attend(logit: Tensor, v: Tensor) -> Tensor:
    return logit.softmax(1) @ v


def clusters(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:  # -> [600, T], [T, D], [t]
    """The specification's head, 512 keys in 24 clusters: 400 queries and 200 fresh ones; the most attended 10 %."""
    rng = torch.Generator().manual_seed(seed)
    centre, mean = torch.randn(2, 24, D, generator=rng, dtype=torch.float64)
    of, near = torch.randint(24, (512,), generator=rng), torch.randint(24, (600,), generator=rng)
    off = torch.randn(3, 600, D, generator=rng, dtype=torch.float64)
    k, v, q = centre[of] + off[0, :512] / 2, mean[of] + off[1, :512] / 2, centre[near] + off[2]
    logit = q @ k.mT / 8
    return logit, v, logit[:400].softmax(1).amax(0).topk(51).indices.sort().values


def relative(sight: Sight, beta: Tensor, v: Tensor) -> float:
    off = (sight.weights(beta) @ v - sight.out).norm(dim=1)
    return float((off / sight.out.norm(dim=1)).mean())


def log_mass(sight: Sight, beta: Tensor) -> float:
    return float((sight.log + beta).logsumexp(1).abs().mean())


def halves(n: int, seed: int = 0) -> tuple[Sight, Sight, Tensor]:
    """What the first n queries and 200 fresh ones see of the clusters, and the values that stay."""
    logit, v, kept = clusters(seed)
    seen, fresh = (Sight.of(part, v, kept, no_sink(len(part))) for part in (logit[:n], logit[400:]))
    return seen, fresh, v[kept]


# Exactness.


def test_all_that_stays_is_itself() -> None:
    q, k, v = rand(60, D, seed=0), rand(20, D, seed=1), rand(20, 5, seed=2)
    sight = Sight.of(q @ k.mT / 8, v, torch.arange(20), no_sink(60))
    beta, new = match(sight, held(60), v)
    assert not bool(beta.any()) and new is v
    for rhos in (RHOS, WEAK):
        for beta in masses(sight, rhos, 3.0):
            assert float(beta.abs().max()) < 1e-9
            for new in values(sight, beta, v, rhos):
                torch.testing.assert_close(new, v, atol=1e-9, rtol=0)


@pytest.mark.parametrize("size", [[4] * 12, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]])
def test_duplicates_get_the_log_of_their_number_and_new_tokens_see_no_difference(size: list[int]) -> None:
    """Of equal numbers of each the output alone is right without any mass: fresh tokens show that it is missing."""
    q, k, v, times = rand(200, D, seed=0), rand(12, D, seed=1), rand(12, 5, seed=2), torch.tensor(size)
    kept = times.cumsum(0) - times
    logit, value = (q @ k.mT / 8).repeat_interleave(times, 1), v.repeat_interleave(times, 0)
    beta, new = match(Sight.of(logit, value, kept, no_sink(200)), held(200), v, WEAK)
    torch.testing.assert_close(beta, times.double().log(), atol=1e-9, rtol=0)
    torch.testing.assert_close(new, v, atol=1e-9, rtol=0)
    fresh, added = rand(50, D, seed=3), rand(7, 5, seed=4)
    late = fresh @ rand(7, D, seed=5).mT / 8
    all_of_it = torch.cat([(fresh @ k.mT / 8).repeat_interleave(times, 1), late], 1)
    small = torch.cat([fresh @ k.mT / 8 + beta, late], 1)
    expected = attend(all_of_it, torch.cat([value, added]))
    torch.testing.assert_close(attend(small, torch.cat([new, added])), expected, atol=1e-9, rtol=0)
    plain = torch.cat([fresh @ k.mT / 8, late], 1)
    assert float((attend(plain, torch.cat([v, added])) - expected).abs().max()) > 0.1


def test_mass_that_no_entry_receives_is_not_fitted() -> None:
    q, k, v, times = rand(200, D, seed=0), rand(12, D, seed=1), rand(12, 5, seed=2), torch.arange(1, 13)
    logit, sink = (q @ k.mT / 8).repeat_interleave(times, 1), rand(200, seed=6) + 4
    sight = Sight.of(logit, v.repeat_interleave(times, 0), times.cumsum(0) - times, sink)
    whole = torch.cat([logit, sink[:, None]], 1).softmax(1)[:, :-1] @ v.repeat_interleave(times, 0)
    torch.testing.assert_close(sight.out, whole)
    beta, new = match(sight, held(200), v, WEAK)
    torch.testing.assert_close(beta, times.double().log(), atol=1e-8, rtol=0)
    torch.testing.assert_close(new, v, atol=1e-8, rtol=0)
    torch.testing.assert_close(sight.weights(beta) @ new, whole, atol=1e-8, rtol=0)


def test_a_block_with_log_mass_is_its_duplicates() -> None:
    """Merged entries matched again: fitted as what they stand for."""
    q, k, v, times = rand(300, D, seed=0), rand(30, D, seed=1), rand(30, 5, seed=2), torch.arange(30) % 5 + 1
    logit, kept, bias = q @ k.mT / 8, torch.arange(0, 30, 3), times.double().log()
    block = Sight.of(logit + bias, v, kept, no_sink(300))
    first = times.cumsum(0) - times
    every = logit.repeat_interleave(times, 1), v.repeat_interleave(times, 0)
    expanded = Sight.of(*every, first[kept], no_sink(300))
    found, wanted = (match(sight, held(300), v[kept], WEAK) for sight in (block, expanded))
    torch.testing.assert_close(found[0] + bias[kept], wanted[0], atol=1e-8, rtol=0)
    torch.testing.assert_close(found[1], wanted[1], atol=1e-8, rtol=0)
    assert float(found[0].abs().max()) > 0.1


@pytest.mark.parametrize("n", [60, 400])
def test_order_of_entries_and_level_of_logits_do_not_matter(n: int) -> None:
    logit, v, kept = clusters()
    wanted = match(Sight.of(logit[:n], v, kept, no_sink(n)), held(n), v[kept])
    turn = torch.randperm(512, generator=torch.Generator().manual_seed(1))
    where = turn.argsort()[kept]
    moved = Sight.of(logit[:n, turn], v[turn], where, no_sink(n))
    raised = Sight.of(logit[:n] + 100 * rand(n, 1, seed=9), v, kept, no_sink(n))
    for sight in (moved, raised):
        beta, new = match(sight, held(n), v[kept])
        torch.testing.assert_close(beta, wanted[0], atol=1e-7, rtol=0)
        torch.testing.assert_close(new, wanted[1], atol=1e-7, rtol=0)


def test_values_stay_in_the_space_of_the_values() -> None:
    logit, _, kept = clusters()
    flat = rand(512, 3, seed=5) @ rand(3, D, seed=6)
    beta, new = match(Sight.of(logit[:200], flat, kept, no_sink(200)), held(200), flat[kept])
    assert int(torch.linalg.matrix_rank(torch.cat([new, flat]), rtol=1e-9)) == 3
    assert float((new - flat[kept]).abs().max()) > 0.1 and bool(beta.any())


# Least squares.


@pytest.mark.parametrize(("n", "t"), [(30, 51), (51, 30), (40, 40)])
def test_the_gradient_of_a_ridge_is_zero(n: int, t: int) -> None:
    x, y = rand(n, t, seed=0).exp(), rand(n, 5, seed=1)
    for rho, found in zip(RHOS, ridges(x, y, RHOS), strict=True):
        strength = rho * float(x.square().sum()) / t
        assert penalty(x, rho) == pytest.approx(strength)
        slope = x.mT @ (x @ found - y) + strength * found
        assert float(slope.abs().max()) < 1e-8


def test_limits_of_the_ridge() -> None:
    seen, _, v = halves(400)
    beta = torch.zeros(51, dtype=torch.float64)
    x = seen.weights(beta)
    far, near = (next(values(seen, beta, v, [rho])) for rho in (1e9, 1e-15))
    torch.testing.assert_close(far, v, atol=1e-7, rtol=0)
    torch.testing.assert_close(x @ near, x @ torch.linalg.lstsq(x, seen.out).solution, atol=1e-7, rtol=0)
    assert float((x.mT @ (x @ near - seen.out)).abs().max()) < 1e-8


@pytest.mark.parametrize(("n", "t"), [(40, 90), (200, 30)])
def test_limited_mass_is_near_the_best_there_is(n: int, t: int) -> None:
    """Against the same problem solved by many more steps of descent; clamping alone is far from it."""
    x = (2 * rand(n, t, seed=0)).softmax(1) * 0.3
    y, low, high = x @ (2 * rand(t, seed=1)), math.expm1(-1.0), math.expm1(1.0)
    weight = penalty(x, 1e-2)
    free = next(ridges(x, y[:, None], [1e-2]))[:, 0]
    found = _within(x, y, weight, free, 1.0)
    assert not torch.equal(free, found) and bool(((found >= low) & (found <= high)).all())

    def cost(more: Tensor) -> float:
        return float((x @ more - y).square().sum() + weight * more.square().sum())

    best, step = free.clamp(low, high), 1 / (float(torch.linalg.matrix_norm(x, 2)) ** 2 + weight)
    start = cost(best)
    for _ in range(5000):
        best = (best - step * (x.mT @ (x @ best - y) + weight * best)).clamp(low, high)
    assert cost(best) <= cost(found) < start
    assert cost(found) - cost(best) < 0.5 * (start - cost(best))


def test_clip_limits_what_is_added() -> None:
    seen, _, v = halves(400)
    for clip in (0.5, 1.0):
        beta, _ = match(seen, held(400), v, clip=clip)
        assert float(beta.abs().max()) == pytest.approx(clip)


# Queries that were not fitted.


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("n", "most"), [(30, 1.0), (100, 0.8), (400, 0.7)])
def test_fresh_queries_see_less_difference(n: int, most: float, seed: int) -> None:
    """Fewer queries than entries, or enough of them: the error is below that of plain eviction in output and mass."""
    seen, fresh, v = halves(n, seed)
    none = torch.zeros(51, dtype=torch.float64)
    beta, new = match(seen, held(n), v)
    assert relative(fresh, beta, new) < most * relative(fresh, none, v)
    assert relative(fresh, beta, new) < relative(fresh, beta, v)
    assert log_mass(fresh, beta) < 0.7 * log_mass(fresh, none)
    assert fresh.error(beta, new) < 0.8 * fresh.error(none, v)
    assert float(new.abs().max()) < 3 * float(v.abs().max())


def test_plain_least_squares_of_few_queries_are_far_off_where_the_ridge_is_not() -> None:
    seen, fresh, v = halves(30)
    none = torch.zeros(51, dtype=torch.float64)
    wild = torch.linalg.lstsq(seen.weights(none), seen.out, driver="gelsd").solution
    beta, new = match(seen, held(30), v)
    assert relative(seen, none, wild) < 1e-6
    assert relative(fresh, beta, new) < 0.7 * relative(fresh, none, wild)


def test_what_does_not_help_the_held_out_is_not_taken() -> None:
    """Targets of the fitted queries that say nothing of the others': values stay, bit for bit."""
    seen, _, v = halves(200)
    out = torch.where(held(200)[:, None], seen.out, 5 * rand(200, D, seed=8))
    beta, new = match(replace(seen, out=out), held(200), v, [1e-3])
    assert new is v and bool(beta.any())
    alone = replace(seen, out=out, log=seen.log - seen.log.logsumexp(1, keepdim=True))  # no mass is missing
    beta, new = match(alone, held(200), v, [1e-3])
    assert new is v and not bool(beta.any())


def test_mass_that_makes_the_output_worse_is_not_taken() -> None:
    """Targets that plain eviction gives beside new tokens, though mass is missing."""
    seen, _, v = halves(200)
    none = torch.zeros(51, dtype=torch.float64)
    beside = torch.cat([seen.log, torch.zeros(200, 1, dtype=torch.float64)], 1).softmax(1)[:, :-1]
    odd = replace(seen, out=2 * beside @ v)
    assert odd.error(none, v) < 1e-12 and odd.off(next(masses(odd, [0.1], 3.0))) < 0.5 * odd.off(none)
    beta, new = match(odd, held(200), v)
    assert new is v and not bool(beta.any())


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_queries_that_are_no_numbers_leave_all_as_it_was(bad: float) -> None:
    logit, v, kept = clusters()
    logit[3] = bad
    beta, new = match(Sight.of(logit[:40], v, kept, no_sink(40)), held(40), v[kept])
    assert bool(beta.isfinite().all()) and bool(new.isfinite().all())


def test_values_are_judged_as_they_are_stored() -> None:
    """In float16 what is too large is no value."""
    seen, _, v = halves(200)
    half = v.half()
    _, new = match(seen, held(200), half)
    assert new.dtype == torch.float16 and not torch.equal(new, half)
    _, new = match(replace(seen, out=seen.out * 1e6), held(200), half)
    assert bool(new.isfinite().all())


def test_few_queries() -> None:
    seen, _, v = halves(40)
    for rows in (torch.arange(40) < 1, torch.arange(40) < 0):
        beta, new = match(seen.at(rows), held(40)[rows], v)
        assert new is v and not bool(beta.any())


def test_queries_that_see_nothing_of_what_stays_do_not_count() -> None:
    logit, v, kept = clusters()
    wanted = match(Sight.of(logit[:90], v, kept, no_sink(90)), held(90), v[kept])
    blind = logit[90:98].clone()
    blind[:5, kept] = -math.inf
    blind[5:] = -math.inf
    every = Sight.of(torch.cat([blind, logit[:90]]), v, kept, no_sink(98))
    beta, new = match(every, torch.cat([torch.arange(8) % 2 == 0, held(90)]), v[kept])
    torch.testing.assert_close(beta, wanted[0])
    torch.testing.assert_close(new, wanted[1])


# The reducer.


def layer(dtype: torch.dtype = torch.float32, **options: Any) -> tuple[LayerKV, Stats, Scored, Ask]:
    """A layer of 3 heads whose lengths differ, with what was observed of it and scores by chance."""
    full = make_snapshot(1, 3, 6, 83, 16, dtype, **{"ragged": True, **options})
    kv = full.layer(0)
    score = torch.rand(kv.pos.shape, generator=torch.Generator().manual_seed(4)).masked_fill(~kv.real, -math.inf)
    return (
        kv,
        full.stats[0],
        Scored(score),
        Ask(0, 1, 60, 20, 83, 0, 0, 0, 0.25, rope={"head_dim": 16, "inv_freq": FREQ}),
    )


def evicted(kv: LayerKV, stats: Stats, scored: Scored, count: Tensor, ask: Ask) -> LayerKV:
    small: LayerKV = named("evict")["reduce"](kv, stats, scored, count, ask)[0]
    return small


def asked_of(stats: Stats, queries: str) -> tuple[Tensor, Tensor]:  # -> [Hq, R, D], [R]
    """The queries by that name: those of the document are turned by complex numbers to stand at 83, 84 and so on."""
    assert stats.q_repeat is not None and stats.q_repeat_pos is not None
    assert stats.q_last is not None and stats.q_last_pos is not None
    assert stats.q_probe is not None and stats.q_probe_pos is not None
    if queries == "repeat":
        return stats.q_repeat, stats.q_repeat_pos
    if queries == "last":
        return stats.q_last, stats.q_last_pos
    early = stats.q_probe_pos < stats.q_last_pos[0]
    q = torch.cat([stats.q_probe[:, early], stats.q_last], 1).double()
    at = torch.arange(83, 83 + q.shape[1])
    by = (at - torch.cat([stats.q_probe_pos[early], stats.q_last_pos]))[:, None] * torch.tensor(FREQ).double()
    turned = torch.complex(q[..., :3], q[..., 3:6]) * torch.polar(torch.ones_like(by), by)
    return torch.cat([turned.real, turned.imag, q[..., 6:]], -1), at


@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
@pytest.mark.parametrize("queries", ["repeat", "context", "last"])
def test_a_layer_against_dense_algebra(queries: Any, sinks: bool, softcap: float | None) -> None:
    """The ridges of the definition, solved by a stack of rows; limits so wide that they do not bind."""
    kv, stats, scored, ask = layer(bias=True)
    ask, count, rho = replace(ask, softcap=softcap), torch.tensor([20, 9, 31]).minimum(kv.lens - 1), 2.0
    stats = replace(stats, sink_logit=torch.linspace(-2, 2, 6) if sinks else None)
    q, at = asked_of(stats, queries)
    if queries == "last":
        ask, queries = replace(ask, rope={}), "context"
    small, pivot = matching(kv, stats, scored, count, ask, queries=queries, rho=rho, clip=20.0)
    taken = 0
    for h, kept in enumerate(pivot):
        kept, real = kept[kept >= 0], kv.real[h]
        logit = torch.cat([0.25 * q[g].double() @ kv.k[h][real].double().mT for g in (2 * h, 2 * h + 1)])
        logit = logit if softcap is None else softcap * (logit / softcap).tanh()
        logit = (logit + kv.bias[h][real]).masked_fill(kv.pos[h][real] > at.repeat(2)[:, None], -math.inf)  # type: ignore[index]
        sink = torch.full((len(logit), 1), -math.inf).double()
        if stats.sink_logit is not None:
            sink[:, 0] = stats.sink_logit[2 * h : 2 * h + 2].repeat_interleave(len(at)).double()
        weight = torch.cat([logit, sink], 1).softmax(1)[:, :-1]
        sees = weight[:, kept].sum(1) > 0
        weight, logit, sink = weight[sees], logit[sees], sink[sees]
        old, got = kv.v[h][real].double(), small.v[h, : len(kept)].double()
        added = (small.bias[h, : len(kept)] - kv.bias[h][kept]).double()  # type: ignore[index]

        def ridge(x: Tensor, y: Tensor) -> Tensor:
            root = (rho * x.square().sum() / x.shape[1]).sqrt() * torch.eye(x.shape[1]).double()
            zero = torch.zeros(x.shape[1], y.shape[1]).double()
            return torch.linalg.lstsq(torch.cat([x, root]), torch.cat([y, zero])).solution

        if bool(added.any()):
            x = weight[:, kept]
            more = ridge(x, weight.sum(1, keepdim=True) - x.sum(1, keepdim=True))[:, 0]
            torch.testing.assert_close(added, more.log1p(), atol=1e-4, rtol=0)
        if not torch.equal(got, old[kept]):
            x = torch.cat([logit[:, kept] + added, sink], 1).softmax(1)[:, :-1]
            wanted = old[kept] + ridge(x, weight @ old - x @ old[kept])
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
            taken += 1
    assert taken and torch.equal(small.k, evicted(kv, stats, scored, count, ask).k)


def test_every_fourth_place_is_held_out_in_all_heads_of_a_group() -> None:
    kv, stats, scored, ask = layer()
    small, pivot = matching(kv, stats, scored, torch.tensor([20, 9, 31]).minimum(kv.lens - 1), ask, queries="repeat")
    assert stats.q_repeat is not None and small.bias is not None
    for h, kept in enumerate(pivot):
        kept, k, v = kept[kept >= 0], kv.k[h][kv.real[h]], kv.v[h][kv.real[h]]
        logit = (stats.q_repeat[2 * h : 2 * h + 2] @ k.mT * 0.25).flatten(0, 1)
        test = torch.tensor([False, True, False, False] * 4)
        beta, new = match(Sight.of(logit, v, kept, no_sink(16).float()), test, v[kept])
        torch.testing.assert_close(small.bias[h, : len(kept)], beta.float(), atol=1e-4, rtol=0)
        torch.testing.assert_close(small.v[h, : len(kept)], new, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_that_lose_nothing_or_all_but_one(dtype: torch.dtype) -> None:
    kv, stats, scored, ask = layer(dtype, bias=True)
    lens = kv.lens.tolist()
    count = torch.tensor([lens[0], 1, lens[2] - 1])
    small, _ = matching(kv, stats, scored, count, ask)
    plain = evicted(kv, stats, scored, count, ask)
    assert torch.equal(small.lens, count) and torch.equal(small.pos, plain.pos) and torch.equal(small.k, plain.k)
    assert small.span is not None and plain.span is not None and torch.equal(small.span, plain.span)
    assert small.bias is not None and plain.bias is not None
    assert torch.equal(small.v[0, : lens[0]], plain.v[0, : lens[0]]) and torch.equal(small.bias[0], plain.bias[0])
    assert small.v.dtype == dtype and bool((small.bias - plain.bias).abs().max() <= 3)
    assert not torch.equal(small.bias[1], plain.bias[1])
    assert not bool(small.bias[~small.real].any()) and not bool(small.v[~small.real].any())


def test_values_stay_near_those_they_were() -> None:
    for seed in range(5):
        kv, stats, scored, ask = layer(torch.bfloat16, seed=seed)
        small, _ = matching(kv, stats, scored, kv.lens // 3 + 1, ask)
        assert float(small.v.abs().max()) < 3 * float(kv.v.abs().max())


NO_PROBES = ((None, None), (torch.zeros(6, 0, 16), torch.zeros(0, dtype=torch.int32)))


def test_which_queries() -> None:
    kv, stats, scored, ask = layer()
    count = kv.lens // 2 + 1
    plain = replace(stats, q_repeat=None, q_repeat_pos=None)
    auto, repeat, context = (matching(kv, stats, scored, count, ask, queries=name)[0] for name in QUERIES)
    assert torch.equal(auto.v, repeat.v) and not torch.equal(auto.v, context.v)
    assert torch.equal(matching(kv, plain, scored, count, ask)[0].v, context.v)
    last, empty = (replace(plain, q_probe=q, q_probe_pos=pos) for q, pos in NO_PROBES)
    one, other = (matching(kv, each, scored, count, ask)[0].v for each in (last, empty))
    assert torch.equal(one, other) and not torch.equal(one, context.v)
    with pytest.raises(InfeasibleError, match="q_repeat"):
        matching(kv, plain, scored, count, ask, queries="repeat")


@pytest.mark.parametrize("text", ["rho=0", "rho=-1", "rho=none", "clip=0", "clip=21", "queries=self"])
def test_options_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError):
        Recipe.parse(f"h2o+matching:{text}")


def test_bias_is_in_the_file_and_the_error_of_its_queries_falls(tmp_path: Path) -> None:
    full = make_snapshot(tokens=120, heads=3, q_heads=6, dim=16)
    plain, small = (shrunk(full, f"h2o+{name}", tmp_path / "a") for name in ("evict", "matching:queries=context"))
    for one, other in zip(plain.rows, small.rows, strict=True):
        assert torch.equal(one.k, other.k) and torch.equal(one.pos, other.pos)
        assert one.bias is None and other.bias is not None and bool(other.bias.any())
    assert bool((small.extra["report"][:, [0, 2]] < plain.extra["report"][:, [0, 2]]).all())


def test_through_the_model(model: Model, tmp_path: Path) -> None:
    """Logits come nearer as more stays, until they are those of the full cache."""
    full = prefill(model, IDS, (3, "\n", True), chunk=60)
    truth = logits(model, Prefix.read(full, model), MORE, 5)
    off = []
    for budget in ("10%", "40%", "80%", "100%"):
        small = shrunk(full, "h2o+matching:sink=1,recent=2", tmp_path / "a", budget)
        off.append(float((logits(model, Prefix.read(small, model), MORE, 5) - truth).abs().max()))
    assert off == sorted(off, reverse=True) and off[-1] < 1e-5 < off[0]
