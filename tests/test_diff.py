"""Comparing two snapshots: sets of positions, output errors, what may be compared, and the command."""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import make_snapshot

from kvcli.budget import Budget
from kvcli.cli import run
from kvcli.cli.diff import COUNTS
from kvcli.diff import errors, overlap, runs
from kvcli.errors import FormatError
from kvcli.pipeline import carry_out, make_plans
from kvcli.recipe import Recipe
from kvcli.snapshot import LayerKV, Snapshot, Stats, gather, mask_index
from kvcli.spool import header_of
from kvcli.storage import write_snapshot

FULL = make_snapshot(tokens=40)


def some(kv: LayerKV, seed: int) -> LayerKV:
    """A random part of a layer, at least one entry a head, another number in each."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.rand(kv.pos.shape, generator=rng) < torch.rand(len(kv.pos), 1, generator=rng)
    mask[:, seed % mask.shape[1]] = True
    return gather(kv, mask_index(mask))


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_overlap_is_that_of_sets(one: int, two: int) -> None:
    whole = FULL.layer(0)
    a, b = some(whole, one), some(whole, two)
    for head, part in enumerate(overlap(a, b)):
        left, right = ({p for p in kv.pos[head].tolist() if p >= 0} for kv in (a, b))
        assert (part.both, part.changed) == (len(left & right), 0)
        assert part.only_a.tolist() == sorted(left - right) and part.only_b.tolist() == sorted(right - left)
        assert part.share == pytest.approx(len(left & right) / len(left | right))
    for part, back in zip(overlap(a, b), overlap(b, a), strict=True):
        assert part.share == back.share and torch.equal(part.only_a, back.only_b)


@pytest.mark.parametrize("part", ["k", "v", "bias"])
def test_entries_at_one_place_that_differ_are_counted(part: str) -> None:
    a = make_snapshot(ragged=True, bias=True).layer(1)
    tensor = getattr(a, part).clone()
    tensor[0, :2] += 1
    assert [head.changed for head in overlap(a, replace(a, **{part: tensor}))] == [2, 0]
    no_bias = replace(a, bias=None)
    assert [head.changed for head in overlap(a, no_bias)] == a.lens.tolist()


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 30)))
def test_runs_cover_the_positions_and_nothing_else(places: set[int]) -> None:
    found = runs(torch.tensor(sorted(places), dtype=torch.int32))
    assert [i for first, last in found for i in range(first, last + 1)] == sorted(places)
    assert all(right[0] > left[1] + 1 for left, right in pairwise(found))


def test_without_queries_there_is_no_error() -> None:
    a, layout = FULL.layer(0), FULL.meta.layout
    b, none = some(a, 3), Stats()
    found = errors(0, a, b, (none, FULL.stats[0]), layout)
    assert found == errors(0, a, b, (FULL.stats[0], none), layout) and all(value > 0 for value in found.values())
    assert set(errors(0, a, a, (FULL.stats[0], none), layout).values()) == {0.0}
    assert errors(0, a, b, (none, none), layout) == {}
    broken = replace(FULL.stats[0], q_probe=torch.full((4, 4, 8), torch.nan))
    with pytest.raises(FormatError, match="layer 0: q_probe"):
        errors(0, a, b, (broken, none), layout)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, list[list[float]]]:
    """Files by recipe in the current folder, with the errors that compress reported of each layer."""
    monkeypatch.chdir(tmp_path)
    write_snapshot(FULL, tmp_path / "full")
    reports = {}
    for recipe in ("snapkv+adakv", "kvmerger"):
        plans = make_plans(FULL, Recipe.parse(recipe), [Budget.parse("50%")])
        reports[recipe] = carry_out(FULL, plans, [tmp_path / recipe])[0].tolist()
    return reports


def diff(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, Any]:
    capsys.readouterr()
    assert run(["diff", *args, "--json"]) == 0
    facts = dict(json.loads(capsys.readouterr().out))
    for row in (facts, *facts["layers"]):
        parts = row.get("heads") or facts["layers"]
        assert [row[name] for name in COUNTS] == [sum(part[name] for part in parts) for name in COUNTS]
    return facts


@pytest.mark.parametrize("recipe", ["snapkv+adakv", "kvmerger"])
def test_a_file_against_what_it_was_made_of(
    files: dict[str, list[list[float]]], capsys: pytest.CaptureFixture[str], recipe: str
) -> None:
    facts = diff(capsys, "full", recipe)
    assert (facts["a"]["file"], facts["b"]["file"], facts["identical"]) == ("full", recipe, False)
    assert (facts["both"], facts["only_a"], facts["only_b"]) == (80, 80, 0) and facts["overlap"] == 0.5
    assert (facts["changed"] > 0) == (recipe == "kvmerger")
    for layer, report in zip(facts["layers"], files[recipe], strict=True):
        assert list(layer["output_error"].values()) == pytest.approx(report)
        for head in layer["heads"]:
            assert head["only_a"] == sum(last - first + 1 for first, last in head["only_a_at"])
    back = diff(capsys, recipe, "full")
    assert (back["only_a"], back["only_b"]) == (0, 80)


@pytest.mark.parametrize("options", [[], ["--heads"]])
def test_a_table_for_people(
    files: dict[str, list[list[float]]], capsys: pytest.CaptureFixture[str], options: list[str]
) -> None:
    assert run(["diff", "full", "kvmerger", *options]) == 0
    seen = capsys.readouterr()
    lines = seen.out.splitlines()
    assert len(lines) == 4 + (4 if options else 2) and lines[-1].split()[3:6] == ["80", "0", "50.0%"]
    assert "median" in seen.err
    assert run(["diff", "snapkv+adakv", "kvmerger", *options]) == 0
    assert "neither snapshot has saved queries" in capsys.readouterr().err
    assert run(["diff", "full", "full", *options]) == 0
    assert capsys.readouterr().out.splitlines()[2:] == ["A and B are identical"]


def test_one_of_both_may_come_from_a_pipe(
    files: dict[str, list[list[float]]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    named = diff(capsys, "full", "kvmerger")
    for args in (["-", "kvmerger"], ["full", "-"]):
        with Path({"-": "full"}.get(args[0], "kvmerger")).open() as stdin:
            monkeypatch.setattr(sys, "stdin", stdin)
            piped = diff(capsys, *args)
        assert piped["layers"] == named["layers"] and "-" in (piped["a"]["file"], piped["b"]["file"])
    assert run(["diff", "-", "-"]) == 2
    assert "stdin" in capsys.readouterr().err


OTHERS: dict[str, tuple[Callable[[Snapshot], Snapshot], str]] = {
    "document": (lambda one: make_snapshot(tokens=40, seed=1), "document"),
    "model": (lambda one: replace(one, meta=replace(one.meta, model={**one.meta.model, "weights": "1"})), "model"),
    "precision": (lambda one: make_snapshot(tokens=40, dtype=torch.float32), "F32"),
    "shape": (lambda one: make_snapshot(tokens=40, layers=3), "model"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_what_is_not_the_same_is_not_compared(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change, words = OTHERS[case]
    write_snapshot(FULL, tmp_path / "a")
    write_snapshot(change(FULL), tmp_path / "b")
    assert run(["diff", f"{tmp_path}/a", f"{tmp_path}/b"]) == 5
    seen = capsys.readouterr()
    assert words in seen.err and "Traceback" not in seen.err and not seen.out


def test_damage_in_what_is_not_compared_is_found_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_snapshot(FULL, tmp_path / "a")
    raw = bytearray((tmp_path / "a").read_bytes())
    raw[header_of(tmp_path / "a").by_name["L001.stat.value_norm"].start] ^= 1
    (tmp_path / "b").write_bytes(raw)
    assert run(["diff", f"{tmp_path}/a", f"{tmp_path}/b"]) == 4
    assert "L001.stat.value_norm" in capsys.readouterr().err
