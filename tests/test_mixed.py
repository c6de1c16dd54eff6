"""ZipVL in two precisions: which entries get more bits, what the quantiser makes of them, and the bytes it takes."""

import io
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import make_snapshot, opened, packed, shrunk
from test_laws import padded
from test_storage import rebuilt

import kvcli
from kvcli.codes import quantised
from kvcli.errors import FormatError, UsageError
from kvcli.kernels.codes import unpack
from kvcli.layers import stored_shapes
from kvcli.methods.zipvl_mixed import decode, mixed, mixed_score, split
from kvcli.model.load import Model
from kvcli.model.prefix import Prefix, logits
from kvcli.pipeline import carry_out, make_plans, protect
from kvcli.probes import needed, probe_mass, remaining
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV, Stats
from kvcli.storage import Reader, verify

SIZES = {"layers": 2, "heads": 3, "q_heads": 6, "tokens": 83, "dim": 16}
ASK = Ask(0, 1, 8, 4, 4, 0, 0, 0, 1.0)


def layer(k: torch.Tensor, v: torch.Tensor) -> LayerKV:
    return LayerKV(k, v, torch.arange(k.shape[1], dtype=torch.int32).repeat(len(k), 1))


def coded(kv: LayerKV, scored: Scored | None, **options: float) -> tuple[torch.Tensor, torch.Tensor]:
    payload = mixed(kv, scored, ASK, **options)
    return decode(payload, kv.lens, high=options.get("high", 4), low=options.get("low", 2))


def test_values_are_levelled_by_channel_and_cut_by_entry() -> None:
    v = torch.tensor([[[1.0, -2.0, 100.0, 3.0], [2.0, 1.0, -50.0, -1.0]]])
    kv = layer(torch.zeros_like(v), v)
    payload, (_, found) = mixed(kv, None, ASK, high=2), coded(kv, None, high=2)
    torch.testing.assert_close(payload["v.factor"], torch.tensor([[2, 2, 100, 3]]).sqrt())
    assert unpack(payload["v.hi.q"], 2, 4).tolist() == [[1, 0, 3, 1], [3, 3, 0, 2]]
    expected = [[3.3807, -2, 100, 4.1405], [2, 2, -50, -1.2538]]
    assert found.tolist() == [pytest.approx(row, rel=2e-3) for row in expected]
    assert float((found - v[0]).square().mean()) == pytest.approx(1.0041, rel=0.02)
    assert float((quantised(v[0], 2, 1, 4).rows() - v[0]).square().mean()) == pytest.approx(5.5, rel=0.01)  # plain


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
    H, N, D = 3, 83, 16
    for share, p in ((0.7, 58), (0.07, 12), (0.0, 12), (1.0, 83)):  # 4 and 8 must be among them
        shrunk(make_snapshot(**SIZES), f"zipvl-mixed:share={share},sink=4,recent=8", tmp_path / "a", "")
        with Reader(tmp_path / "a") as file:
            assert [file.tensor(f"L00{i}.hi").tolist() for i in range(2)] == [[p] * H] * 2
            found = {name[5:]: entry.nbytes for name, entry in file.header.by_name.items() if name.startswith("L001")}
        bits = H * (p * 4 + (N - p) * 2) * 2 * D  # keys and values
        params = 16 * (2 * 2 * H * D + 2 * H * N) + 32 * H * D  # of keys by set, of values by entry, channel factors
        assert sum(found.values()) == (bits + params) // 8 + -(-H * N // 8) + 4 * H


@pytest.mark.parametrize(("share", "high", "low", "expected"), [(0.4, 8, 4, 5.6), (0.6, 4, 2, 3.2), (0.28, 4, 2, 2.56)])
def test_bits_a_number(share: float, high: int, low: int, expected: float, tmp_path: Path) -> None:
    full = make_snapshot(tokens=100)
    shrunk(full, f"zipvl-mixed:share={share},high={high},low={low},sink=0,recent=0", tmp_path / "a", "")
    codes = [entry.nbytes for entry in Reader(tmp_path / "a").header.entries if entry.name.endswith(".q")]
    assert 8 * sum(codes) == expected * 2 * 2 * 100 * 2 * 8


def test_the_better_ones_are_those_most_looked_at_and_those_that_must_stay(tmp_path: Path) -> None:
    full, tau = make_snapshot(**SIZES, dtype=torch.float32), 0.5
    small = shrunk(full, f"zipvl-mixed:tau={tau},high=8,sink=1,recent=2", tmp_path / "a", "")
    for i in range(2):
        kv, asked = full.layer(i), Ask(i, 2, 0, 0, 83, 0, 0, 0, 0.25)
        mass, by_query = probe_mass(kv, full.stats[i], asked)
        by_query[[0, 81, 82]] = math.inf
        p = needed(remaining(mass), tau)
        better = torch.zeros(83, dtype=torch.bool)
        better[by_query.argsort(descending=True)[:p]] = True
        off = (small.layer(i).v - kv.v).abs().amax(-1)
        assert 10 < p < 70 and float(off[:, better].max()) < 0.1 < 5 * float(off[:, ~better].min())


@pytest.mark.parametrize(("heads", "tokens"), [(1, 300), (2, 4000), (3, 300), (8, 4000)])
def test_heads_and_lengths(heads: int, tokens: int, tmp_path: Path) -> None:
    full = make_snapshot(heads=heads, q_heads=2 * heads, tokens=tokens)
    small = shrunk(full, "zipvl-mixed:tau=0.8", tmp_path / "a", "")
    verify(tmp_path / "a")
    assert all(torch.equal(one.pos, other.pos) for one, other in zip(full.rows, small.rows, strict=True))


def test_padding_is_never_read_and_heads_may_change_places() -> None:
    kv, stats = padded(0.0)
    asked = Ask(0, 1, 0, 0, 83, 2, 3, 0, 0.25)

    def run(kv: LayerKV, stats: Stats) -> LayerKV:
        scored = protect(mixed_score(kv, stats, asked), kv, asked)
        # as the pipeline hands them on: a padded slot has the score of the first entry, which must stay
        scored = replace(scored, score=torch.where(kv.real, scored.score, scored.score[:, :1]))
        rows = kv.rows()
        k, v = coded(kv, scored, share=0.3)
        return LayerKV.from_rows(replace(rows, k=k, v=v))

    clean, dirty = run(kv, stats), run(*padded(math.nan))
    assert torch.equal(clean.k, dirty.k) and torch.equal(clean.v, dirty.v)
    turn, heads = torch.tensor([2, 0, 1]), torch.tensor([4, 5, 0, 1, 2, 3])
    assert stats.q_last is not None and stats.q_probe is not None
    moved = replace(stats, q_last=stats.q_last[heads], q_probe=stats.q_probe[heads])
    after = run(LayerKV(kv.k[turn], kv.v[turn], kv.pos[turn]), moved)
    assert torch.equal(clean.k[turn], after.k) and torch.equal(clean.v[turn], after.v)


def test_uniform_attention_takes_the_share_itself() -> None:
    rest = torch.linspace(1, 0, 101)[:100]
    assert [needed(rest, tau) for tau in (0.2, 0.5, 0.96)] == [20, 50, 96]


def test_it_takes_no_budget_and_no_other_score() -> None:
    with pytest.raises(UsageError, match="takes no --budget"):
        Recipe.parse("zipvl-mixed").budgets(["35%"])
    with pytest.raises(UsageError, match="does not fit"):
        Recipe.parse("snapkv+encode=zipvl-mixed")
    with pytest.raises(UsageError, match="names no score"):
        make_plans(make_snapshot(**SIZES), Recipe.parse("encode=zipvl-mixed"), [None])


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


FORGED = {
    "more come first than there are": ("hi", torch.tensor([84, 40, 40], dtype=torch.int32), r"L000\.hi"),
    "fewer than none": ("hi", torch.tensor([-1, 40, 40], dtype=torch.int32), r"L000\.hi"),
    "of another kind": ("hi", torch.tensor([40, 40, 40]), r"L000\.hi"),
    "of another shape": ("hi", torch.tensor([40, 40], dtype=torch.int32), r"L000\.hi"),
    "another sum": ("hi", torch.tensor([40, 40, 41], dtype=torch.int32), r"L000\.k\.hi\.q"),
    "other heads": ("hi", torch.tensor([40, 39, 41], dtype=torch.int32), "classes"),
    "other classes": ("k.class", torch.full((32,), 255, dtype=torch.uint8), "classes"),
    "a factor that is no number": ("v.factor", torch.full((3, 16), math.nan), "NaN"),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_file_whose_sets_do_not_fit(case: str) -> None:
    out, name, tensor, words = io.BytesIO(), *FORGED[case]
    full, recipe = make_snapshot(**SIZES), Recipe.parse("zipvl-mixed:share=0.48")
    carry_out(full, make_plans(full, recipe, [None]), [out])
    assert opened(io.BytesIO(rebuilt(out.getvalue(), {}))).rows[0].lens.tolist() == [83] * 3
    with pytest.raises(FormatError, match=words):
        verify(io.BytesIO(rebuilt(out.getvalue(), {}, **{f"L000.{name}": tensor})))


def test_it_is_resumed_from(model: Model) -> None:
    text = "The harbour opened at six. " * 9 + "The new ferry is called Kestrel.\n"
    full = kvcli.prefill(text, model, raw=True)
    ids = model.tokenizer.encode("What is it called?")
    want = logits(model, Prefix.read(full, model), ids, 1)
    off = []
    for high, low in ((8, 8), (4, 2)):
        small = kvcli.compress(full, f"zipvl-mixed:high={high},low={low},share=0.5")
        off.append(float((logits(model, Prefix.read(small, model), ids, 1) - want).norm() / want.norm()))
    assert 0 < 5 * off[0] < off[1] < 0.5
