"""GUI-KV on the worked examples of its specification: frames, saliency, redundancy, and the three together."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvcli.errors import InfeasibleError
from kvcli.kernels.rope import rotate
from kvcli.methods.guikv import frames, guikv, outside, saliency, subspace
from kvcli.methods.snapkv import snapkv
from kvcli.pipeline import protect
from kvcli.registry import Ask
from kvcli.snapshot import LayerKV, Stats, top_mask
from kvcli.window import smooth

ROPE = {"head_dim": 16, "inv_freq": [1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001, 0.0003]}


def segments(*rows: tuple[int, int, int]) -> Tensor:  # begin, end, type
    return torch.tensor([[*row, i] for i, row in enumerate(rows)], dtype=torch.int32)


def asking(N: int, B: int, recent: int, *rows: tuple[int, int, int]) -> Ask:
    return Ask(0, 1, B, B, N, 0, recent, 0, 1.0, rope=ROPE, segments=segments(*rows) if rows else None)


def drawn(N: int, H: int = 2, D: int = 16, W: int = 8, seed: int = 0) -> tuple[LayerKV, Stats]:
    rng = torch.Generator().manual_seed(seed)
    k, v = torch.randn(2, H, N, D, generator=rng)
    pos = torch.arange(N, dtype=torch.int32)
    q = torch.randn(2 * H, W, D, generator=rng)
    norms = torch.rand(2, N, generator=rng) + 1
    stats = Stats(q_last=q, q_last_pos=pos[-W:], resid_norm=norms[0], attn_in_norm=norms[1])
    return LayerKV(k, v, pos.expand(H, N)), stats


def test_saliency() -> None:
    norm = torch.tensor([3.0, 4, 5, 8])
    assert saliency(norm, 3.5).tolist() == pytest.approx([0.185821, 0.212097, 0.242089, 0.359993], abs=1e-6)
    assert saliency(norm, 1 / 3.5).tolist() == pytest.approx([0.0003, 0.0015, 0.0077, 0.9905], abs=1e-4)
    assert saliency(8 + 1e-6 * norm, 3.5).tolist() == [0.25] * 4  # rounding is not salient
    assert saliency(norm[:1], 3.5).tolist() == [1.0]


def test_smoothing_counts_what_lies_beyond_the_ends() -> None:
    a = torch.tensor([[0.0, 0, 1, 0, 0, 0, 0.5]])
    assert smooth(a, 5, "avg")[0].tolist() == pytest.approx([0.2, 0.2, 0.2, 0.2, 0.3, 0.1, 0.1])


def test_what_lies_outside_depends_on_the_basis() -> None:
    now = torch.tensor([[2.0, 0, 0], [1, 3, 0], [0, 0, 5]])
    past = torch.tensor([[1.0, 2, 0], [0, 0, 4], [1, 0, 1], [2, 2, 0.5]])
    assert outside(past, subspace(now, 2, "first")).tolist() == pytest.approx([0, 4, 1, 0.5], abs=1e-6)
    assert outside(past, subspace(now, 2, "svd")).tolist() == pytest.approx([0.0620, 0, 0.8817, 0.8196], abs=1e-4)
    turned = subspace(now[[2, 0, 1]], 2, "svd")
    torch.testing.assert_close(outside(3 * past, turned), 3 * outside(past, subspace(now, 2, "svd")))


def worked() -> tuple[LayerKV, Stats]:
    """12 tokens, a window of 3 with the attention of the example; in frame 1 only keys leave the first direction."""
    a = torch.tensor([0.9, 0.05, 0.02, 0.03, 0.1, 0.04, 0.01, 0.02, 0.2]) / 3
    seen = torch.ones(3, 3).tril()
    weight = torch.cat([a.expand(3, 9), (1 - a.sum()) * seen / seen.sum(1, keepdim=True)], 1)  # [W, N]
    k = torch.zeros(1, 12, 16)
    k[0, :, :3] = weight.log().clamp(min=-200).T
    k[0, 1:4, 3] = torch.tensor([0.1, 0.9, 0.5])
    norm, other = torch.ones(2, 12)
    norm[5:8], other[5:8] = torch.tensor([[3.0, 4, 5], [5, 4, 3]])
    pos = torch.arange(12, dtype=torch.int32)
    q = torch.eye(3, 16)[None]
    return LayerKV(k, k, pos[None]), Stats(q_last=q, q_last_pos=pos[-3:], resid_norm=norm, attn_in_norm=other)


def test_end_to_end() -> None:
    kv, stats = worked()
    ask = asking(12, 6, 3, (1, 4, 3), (5, 8, 3))
    score = protect(guikv(kv, stats, ask, window=3, kernel=1, rank=1), kv, ask).score
    want = [0.9, -1, 0.02, 0.03, 0.1, 0.527626, 0.658889, 0.883485, 0.2, math.inf, math.inf, math.inf]
    assert score[0].tolist() == pytest.approx(want, abs=1e-5)
    assert top_mask(score, torch.tensor([6]))[0].nonzero()[:, 0].tolist() == [0, 6, 7, 9, 10, 11]
    # Norms that say nothing leave the temporal part as it was, and one frame leaves the spatial part.
    flat = guikv(kv, replace(stats, resid_norm=torch.ones(12)), ask, window=3, kernel=1, rank=1).score[0]
    assert flat[1] == -1 and flat[5:8].tolist() == pytest.approx([0.04 + 2 / 3, 0.01 + 2 / 3, 0.02 + 2 / 3], abs=1e-5)
    alone = guikv(kv, stats, asking(12, 6, 3, (5, 8, 3)), window=3, kernel=1, rank=1).score[0]
    assert alone[:9].tolist() == pytest.approx([0.9, 0.05, *want[2:9]], abs=1e-5)
    other = guikv(kv, stats, ask, window=3, kernel=1, rank=1, norm="attn_in").score[0]
    assert other[5:8].tolist() == pytest.approx([0.903485, 0.658889, 0.507626], abs=1e-5)


@pytest.mark.parametrize(("N", "B", "begin", "zeros"), [(100, 20, 60, 48), (95, 33, 32, 20)])
def test_how_many_are_redundant(N: int, B: int, begin: int, zeros: int) -> None:
    kv, stats = drawn(N)
    score = guikv(kv, stats, asking(N, B, 8, (0, begin, 3), (begin, begin + 20, 3))).score
    assert (score == -1).sum(1).tolist() == [zeros, zeros]
    assert bool((score[:, begin:] >= 0).all())


def test_without_frames_and_saliency_it_is_snapkv() -> None:
    kv, stats = drawn(90)
    ask = asking(90, 30, 8, (10, 70, 0))
    plain = snapkv(kv, stats, ask, window=8, kernel=5, pool="avg").score
    assert torch.equal(guikv(kv, stats, ask, alpha=0.0).score, plain)
    added = guikv(kv, stats, ask).score - plain
    assert added.sum(1).tolist() == pytest.approx([2.0, 2.0], abs=1e-5)
    assert not bool(added[:, :10].any()) and not bool(added[:, 70:].any())


def test_a_frame_shown_again_is_redundant_once_the_rotation_is_undone() -> None:
    rng = torch.Generator().manual_seed(3)
    kv, stats = drawn(80, H=1)
    flat = torch.randn(1, 80, 16, generator=rng)
    flat[0, 40:60] = torch.randn(20, 4, generator=rng) @ torch.randn(4, 16, generator=rng)  # rank(C) = r = 16 / 4
    flat[0, 5:25] = flat[0, 40:60]
    freq = torch.tensor(ROPE["inv_freq"])
    kv = replace(kv, k=rotate(flat, kv.pos, freq))
    ask = asking(80, 20, 8, (5, 25, 3), (25, 40, 3), (40, 60, 3))
    drop = 60 * 35 // 80
    pre, rotated = (guikv(kv, stats, ask, keys=keys).score[0] == -1 for keys in ("pre", "rotated"))
    assert int(pre.sum()) == int(rotated.sum()) == drop == 26
    assert bool(pre[5:25].all()) and not bool(rotated[5:25].all())


def test_undoing_the_rotation_needs_its_frequencies() -> None:
    check = guikv.parts["check"]
    check(asking(80, 20, 8), keys="pre")
    with pytest.raises(InfeasibleError, match="keys=pre"):
        check(replace(asking(80, 20, 8), rope={}), keys="pre")
    check(replace(asking(80, 20, 8), rope={}), keys="rotated")


def test_frames_are_segments_of_the_last_kind_before_the_window() -> None:
    rows = (0, 10, 3), (10, 20, 0), (20, 30, 3), (30, 40, 1), (40, 55, 3), (60, 75, 0)
    assert frames(asking(80, 9, 0, *rows), 60) == ([(0, 10), (20, 30), (40, 55)], "")
    assert frames(asking(80, 9, 0, *rows), 54) == ([(30, 40)], "")
    assert frames(asking(80, 9, 0, *rows), 80) == ([(10, 20), (60, 75)], "")
    for ask in (asking(300, 9, 0), asking(300, 9, 0, (200, 300, 0))):
        found, note = frames(ask, 292)
        assert found == [(0, 36), (36, 164), (164, 292)] and "every 128 tokens" in note
    assert frames(asking(4, 1, 0), 0)[0] == []


def test_ragged_heads_count_what_they_hold() -> None:
    kv, stats = drawn(60, H=2)
    pos = kv.pos.clone()
    pos[1, :30] = torch.arange(30, 60)
    pos[1, 30:] = -1
    gone = pos[..., None] < 0
    small = LayerKV(kv.k.masked_fill(gone, math.nan), kv.v.masked_fill(gone, math.nan), pos)
    score = guikv(small, stats, asking(60, 15, 8, (0, 20, 3), (20, 40, 3), (40, 50, 3))).score
    dropped = score == -1
    assert dropped.sum(1).tolist() == [45 * 40 // 60, 15 * 10 // 30]  # the second holds 10 tokens of earlier frames
    assert bool((dropped[1, :10].sum() == 5) & small.real[dropped].all())
