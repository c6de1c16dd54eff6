"""The recipe where none is given: what the snapshot's statistics decide, in Python and in the command."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from subprocess import DEVNULL, PIPE, Popen

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
    few = without(plain, ("value_norm", "q_probe", "q_probe_pos"))  # as of a cache that transformers has filled
    assert [str(usual_recipe(each)) for each in (full, plain, few)] == list(RECIPES)
    assert kvcli.compress(few, budget="50%").meta.history[-1]["recipe"] == RECIPES[-1]
    collected = without(full, ("value_norm", "attn_mass", "q_probe", "q_probe_pos"))
    assert kvcli.compress(collected, budget="50%").meta.history[-1]["recipe"] == RECIPES[0]
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
    capsys.readouterr()
    assert run(["compress", "a.kv.safetensors", "-m", "", "-b", "50%", "-o", "e"]) == 2
    with pytest.raises(kvcli.errors.UsageError, match="--method"):
        kvcli.compress(full, "", "50%")


@pytest.mark.parametrize(
    ("line", "code"),
    [("-b nonsense", 2), ("-b 50% -b 20% -o x", 2), ("-b 50% -o there", 3), ("-b 50% -o gone/x", 3), ("", 2)],
)
def test_what_cannot_be_is_refused_before_a_pipe_is_read(line: str, code: int, tmp_path: Path) -> None:
    """Else a prefill of hours would be for nothing: here its snapshot never comes."""
    (tmp_path / "there").write_text("")
    args = [sys.executable, "-m", "kvcli", "compress", *line.split()]
    with Popen(args, stdin=PIPE, stdout=DEVNULL, stderr=PIPE, cwd=tmp_path) as process:
        assert process.wait(30) == code


def test_what_is_protected_says_how_much_fits(tmp_path: Path) -> None:
    full = make_snapshot(tokens=40)
    with pytest.raises(kvcli.errors.InfeasibleError, match="budget of 1 entry a head") as caught:
        kvcli.compress(full, "kvzip:sink=1,recent=1", "3%")
    assert "2 entries a head" in caught.value.fix
    for budget, entries in (("3%", 4), (2, 8), (5, 20)):
        assert sum(int(rows.lens.sum()) for rows in kvcli.compress(full, budget=budget).rows) == entries
