"""What lies at the edge: numbers a dtype does not hold, extreme options and biases, remedies that must work."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import make_profiles, make_snapshot, opened, shrunk

from kvcli.budget import Budget
from kvcli.errors import InfeasibleError, KvError
from kvcli.pipeline import make_plans
from kvcli.recipe import Recipe
from kvcli.snapshot import Snapshot


@pytest.mark.parametrize("recipe", ["h2o+cam", "kvmerger:values=count"])
def test_sums_that_overflow_are_refused_and_leave_no_file(recipe: str, tmp_path: Path) -> None:
    full = make_snapshot(tokens=40, dtype=torch.float16)
    loud = replace(full, rows=[replace(rows, v=torch.full_like(rows.v, 6e4)) for rows in full.rows])
    with pytest.raises(KvError, match=r"layer 0: .* makes numbers that float16 does not hold"):
        shrunk(loud, recipe, tmp_path / "a")
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("recipe", ["lookm", "kvmerger:values=mean", "kvmerger"])
@pytest.mark.parametrize("bias", [-300.0, 100.0])
def test_bias_of_any_size_is_merged(recipe: str, bias: float, tmp_path: Path) -> None:
    full = make_snapshot(tokens=40, bias=True)
    rows = [replace(rows, bias=torch.full_like(rows.pos, bias, dtype=torch.float32)) for rows in full.rows]
    full = replace(full, rows=rows, meta=replace(full.meta, requires=("bias", "span")))
    found = shrunk(full, recipe, tmp_path / "a").rows[0].bias
    assert found is not None and bool((found >= bias).all()) and bool((found < bias + 4).all())


def test_a_share_beyond_all_entries_is_no_limit(home: Path) -> None:
    full = make_snapshot(tokens=40)
    make_profiles(full)
    huge, much = (
        make_plans(full, Recipe.parse(f"compresskv:most={most}"), [Budget.parse("30%")])[0] for most in ("1e30", "9")
    )
    assert [count.tolist() for count in huge.outline.counts] == [count.tolist() for count in much.outline.counts]


@pytest.mark.parametrize("heads", [1, 2])
def test_a_byte_budget_bounds_the_file_of_a_compressed_snapshot(heads: int, tmp_path: Path) -> None:
    full = make_snapshot(layers=4, heads=heads, q_heads=2 * heads, tokens=9)
    once = opened(tmp_path / "a") if shrunk(full, "snapkv", tmp_path / "a", "99%", keep_stats=True) else full
    size = _planned(once, "100%")
    assert all(_planned(once, f"{size + more}B") <= size + more for more in range(-160, 900, 20))
    assert _planned(once, f"{size + 2000}B") == pytest.approx(size, abs=20)


def _planned(snapshot: Snapshot, budget: str) -> int:
    return make_plans(snapshot, Recipe.parse("snapkv"), [Budget.parse(budget)], keep_stats=True)[0].outline.file_bytes


@pytest.mark.parametrize("N", [1, 3, 7, 150, 1234, 65537, 10**6])
def test_the_smallest_share_that_is_named_is_enough(N: int) -> None:
    with pytest.raises(InfeasibleError) as found:
        Budget.parse("0.00001%").per_head(N, 2, lambda n: n)
    share = re.search(r"budget is ([0-9.]+%)", found.value.fix)
    assert share and Budget.parse(share[1]).per_head(N, 2, lambda n: n) >= 1


@pytest.mark.parametrize(
    ("gone", "how"),
    [
        (("resid_norm",), "kvcli score SNAPSHOT --collect norms adds resid_norm"),
        (("q_last", "q_last_pos"), "kvcli prefill DOC records q_last"),
        (
            ("q_last", "q_last_pos", "attn_in_norm"),
            "kvcli prefill DOC --collect norms records q_last, attn_in_norm",
        ),
    ],
)
def test_the_command_that_is_named_records_all_that_is_missing(gone: tuple[str, ...], how: str) -> None:
    full = make_snapshot()
    less = replace(full, stats=[replace(stats, **dict.fromkeys(gone)) for stats in full.stats])
    with pytest.raises(InfeasibleError) as found:
        make_plans(less, Recipe.parse("guikv"), [Budget.parse("50%")])
    assert found.value.fix == how
