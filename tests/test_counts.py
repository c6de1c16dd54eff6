"""Every method keeps exactly what is asked of it: six budgets, short and long documents, one to eight heads."""

import io
from functools import cache

import pytest
import torch
from make import make_profiles, make_snapshot
from test_laws import RECIPES

from kvcli.budget import Budget
from kvcli.pipeline import carry_out, make_plans
from kvcli.recipe import Recipe
from kvcli.snapshot import Snapshot
from kvcli.storage import Reader

BUDGETS = [Budget.parse(text) for text in ("90%", "50%", "35%", "20%", "10%", "5%")]
LAYERS = 2


@cache
def document(tokens: int, heads: int) -> Snapshot:
    return make_snapshot(layers=LAYERS, heads=heads, q_heads=2 * heads, tokens=tokens, dim=8)


@pytest.mark.parametrize("recipe", [recipe for recipe in RECIPES if "max_run" not in recipe])  # it sets a floor
@pytest.mark.parametrize("tokens", [300, 4000])
@pytest.mark.parametrize("heads", [1, 2, 3, 8])
def test_the_file_holds_exactly_what_was_asked(recipe: str, tokens: int, heads: int) -> None:
    full, parsed = document(tokens, heads), Recipe.parse(recipe)
    make_profiles(full)
    files = [io.BytesIO() for _ in BUDGETS]
    carry_out(full, make_plans(full, parsed, BUDGETS), files)
    for budget, file in zip(BUDGETS, files, strict=True):
        each = budget.per_head(tokens, LAYERS * heads, lambda n: n)
        small = Reader(io.BytesIO(file.getvalue())).snapshot()
        lens = torch.stack([rows.lens for rows in small.rows])
        assert int(lens.sum()) == LAYERS * heads * each
        assert int(lens.min()) >= 1
