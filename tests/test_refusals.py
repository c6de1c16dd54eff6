"""What compress refuses to do with a snapshot that opens well: numbers that are not finite, nothing to compress."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import make_profiles, make_snapshot

from kvcli.budget import Budget
from kvcli.cli import run
from kvcli.errors import InfeasibleError, KvError
from kvcli.pipeline import make_plans
from kvcli.recipe import Recipe
from kvcli.registry import stages
from kvcli.snapshot import Snapshot
from kvcli.storage import write_snapshot

RECIPES = sorted({stage.name for stage in stages() if stage.kind in ("score", "encode")})


def plan(snapshot: Snapshot, recipe: str) -> None:
    parsed = Recipe.parse(recipe)
    make_plans(snapshot, parsed, [Budget.parse("30%") if parsed.takes_budget else None])


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["k", "v", "bias"])
@pytest.mark.parametrize("recipe", RECIPES)
def test_no_recipe_copies_what_is_not_finite(recipe: str, name: str, value: float) -> None:
    full = make_snapshot(tokens=40, bias=True)
    make_profiles(full)
    getattr(full.rows[1], name).view(-1)[-3] = value
    with pytest.raises(KvError, match=f"layer 1.*{name} holds NaN"):
        plan(full, recipe)


def test_layers_that_all_slide_are_nothing_to_compress() -> None:
    full = make_snapshot()
    layout = replace(full.meta.layout, kinds=("sliding", "sliding"))
    slid = replace(full, meta=replace(full.meta, layout=layout))
    with pytest.raises(InfeasibleError, match="nothing to compress"):
        plan(slid, "random")


@pytest.mark.parametrize(("recipe", "missing"), [("snapkv", "q_last"), ("kvmerger", "attn_mass"), ("h2o", "attn_mass")])
def test_a_missing_statistic_is_named_with_the_command_that_records_it(recipe: str, missing: str) -> None:
    bare = make_snapshot(stats=False)
    with pytest.raises(InfeasibleError) as caught:
        plan(bare, recipe)
    assert f"needs {missing}" in caught.value.what and caught.value.fix == f"kvcli prefill DOC records {missing}"
    once = replace(bare.meta, history=({"recipe": "random", "budget": "50%"},))
    with pytest.raises(InfeasibleError) as caught:
        plan(replace(bare, meta=once), recipe)
    assert "kvcli prefill DOC" in caught.value.fix and "kvcli compress --keep-stats" in caught.value.fix


@pytest.mark.parametrize("recipe", ["snapkv", "kvmerger", "h2o+global", "random+adakv"])
def test_few_entries_and_more_than_there_are(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_snapshot(make_snapshot(tokens=40), Path("a.kv.safetensors"))
    assert run(["compress", "a.kv.safetensors", "-m", recipe, "-b", "3", "-o", "few"]) == 0
    assert "12 of 160 entries" in capsys.readouterr().err
    assert run(["compress", "a.kv.safetensors", "-m", recipe, "-b", "1000000", "-o", "all"]) == 0
    assert "everything was kept: the budget is no smaller" in capsys.readouterr().err


def test_the_smallest_feasible_budget_that_is_named_is_feasible() -> None:
    full = make_snapshot(tokens=40)
    for text in ("1KiB", "2%"):
        with pytest.raises(InfeasibleError) as caught:
            make_plans(full, Recipe.parse("snapkv"), [Budget.parse(text)])
        named = caught.value.fix.split("budget is ")[1].split(",")[0].replace(" bytes", "B")
        outline = make_plans(full, Recipe.parse("snapkv"), [Budget.parse(named)])[0].outline
        assert outline.entries == 4 and torch.equal(outline.counts[0], torch.tensor([1, 1]))
