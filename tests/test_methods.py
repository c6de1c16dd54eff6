"""What is peculiar to one method, from the worked examples of its specification."""

import math

import pytest
import torch

from kvcli.methods.adakv import share_layer
from kvcli.methods.snapkv import snapkv
from kvcli.methods.streamingllm import streamingllm
from kvcli.pipeline import protect
from kvcli.registry import Ask, Scored, named, stages
from kvcli.snapshot import LayerKV, Stats, mask_index, top_mask
from kvcli.window import smooth

U = torch.tensor([[0.05, 0.30, 0.02, 0.01, 0.01, 0.20, 0.02, 0.04, 0.03]])


def test_snapkv_pooling() -> None:
    assert smooth(U, 3, "max")[0].tolist() == pytest.approx([0.3, 0.3, 0.3, 0.02, 0.2, 0.2, 0.2, 0.04, 0.04])
    average = [0.11667, 0.12333, 0.11, 0.01333, 0.07333, 0.07667, 0.08667, 0.03, 0.02333]
    assert smooth(U, 3, "avg")[0].tolist() == pytest.approx(average, abs=1e-5)
    assert torch.equal(smooth(U, 1, "max"), U)
    pooled_max, pooled_avg = smooth(U, 3, "max"), smooth(U, 3, "avg")
    tops = (
        (U, 3, [0, 1, 5]),
        (pooled_max, 3, [0, 1, 2]),
        (pooled_avg, 3, [0, 1, 2]),
        (pooled_max, 6, [0, 1, 2, 4, 5, 6]),
    )
    for pooled, n, expected in tops:
        assert mask_index(top_mask(pooled, torch.tensor([n])))[0].tolist() == expected


def test_snapkv_window_scores_zero_and_is_kept_by_recent() -> None:
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(1, 20, 4, generator=generator)
    kv = LayerKV(k, k, torch.arange(20, dtype=torch.int32)[None])
    stats = Stats(q_last=torch.randn(2, 8, 4, generator=generator), q_last_pos=torch.arange(12, 20, dtype=torch.int32))
    ask = Ask(0, 1, 10, 10, 20, 0, 4, 0, 0.5)
    scored = snapkv(kv, stats, ask, window=4, kernel=1)
    assert scored.score[0, 16:].tolist() == [0, 0, 0, 0]
    rows = torch.cat(
        [torch.softmax(kv.k[0, : i + 1] @ stats.q_last[:, i - 12].T * 0.5, 0)[:16] for i in range(16, 20)], 1
    )
    torch.testing.assert_close(scored.score[0, :16], rows.sum(1) / 2)
    assert bool(protect(scored, kv, ask).score[0, 16:].isposinf().all())


@pytest.mark.parametrize(("floor", "expected"), [(0.0, [5, 1]), (0.2, [5, 1]), (0.5, [4, 2]), (1.0, [3, 3])])
def test_adakv_counts(floor: float, expected: list[int]) -> None:
    score = torch.tensor([[0.4, 0.3, 0.2, 0.05, 0.05], [0.9, 0.04, 0.03, 0.02, 0.01]])
    assert share_layer(Scored(score), 6, floor).tolist() == expected


def test_adakv_keeps_the_most_mass_and_identical_heads_get_even_shares() -> None:
    score = torch.tensor([[0.4, 0.3, 0.2, 0.05, 0.05], [0.9, 0.04, 0.03, 0.02, 0.01]])
    for floor, mass in ((1.0, 1.87), (0.0, 1.90)):
        count = share_layer(Scored(score), 6, floor)
        assert float((score * top_mask(score, count)).sum()) == pytest.approx(mass)
    assert share_layer(Scored(score[:1].expand(3, 5)), 9, 0.0).tolist() == [3, 3, 3]


def test_adakv_protected_entries_are_beside_the_shares() -> None:
    score = torch.tensor([[math.inf, 0.4, 0.3, 0.2, 0.05, 0.05], [math.inf, 0.9, 0.04, 0.03, 0.02, 0.01]])
    assert share_layer(Scored(score), 8, 0.0).tolist() == [6, 2]


def test_streamingllm_keeps_sinks_and_newest() -> None:
    kv = LayerKV(torch.zeros(1, 10, 2), torch.zeros(1, 10, 2), torch.arange(10, dtype=torch.int32)[None])
    ask = Ask(0, 1, 6, 6, 10, 2, 0, 0, 1.0)
    scored = protect(streamingllm(kv, Stats(), ask), kv, ask)
    small, _ = named("evict")["reduce"](kv, Stats(), scored, torch.tensor([6]), ask)
    assert small.pos.tolist() == [[0, 1, 6, 7, 8, 9]]


def test_every_method_says_where_it_comes_from() -> None:
    ours = {"evict", "global", "random", "raw", "uniform", "int8"}
    for stage in stages():
        source = stage.source
        assert (source.paper == "") == (stage.name in ours), stage.name
        assert (source.year is None) == (source.paper == "") and (source.checked or stage.name in ours)
        kinds = {other.source for other in stages() if other.name == stage.name}
        assert len(kinds) == 1, stage.name
