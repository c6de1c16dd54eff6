"""ZipVL in two precisions: which entries get more bits, what the quantiser makes of them, and the bytes it takes."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import make_snapshot, opened, packed, shrunk

from kvcli.errors import FormatError, UsageError
from kvcli.layers import stored_shapes
from kvcli.methods.zipvl_mixed import decode, mixed, shapes, split
from kvcli.probes import needed
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV

SIZES = {"layers": 2, "heads": 3, "q_heads": 6, "tokens": 83, "dim": 16}
ASK = Ask(0, 1, 8, 4, 4, 0, 0, 0, 1.0)


def layer(k: torch.Tensor, v: torch.Tensor) -> LayerKV:
    return LayerKV(k, v, torch.arange(k.shape[1], dtype=torch.int32).repeat(len(k), 1))


def coded(kv: LayerKV, scored: Scored | None, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    payload = mixed(kv, scored, ASK, **options)
    return decode(payload, kv.lens, high=options.get("high", 4), low=options.get("low", 2))


def test_values_are_levelled_by_channel_and_cut_by_entry() -> None:
    v = torch.tensor([[[1.0, -2.0, 100.0, 3.0], [2.0, 1.0, -50.0, -1.0]]])
    _, found = coded(layer(torch.zeros_like(v), v), None, high=2)
    expected = [[3.3807, -2, 100, 4.1405], [2, 2, -50, -1.2538]]
    assert found.tolist() == [pytest.approx(row, rel=2e-3) for row in expected]
    assert float((found - v[0]).square().mean()) == pytest.approx(1.0041, rel=0.02)


def test_keys_are_cut_by_channel_over_each_set() -> None:
    k = torch.tensor([[[0.0, 10.0], [1.0, 20.0], [3.0, 40.0], [100.0, 1000.0]]])
    scored = Scored(torch.tensor([[4.0, 3.0, 2.0, 1.0]]), weight=torch.tensor([1.0, 0.6, 0.3, 0.1]))
    found, _ = coded(layer(k, k), scored, share=0.75, high=2)
    assert found[[0, 1, 3]].tolist() == [[0, 10], [1, 20], [100, 1000]]  # the last is alone in its set
    assert found[2].tolist() == [3, 40]


def test_a_layer_has_as_many_good_entries_as_hold_the_share() -> None:
    scored = Scored(torch.rand(2, 5), weight=torch.tensor([1.0, 0.3, 0.1, 0.05, 0.02]))
    lens = torch.tensor([5, 3])
    counts = [split(scored, lens, tau=tau, share=None).tolist() for tau in (0.6, 0.8, 0.92, 0.96, 1.0)]
    assert counts == [[1, 1], [2, 2], [3, 3], [4, 3], [5, 3]]
    assert split(scored, lens, tau=0.5, share=0.4).tolist() == [2, 2]
    kept = replace(scored, score=torch.tensor([[math.inf] * 3 + [0, 0], [math.inf, 0, 0, 0, 0]]))
    assert split(kept, lens, tau=0.6, share=None).tolist() == [3, 1]
    assert split(None, lens, tau=0.6, share=None).tolist() == [5, 3]


@pytest.mark.parametrize("recipe", ["zipvl-mixed", "zipvl-mixed:tau=0.5", "zipvl-mixed:share=0.4,high=8,low=4"])
@pytest.mark.parametrize("before", ["", "snapkv+adakv", "kvmerger+adakv"])
def test_every_entry_stays_in_fewer_bits(recipe: str, before: str, tmp_path: Path) -> None:
    full = make_snapshot(**SIZES)
    if before:
        full = shrunk(full, before, tmp_path / "before", "60%", keep_stats=True)
    small = shrunk(full, recipe, tmp_path / "small", "")
    again = shrunk(full, recipe, tmp_path / "again", "")
    assert (tmp_path / "small").read_bytes() == (tmp_path / "again").read_bytes()
    for one, other, same in zip(full.rows, small.rows, again.rows, strict=True):
        assert torch.equal(one.pos, other.pos) and torch.equal(one.lens, other.lens)
        assert torch.equal(other.k, same.k)
        for a, b in ((one.k, other.k), (one.v, other.v)):
            error = (a.float() - b.float()).norm() / a.float().norm()
            assert 0 < float(error) < (0.12 if "high=8" in recipe else 0.45)
    assert small.meta.encode.startswith("zipvl-mixed") and "encode:zipvl-mixed/1" in small.meta.requires


def test_bytes_are_those_of_the_formula(tmp_path: Path) -> None:
    small = shrunk(make_snapshot(**SIZES), "zipvl-mixed:share=0.7,sink=4,recent=8", tmp_path / "a", "")
    H, N, D, p = 3, 83, 16, math.ceil(0.7 * 83)
    bits = H * (p * 4 + (N - p) * 2) * 2 * D  # keys and values
    params = 16 * (2 * 2 * H * D + 2 * H * N) + 32 * H * D  # of keys by set, of values by entry, channel factors
    found = shapes([N] * H, small.meta.layout, [p] * H, high=4, low=2)
    width = {"U8": 1, "F16": 2, "F32": 4, "I32": 4}
    total = sum(width[dtype] * math.prod(shape) for dtype, shape in found.values())
    assert total == (bits + params) // 8 + -(-H * N // 8) + 4 * H


def test_uniform_attention_takes_the_share_itself() -> None:
    rest = torch.linspace(1, 0, 101)[:100]
    assert [needed(rest, tau) for tau in (0.2, 0.5, 0.96)] == [20, 50, 96]


def test_it_takes_no_budget_and_no_other_score() -> None:
    with pytest.raises(UsageError, match="takes no --budget"):
        Recipe.parse("zipvl-mixed").budgets(["35%"])
    with pytest.raises(UsageError, match="does not fit"):
        Recipe.parse("snapkv+encode=zipvl-mixed")


def test_codes_are_not_made_of_codes_and_wrong_classes_are_found(tmp_path: Path) -> None:
    small = shrunk(make_snapshot(**SIZES), "zipvl-mixed", tmp_path / "a", "", keep_stats=True)
    with pytest.raises(Exception, match="encoded already"):
        shrunk(small, "zipvl-mixed", tmp_path / "b", "")
    assert torch.equal(opened(tmp_path / "a").rows[1].k, small.rows[1].k) and len(packed(small)) > 0
    kv = small.layer(0)
    payload = mixed(kv, None, ASK)
    payload["hi"] -= 1
    with pytest.raises(FormatError, match="classes"):
        decode(payload, kv.lens, high=4, low=2)


@pytest.mark.parametrize("bad", [None, torch.full((3,), 84), torch.full((3,), -1), torch.zeros(2), torch.zeros(3)])
def test_a_file_that_does_not_say_which_come_first(bad: torch.Tensor | None) -> None:
    step, layout = Recipe.parse("encode=zipvl-mixed").encode, make_snapshot(**SIZES).meta.layout
    hi = bad if bad is None or (len(bad) == 3 and not bad.any()) else bad.int()
    with pytest.raises(FormatError, match=r"L001\.hi"):
        stored_shapes(step, 1, torch.full((3,), 83), layout, hi)
