"""KVMerger's limit of runs: none is longer, the count stays, and what cannot be met is refused with what can."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import shrunk
from test_merging import ask, layer, smooth

from kvcli.errors import InfeasibleError
from kvcli.methods.kvmerger import kvmerger, kvmerger_score
from kvcli.pipeline import protect
from kvcli.recipe import Recipe
from kvcli.snapshot import Stats


@pytest.mark.parametrize("recipe", ["kvmerger", "kvmerger+adakv", "kvmerger+global"])
@pytest.mark.parametrize("limit", [4, 9, 0])
def test_no_run_is_longer_than_its_limit(recipe: str, limit: int, tmp_path: Path) -> None:
    name, *more = recipe.split("+")
    text = "+".join([f"{name}:max_run={limit},sink=2,recent=3", *more])
    small, free = (shrunk(smooth(), one, tmp_path / "a", "35%") for one in (text, text.replace("run=4", "run=0")))
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
        shrunk(smooth(), "+".join([f"{name}:max_run=11,recent=0", *more]), tmp_path / "a", budget)
    named = int(caught.value.fix.rpartition("=")[2])
    small = shrunk(smooth(), "+".join([f"{name}:max_run={named},recent=0", *more]), tmp_path / "a", budget)
    assert sum(len(rows.k) for rows in small.rows) == 4 * int(budget)
    with pytest.raises(InfeasibleError):
        shrunk(smooth(), "+".join([f"{name}:max_run={named - 1},recent=0", *more]), tmp_path / "a", budget)


def test_a_budget_times_the_limit_below_the_tokens_is_infeasible(tmp_path: Path) -> None:
    """Where nothing need be protected, exactly below."""
    for limit, fits in ((12, True), (11, False)):
        recipe = f"kvmerger:max_run={limit},sink=0,recent=0"
        if fits:
            shrunk(smooth(), recipe, tmp_path / "a", "10")
        else:
            with pytest.raises(InfeasibleError, match="do not fit"):
                shrunk(smooth(), recipe, tmp_path / "b", "10")
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
        shrunk(smooth(), "score=kvmerger:max_run=0,recent=0+kvmerger:max_run=2", tmp_path / "a", "12")
    assert not (tmp_path / "a").exists()
