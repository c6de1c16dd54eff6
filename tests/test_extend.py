"""Tokens appended to a snapshot: as if all had been read in one go, as far as entries and statistics are there."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from make import packed, same, same_snapshot, shrunk
from test_architectures import build

from kvcli.errors import InfeasibleError, KvError, UsageError
from kvcli.model.extend import aim, extend
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix, logits
from kvcli.snapshot import Rows, append
from kvcli.storage import Reader

IDS = torch.randint(5, 290, (150,), generator=torch.Generator().manual_seed(0)).tolist()
TURN, ASKED = IDS[40:80], [7, 99, 230, 41]
SEQ = (3, "\n", True)
RECIPES = ["snapkv+adakv", "snapkv", "kvmerger"]


@pytest.mark.parametrize("chunk", [1024, 7])
@pytest.mark.parametrize("n", [1, 40, 100, 149])
def test_it_is_as_if_all_had_been_read_in_one_go(model: Model, n: int, chunk: int) -> None:
    whole = prefill(model, IDS, SEQ)
    part = extend(model, prefill(model, IDS[:n], SEQ), IDS[n:], chunk=chunk)
    assert part.meta == whole.meta and torch.equal(part.ids, whole.ids)
    close = {"atol": 1e-5, "rtol": 1e-5}
    for i in range(2):
        for name in ("k", "v", "pos", "lens"):
            torch.testing.assert_close(getattr(part.rows[i], name), getattr(whole.rows[i], name), **close)
        for name in ("q_last", "q_last_pos", "attn_mass", "value_norm"):
            torch.testing.assert_close(getattr(part.stats[i], name), getattr(whole.stats[i], name), **close)
    torch.testing.assert_close(part.extra["stat.final_hidden"], whole.extra["stat.final_hidden"], **close)


@pytest.mark.parametrize("n", [30, 60])
@pytest.mark.parametrize("name", ["mistral sliding", "gemma2", "gemma3_text", "gpt_oss", "mixtral", "gpt2"])
def test_windows_soft_caps_and_sinks(name: str, n: int, tmp_path: Path) -> None:
    """With a window of 17 to 40 tokens, reached before the snapshot ends or only by what is appended."""
    model = load(str(build(name, tmp_path / "model")), dtype="float32")
    whole = prefill(model, IDS[:90], SEQ)
    part = extend(model, prefill(model, IDS[:n], SEQ), IDS[n:90], chunk=11)
    assert part.meta == whole.meta
    for rows, other in zip(part.rows, whole.rows, strict=True):
        assert torch.equal(rows.pos, other.pos) and torch.equal(rows.lens, other.lens)
        torch.testing.assert_close(rows.k, other.k, atol=1e-4, rtol=1e-4)
    for stats, again in zip(part.stats, whole.stats, strict=True):
        assert stats.present().keys() == again.present().keys()
        for field in {*stats.present()} - {"q_probe", "q_probe_pos"}:
            torch.testing.assert_close(getattr(stats, field), getattr(again, field), atol=1e-4, rtol=1e-4)
    small = shrunk(whole, "snapkv+adakv", tmp_path / "a") if whole.meta.held else whole
    after = logits(model, Prefix.read(extend(model, small, TURN), model), ASKED, 4)
    torch.testing.assert_close(after, logits(model, Prefix.read(small, model), TURN + ASKED, 4), atol=1e-3, rtol=1e-3)
    aimed = aim(model, whole, ASKED)
    assert [part.q_last is None for part in aimed.stats] == [part.q_last is None for part in whole.stats]


def test_probes_stay_evenly_spread_and_are_the_queries_of_their_positions(model: Model) -> None:
    part = extend(model, prefill(model, IDS[:100], SEQ), IDS[100:])
    spread = torch.linspace(0, 149, 64)
    again = prefill(model, IDS, SEQ)
    for stats, other in zip(part.stats, again.stats, strict=True):
        assert stats.q_probe is not None and stats.q_probe_pos is not None and other.q_last is not None
        assert len(stats.q_probe_pos) == 64 == stats.q_probe.shape[1]
        assert float((stats.q_probe_pos - spread).abs().max()) <= 1.5
        late = stats.q_probe_pos >= 150 - 64
        at = stats.q_probe_pos[late].long() - (150 - 64)
        torch.testing.assert_close(stats.q_probe[:, late], other.q_last[:, at], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_compressed_snapshot_goes_on_as_the_model_would(model: Model, recipe: str, tmp_path: Path) -> None:
    small = shrunk(prefill(model, IDS, SEQ), recipe, tmp_path / "a")
    longer = extend(model, small, TURN, chunk=16)
    expected = logits(model, Prefix.read(small, model), TURN + ASKED, 4)
    torch.testing.assert_close(logits(model, Prefix.read(longer, model), ASKED, 4), expected, atol=1e-4, rtol=0)
    assert longer.meta.history == small.meta.history and longer.meta.seq.tokens == 190
    for i in range(2):
        before, after = small.layer(i), longer.layer(i)
        assert torch.equal(after.lens, before.lens + 40)
        for head, count in enumerate(before.lens.tolist()):
            assert torch.equal(after.k[head, :count], before.k[head, :count])
            assert torch.equal(after.pos[head, count : count + 40], torch.arange(150, 190, dtype=torch.int32))
            assert before.bias is None or after.bias is not None
            assert after.bias is None or not after.bias[head, count : count + 40].any()


@pytest.mark.parametrize("keep_stats", [False, True])
def test_what_a_longer_snapshot_still_knows(model: Model, keep_stats: bool, tmp_path: Path) -> None:
    full = prefill(model, IDS, SEQ)
    longer = extend(model, shrunk(full, "snapkv+adakv", tmp_path / "a", keep_stats=keep_stats), TURN)
    kept = range(126, 190) if keep_stats else range(150, 190)
    for stats in longer.stats:
        assert stats.attn_mass is None and stats.value_norm is None
        assert (stats.q_probe is not None) == keep_stats
        assert stats.q_last_pos is not None and stats.q_last_pos.tolist() == list(kept)
    assert "report" not in longer.extra and list(longer.extra) == list(full.extra)
    (tmp_path / "b").write_bytes(packed(longer))
    with Reader(tmp_path / "b") as reader:
        reader.verify()
        same_snapshot(reader.snapshot(), longer)
    again = shrunk(longer, "snapkv", tmp_path / "c")
    assert sum(len(rows.k) for rows in again.rows) == 2 * 2 * 57  # 30 % of all 190 tokens
    with pytest.raises(InfeasibleError, match="attn_mass"):
        shrunk(longer, "kvmerger", tmp_path / "d")


def test_turn_after_turn(model: Model) -> None:
    snapshot, whole = prefill(model, IDS[:50], SEQ), prefill(model, IDS, SEQ)
    for start in range(50, 150, 20):
        snapshot = extend(model, snapshot, IDS[start : start + 20])
    assert snapshot.meta == whole.meta
    mass, expected = snapshot.stats[1].attn_mass, whole.stats[1].attn_mass
    assert mass is not None and expected is not None
    torch.testing.assert_close(mass, expected, atol=1e-5, rtol=1e-4)


def test_a_question_aims_q_last_and_changes_nothing_else(model: Model, tmp_path: Path) -> None:
    plain = prefill(model, IDS, SEQ)
    aimed, long = aim(model, plain, ASKED), aim(model, plain, TURN * 2, chunk=9)
    for i in range(2):
        same(aimed.rows[i], plain.rows[i])
        same(
            replace(aimed.stats[i], q_last=None, q_last_pos=None), replace(plain.stats[i], q_last=None, q_last_pos=None)
        )
    both = prefill(model, IDS + TURN * 2, SEQ)
    for stats, other in zip(long.stats, both.stats, strict=True):
        torch.testing.assert_close(stats.q_last, other.q_last, atol=1e-5, rtol=1e-5)
        assert torch.equal(stats.q_last_pos, other.q_last_pos)
    assert aimed.stats[0].q_last_pos.tolist() == [150, 151, 152, 153]
    assert aimed.meta == plain.meta and aimed.extra == plain.extra
    small, other = shrunk(aimed, "snapkv", tmp_path / "a"), shrunk(plain, "snapkv", tmp_path / "b")
    assert bool(small.extra["report"].isfinite().all())
    assert not torch.equal(small.rows[0].pos, other.rows[0].pos)
    assert not torch.equal(small.extra["report"], other.extra["report"])


def test_queries_of_a_question_do_not_outlive_it(model: Model) -> None:
    aimed = aim(model, prefill(model, IDS, SEQ), ASKED)
    stats = extend(model, aimed, TURN).stats[0]
    assert stats.q_last_pos is not None and stats.q_last_pos.tolist() == list(range(150, 190))


def test_what_cannot_be_appended_is_refused(model: Model) -> None:
    snapshot = prefill(model, IDS, SEQ)
    with pytest.raises(UsageError, match="nothing"):
        extend(model, snapshot, [])
    for work in (extend, aim):
        with pytest.raises(InfeasibleError, match="no room"):
            work(model, snapshot, IDS * 3)


def test_nan_is_named(model: Model) -> None:
    snapshot = prefill(model, IDS, SEQ)
    model.net.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(KvError, match="layer 1"):
        extend(model, snapshot, ASKED)
    with pytest.raises(KvError, match="NaN"):
        aim(model, snapshot, ASKED)
    model.net.model.layers[1].self_attn.v_proj.weight[0, 0] = 0
    model.net.model.norm.weight[3] = torch.inf
    with pytest.raises(KvError, match="last hidden state"):
        prefill(model, IDS, SEQ)


def test_append_drops_what_is_too_early_and_fills_in() -> None:
    one = torch.ones(5, 3)
    old = Rows(one, one, torch.tensor([0, 4, 1, 2, 3]), torch.tensor([2, 3]), torch.arange(5.0))
    new = Rows(2 * one[:2], 2 * one[:2], torch.tensor([5, 5]), torch.tensor([1, 1]))
    both = append(old, new, since=2)
    assert both.pos.tolist() == [4, 5, 2, 3, 5] and both.lens.tolist() == [2, 3]
    assert both.bias is not None and both.bias.tolist() == [1, 0, 3, 4, 0]
    assert both.k[:, 0].tolist() == [1, 2, 1, 1, 2] and both.span is None
