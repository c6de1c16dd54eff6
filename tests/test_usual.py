"""The recipe where none is given: what the snapshot's statistics decide, in Python and in the command."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from make import make_snapshot, opened

import kvcli
import kvcli.errors
from kvcli.cli import run
from kvcli.collect import COLLECT
from kvcli.recipe import Recipe
from kvcli.snapshot import Snapshot, Stats
from kvcli.storage import write_snapshot
from kvcli.usual import RECIPES, usual_recipe


def without(snapshot: Snapshot, names: tuple[str, ...]) -> Snapshot:
    return replace(snapshot, stats=[replace(part, **dict.fromkeys(names)) for part in snapshot.stats])


def test_the_best_recipe_that_the_statistics_allow() -> None:
    full = make_snapshot(tokens=40)
    plain = without(full, COLLECT["kvzip"])
    assert [str(usual_recipe(each)) for each in (full, plain)] == list(RECIPES)
    bare = replace(full, stats=[Stats()] * 2)
    assert str(usual_recipe(bare)) == RECIPES[-1]
    with pytest.raises(kvcli.errors.InfeasibleError, match="needs"):
        kvcli.compress(bare, budget="50%")


def test_what_every_document_has_is_enough_for_the_last() -> None:
    collected = {part for parts in COLLECT.values() for part in parts}
    assert not collected & {*Recipe.parse(RECIPES[-1]).needs}


def test_in_python_and_in_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    full = make_snapshot(tokens=40)
    write_snapshot(full, tmp_path / "a.kv.safetensors")
    for args, recipe in ((["-b", "50%", "-o", "b"], RECIPES[0]), (["-m", "random", "-b", "50%", "-o", "c"], "random")):
        assert run(["compress", "a.kv.safetensors", *args, "--json"]) == 0
        said = capsys.readouterr()
        assert json.loads(said.out)["rows"][0]["recipe"] == recipe
        assert (f"method: {recipe}" in said.err) == (recipe == RECIPES[0])
    kvcli.compress(full, budget="50%").save(tmp_path / "d")
    assert opened(tmp_path / "d").meta.history[-1]["recipe"] == RECIPES[0]
    assert run(["compress", "a.kv.safetensors"]) == 2
    assert "needs a --budget" in capsys.readouterr().err
    assert run(["compress", "a.kv.safetensors", "-b", "50%", "-o", "b"]) == 3
    assert run(["compress", "a.kv.safetensors", "-b", "50%", "--dry-run"]) == 0
