"""The laws every method keeps, over the whole registry: sizes, order, identity, determinism, what may be read."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import make_profiles, make_snapshot, shrunk

from kvcli.budget import Budget
from kvcli.errors import KvError
from kvcli.meta import Json
from kvcli.metrics import output_error
from kvcli.pipeline import carry_out, make_plans, protect
from kvcli.recipe import Recipe
from kvcli.registry import Ask, named, stages
from kvcli.snapshot import LayerKV, Stats

SCORES = sorted({stage.name for stage in stages() if stage.kind == "score"})
SHARES = [f"{stage.after or 'snapkv'}+allocate={stage.name}" for stage in stages() if stage.kind == "allocate"]
RECIPES = [*SCORES, *SHARES, "kvmerger+adakv", "kvmerger:values=mean"]
RECIPES += [
    "kvmerger+global",
    "kvzip:plus,share=layer",
    "kvzip:agg=rms,share=uniform",
    "expected:rope_average=reference",
    "expected:rope_average=mixture,epsilon=0.02+adakv",
    "kvmerger:keys=pivot",
    "kvmerger:keys=rerotate",
    "kvmerger:sigma=5,max_run=17",
    "h2o+global",
    "h2o+cam:mode=expected,against=max,normalize",
    "weightedkv:mode=sequential",
    "lookm:merge=averaged",
    "lookm:merge=weighted",
    "d2o:layer=variance,merge=paper",
    "d2o:layer=uniform,filter=layer,heavy=0.75",
]
RECIPES += [f"{stage.after or 'snapkv'}+encode={stage.name}" for stage in stages() if stage.kind == "encode"]
RECIPES += [f"{stage.after or 'snapkv'}+reduce={stage.name}" for stage in stages() if stage.kind == "reduce"]
DRAWN = {"random", "snapkv+reduce=cam"}
RECIPES = [recipe for recipe in RECIPES if Recipe.parse(recipe).takes_budget]
SIZES = {"layers": 2, "heads": 3, "q_heads": 6, "tokens": 83, "dim": 16}
SEGMENTS = make_snapshot(**SIZES).extra["stat.segments"]
ROPE = {"head_dim": 16, "inv_freq": [1.0, 0.1, 0.01]}
Profiles = dict[str, Json]


@pytest.fixture(autouse=True)
def profiles(home: Path) -> Profiles:
    return make_profiles(make_snapshot(**SIZES))


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("budget", ["10%", "35%", "60", "0.99"])
def test_count_is_exact_and_order_kept(recipe: str, budget: str, tmp_path: Path) -> None:
    small = shrunk(make_snapshot(**SIZES), recipe, tmp_path / "a.kv.safetensors", budget)
    each = Budget.parse(budget).per_head(83, 6, lambda n: n)
    assert sum(len(small.rows[i].k) for i in range(2)) == 2 * 3 * each
    for i in range(2):
        kv = small.layer(i)
        assert bool((kv.lens >= 1).all())
        for head in range(3):
            pos = kv.pos[head][kv.real[head]]
            assert bool((pos.diff() > 0).all())


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_everything_kept_changes_nothing(recipe: str, dtype: torch.dtype, tmp_path: Path) -> None:
    full = make_snapshot(**SIZES, dtype=dtype)
    same = shrunk(full, recipe, tmp_path / "a.kv.safetensors", "100%")
    lossy = Recipe.parse(recipe).encode.stage.lossy
    for before, after in zip(full.rows, same.rows, strict=True):
        for one, other in ((before.k, after.k), (before.v, after.v)):
            assert one.dtype == other.dtype
            # half a step of 4 bits over all the numbers of the layer
            off = float(one.float().max() - one.float().min()) / 30 * 1.01 if lossy else 0.0
            assert float((one.float() - other.float()).abs().max()) <= off
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8)) != lossy
        assert torch.equal(before.pos, after.pos)
        assert after.bias is None or not bool(after.bias.any())
    report = same.extra["report"]
    assert bool(((report > 0) & (report < 0.2)).all() if lossy else (report == 0).all())


@pytest.mark.parametrize("recipe", RECIPES)
def test_equal_inputs_give_equal_bytes(recipe: str, tmp_path: Path) -> None:
    for name in ("a", "b"):
        shrunk(make_snapshot(**SIZES), recipe, tmp_path / f"{name}.kv.safetensors")
    assert (tmp_path / "a.kv.safetensors").read_bytes() == (tmp_path / "b.kv.safetensors").read_bytes()


@pytest.mark.parametrize("recipe", RECIPES)
def test_first_and_newest_tokens_stay(recipe: str, tmp_path: Path) -> None:
    small = shrunk(make_snapshot(**SIZES), f"{recipe}+random:sink=3,recent=7", tmp_path / "a.kv.safetensors", "25%")
    for i in range(2):
        for pos, real in zip(small.layer(i).pos, small.layer(i).real, strict=True):
            assert {0, 1, 2, *range(76, 83)} <= set(pos[real].tolist())


def test_random_draws_anew_for_another_seed(tmp_path: Path) -> None:
    first, second = (
        shrunk(make_snapshot(**SIZES), "random", tmp_path / "a.kv.safetensors", seed=seed) for seed in (1, 2)
    )
    assert not torch.equal(first.rows[0].pos, second.rows[0].pos)
    assert not torch.equal(first.rows[0].pos, first.rows[1].pos)


def test_floor_1_of_adakv_is_no_sharing(tmp_path: Path) -> None:
    shared, even = (
        shrunk(make_snapshot(**SIZES), recipe, tmp_path / "a.kv.safetensors")
        for recipe in ("snapkv+adakv:floor=1", "snapkv")
    )
    for one, other in zip(shared.rows, even.rows, strict=True):
        assert torch.equal(one.pos, other.pos) and torch.equal(one.k, other.k)


def test_a_byte_budget_bounds_the_file_whatever_the_recipe_is_called(tmp_path: Path) -> None:
    full = make_snapshot(**SIZES, dtype=torch.float32)
    recipe = "snapkv" + "+random:sink=1" * 16
    for limit in range(14_000, 14_200, 7):
        plan = make_plans(full, Recipe.parse(recipe), [Budget.parse(f"{limit}B")])[0]
        assert limit - 6 * 150 - 800 < plan.outline.file_bytes <= limit


def test_a_byte_budget_that_holds_everything_drops_nothing(tmp_path: Path) -> None:
    full = make_snapshot(**SIZES)
    size = make_plans(full, Recipe.parse("kvmerger"), [Budget.parse("100%")])[0].outline.file_bytes
    for more, whole in ((-16, False), (16, True), (900, True)):
        plan = make_plans(full, Recipe.parse("kvmerger"), [Budget.parse(f"{size + more}B")])[0]
        assert (plan.outline.entries == 2 * 3 * 83) == whole


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("size", ["14KB", "21KB"])
def test_a_byte_budget_bounds_the_file(recipe: str, size: str, tmp_path: Path) -> None:
    path = tmp_path / "a.kv.safetensors"
    shrunk(make_snapshot(**SIZES, dtype=torch.float32), recipe, path, size)
    limit = Budget.parse(size).bytes or 0
    one_more = 2 * 3 * (16 * 2 * 4 + 12)
    assert limit - one_more - 600 < path.stat().st_size <= limit


@pytest.mark.parametrize("recipe", ["kvmerger", "snapkv+adakv", "random", "streamingllm"])
def test_a_compressed_snapshot_compresses_again(recipe: str, tmp_path: Path) -> None:
    once = shrunk(make_snapshot(**SIZES), "snapkv+adakv", tmp_path / "a.kv.safetensors", "60%", keep_stats=True)
    twice = shrunk(once, recipe, tmp_path / "b.kv.safetensors", keep_stats=True)
    assert sum(len(rows.k) for rows in twice.rows) == 2 * 3 * 24
    assert [entry["budget"] for entry in twice.meta.history] == ["60%", "30%"]
    third = shrunk(twice, "random", tmp_path / "c.kv.safetensors", "90%")
    assert sum(len(rows.k) for rows in third.rows) == 2 * 3 * 24
    assert third.stats[0].present() == {}


@pytest.mark.parametrize("name", ["kvmerger", "snapkv"])
def test_several_budgets_equal_one_at_a_time(name: str, tmp_path: Path) -> None:
    full, recipe = make_snapshot(**SIZES), Recipe.parse(name)
    budgets = [Budget.parse(text) for text in ("50%", "20%")]
    paths = [tmp_path / "a", tmp_path / "b"]
    carry_out(full, make_plans(full, recipe, budgets), paths)
    for budget, path in zip(("50%", "20%"), paths, strict=True):
        shrunk(full, name, tmp_path / "one", budget)
        assert path.read_bytes() == (tmp_path / "one").read_bytes()


def padded(fill: float) -> tuple[LayerKV, Stats]:
    rows = make_snapshot(**SIZES, ragged=True, dtype=torch.float32).rows[0]
    kv, stats = LayerKV.from_rows(rows), make_snapshot(**SIZES).stats[0]
    blank = ~kv.real[..., None]
    return replace(kv, k=kv.k.masked_fill(blank, fill), v=kv.v.masked_fill(blank, fill)), stats


def stage_by_stage(name: str, kv: LayerKV, stats: Stats, profiles: Profiles) -> LayerKV:
    recipe = Recipe.parse(name)
    B = int(kv.lens.min()) // 2 + 1
    ask = Ask(0, 1, 3 * B, B, 83, 1, 2, 0, 0.25, rope=ROPE, segments=SEGMENTS, profiles=profiles)
    assert recipe.score
    scored = protect(recipe.score(kv, stats, ask), kv, ask)
    small, pivot = recipe.reduce(kv, stats, scored, recipe.allocate([scored], 3 * B, ask)[0], ask)
    assert torch.equal(kv.pos.gather(1, pivot.clamp(min=0))[pivot >= 0], small.pos[small.real])
    return small


@pytest.mark.parametrize("recipe", RECIPES)
def test_padding_is_never_read(recipe: str, profiles: Profiles) -> None:
    clean, dirty = (stage_by_stage(recipe, *padded(fill), profiles).rows() for fill in (0.0, math.nan))
    assert torch.equal(clean.pos, dirty.pos)
    assert torch.equal(clean.k, dirty.k) and torch.equal(clean.v, dirty.v)


@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in DRAWN])
def test_permuting_heads_permutes_results(recipe: str, profiles: Profiles) -> None:
    kv, stats = padded(0.0)
    turn = torch.tensor([2, 0, 1])
    queries = torch.cat([2 * turn[:, None], 2 * turn[:, None] + 1], 1).flatten()
    by_head = dict.fromkeys(("attn_mass", "value_norm", "mass_sq", "kvzip", "kvzip_rms", "kvzip_plus"), turn)
    by_head |= dict.fromkeys(("q_last", "q_probe", "q_repeat", "q_mean", "q_cov"), queries)
    moved = Stats(**{key: part[by_head[key]] if key in by_head else part for key, part in stats.present().items()})
    parts = {key: part[turn] for key, part in vars(kv).items() if part is not None}
    known = {name: _moved(profile, {3: turn, 6: queries}) for name, profile in profiles.items()}
    before, after = (
        stage_by_stage(recipe, kv, stats, profiles),
        stage_by_stage(recipe, LayerKV(**parts), moved, known),
    )
    if "adakv" in recipe or "taskkv" in recipe:  # a remainder goes to the lower head
        assert int((before.lens[turn] - after.lens).abs().max()) <= 1
    else:
        assert torch.equal(before.pos[turn], after.pos)
        torch.testing.assert_close(before.k[turn], after.k)


def _moved(profile: Json, turns: dict[int, torch.Tensor]) -> Json:
    """The same with the heads of each layer in another order, by how many there are."""
    tables = {name: table for name, table in profile.items() if isinstance(table, list) and isinstance(table[0], list)}
    return {**profile, **{name: torch.tensor(t)[:, turns[len(t[0])]].tolist() for name, t in tables.items()}}


def test_what_stays_has_the_highest_score(profiles: Profiles) -> None:
    kv, stats = padded(0.0)
    ask = Ask(0, 1, 30, 10, 83, 0, 0, 0, 0.25, rope=ROPE, segments=SEGMENTS, profiles=profiles)
    for name in set(SCORES) & set(RECIPES):
        stage = named(name)["score"]
        scored = protect(stage(kv, stats, ask), kv, ask)
        small, pivot = named("evict")["reduce"](kv, stats, scored, torch.tensor([10, 10, 10]), ask)
        kept = scored.score.gather(1, pivot)
        dropped = scored.score.scatter(1, pivot, -math.inf)
        assert bool((kept.min(1).values >= dropped.max(1).values).all())
        assert small.lens.tolist() == [10, 10, 10]


def test_output_error_against_float64(profiles: Profiles) -> None:
    kv, stats = padded(0.0)
    small = stage_by_stage("kvmerger", kv, stats, profiles)
    q, q_pos = stats.q_probe, stats.q_probe_pos
    assert q is not None and q_pos is not None
    error = output_error(q, q_pos, kv, small, 0.25)

    def exact(layer: LayerKV, a: int, r: int) -> torch.Tensor:
        h = a // 2
        seen = layer.real[h] & (layer.pos[h] <= q_pos[r])
        logit = 0.25 * layer.k[h][seen].double() @ q[a, r].double()
        logit = logit + (layer.bias[h][seen] if layer.bias is not None else 0)
        return logit.softmax(0) @ layer.v[h][seen].double()

    for a, r in ((0, 1), (3, 2), (5, 3)):
        expected = (exact(small, a, r) - exact(kv, a, r)).norm() / exact(kv, a, r).norm()
        assert error[a, r].item() == pytest.approx(expected.item(), rel=1e-4)


def test_nan_in_a_statistic_is_an_error_that_names_the_layer() -> None:
    full = make_snapshot(**SIZES)
    mass = full.stats[1].attn_mass
    assert mass is not None
    mass[2, 40] = math.nan
    with pytest.raises(KvError, match=r"layer 1.*attn_mass"):
        make_plans(full, Recipe.parse("kvmerger"), [Budget.parse("30%")])
    full.rows[0].k[5, 2] = math.nan
    with pytest.raises(KvError, match="layer 0"):
        make_plans(full, Recipe.parse("snapkv"), [Budget.parse("30%")])
