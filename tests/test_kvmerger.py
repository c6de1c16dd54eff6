"""KVMerger against the worked examples of its specification."""

import math

import pytest
import torch
from torch import Tensor

from kvcli.kernels.error import attend
from kvcli.kernels.limit import must_start
from kvcli.methods.kvmerger import kvmerger, kvmerger_score, protected
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV, Stats

ANGLES = [0.0, 10.0, 12.0, 80.0, 85.0, 90.0, 95.0, 170.0]
MASS = [3.0, 0.2, 0.5, 0.1, 0.4, 0.3, 0.1, 0.6]


def layer(k: Tensor, v: Tensor | None = None) -> LayerKV:
    pos = torch.arange(k.shape[1], dtype=torch.int32).repeat(len(k), 1)
    return LayerKV(k, k if v is None else v, pos)


def ask(B: int, N: int, sink: int = 0, recent: int = 0) -> Ask:
    return Ask(0, 1, B, B, N, sink, recent, 0, 1.0)


def example() -> tuple[LayerKV, Stats]:
    angle = torch.tensor(ANGLES).deg2rad()
    k = torch.stack([angle.cos(), angle.sin()], -1)[None]
    return layer(k, torch.arange(8.0)[None, :, None]), Stats(attn_mass=torch.tensor([MASS]))


def test_worked_example_with_two_protected_tokens() -> None:
    kv, stats = example()
    # The three equal cosines are equal only in exact arithmetic: write them so.
    link = [0.9848, 0.9994, 0.3746, 0.9962, 0.9962, 0.9962, 0.2588]
    cut = torch.tensor([[math.inf, *(-c for c in link)]]).masked_fill(
        must_start(torch.tensor([[True] + [False] * 6 + [True]])), math.inf
    )
    small, pivot = kvmerger(kv, stats, Scored(cut), torch.tensor([5]), ask(5, 8), values="mean")
    assert pivot.tolist() == [[0, 2, 3, 4, 7]]
    assert small.pos.tolist() == [[0, 2, 3, 4, 7]]
    assert small.span is not None and small.span.tolist() == [[1, 2, 1, 3, 1]]
    torch.testing.assert_close(small.k[0, 1], torch.tensor([0.98066, 0.19498]), atol=1e-5, rtol=0)
    torch.testing.assert_close(small.k[0, 3], torch.tensor([0.02320, 0.99757]), atol=1e-5, rtol=0)
    torch.testing.assert_close(small.v[0, :, 0], torch.tensor([0, 1.62246, 3, 4.73386, 7]), atol=1e-5, rtol=0)
    assert small.bias is None
    count, _ = kvmerger(kv, stats, Scored(cut), torch.tensor([5]), ask(5, 8), values="count")
    torch.testing.assert_close(count.v[0, :, 0], torch.tensor([0, 3.24492, 3, 14.20159, 7]), atol=1e-4, rtol=0)
    log, _ = kvmerger(kv, stats, Scored(cut), torch.tensor([5]), ask(5, 8), values="logcount")
    assert log.bias is not None
    torch.testing.assert_close(log.bias[0], torch.tensor([0, math.log(2), 0, math.log(3), 0]))
    torch.testing.assert_close(log.v, small.v)


def test_threshold_partitions_follow_from_the_scores() -> None:
    kv, stats = example()
    score = kvmerger_score(kv, stats, ask(3, 8)).score
    assert (score[0] > -0.9).nonzero().flatten().tolist() == [0, 3, 7]


@pytest.mark.parametrize(("values", "expected"), [("mean", 0.5), ("count", 1.5), ("logcount", 0.75)])
def test_what_is_exact_for_duplicates(values: str, expected: float) -> None:
    kv = layer(torch.zeros(1, 4, 2), torch.tensor([0.0, 1, 1, 1])[None, :, None].expand(1, 4, 2).contiguous())
    cut = torch.tensor([[math.inf, math.inf, -1.0, -1.0]])
    stats = Stats(attn_mass=torch.ones(1, 4))
    small, _ = kvmerger(kv, stats, Scored(cut), torch.tensor([2]), ask(2, 4), values=values)
    out = attend(torch.ones(1, 1, 2), torch.tensor([4]), small.entries, 1.0)
    assert out[0, 0, 0].item() == pytest.approx(expected)


def test_merging_a_merged_snapshot_adds_weights_up() -> None:
    kv = LayerKV(
        torch.ones(1, 3, 2), torch.ones(1, 3, 2), torch.tensor([[0, 3, 7]], dtype=torch.int32),
        bias=torch.tensor([[0.0, math.log(4), math.log(3)]]), span=torch.tensor([[1, 4, 3]], dtype=torch.int32),
    )  # fmt: skip
    cut, stats = torch.tensor([[math.inf, -1.0, -1.0]]), Stats(attn_mass=torch.ones(1, 8))
    small, _ = kvmerger(kv, stats, Scored(cut), torch.tensor([1]), ask(1, 8), values="logcount")
    assert small.bias is not None and small.span is not None
    assert small.bias.item() == pytest.approx(math.log(8))
    assert small.span.item() == 8
    alone, _ = kvmerger(kv, stats, Scored(cut), torch.tensor([3]), ask(3, 8), values="count")
    assert torch.equal(alone.v, kv.v) and alone.bias is not None
    torch.testing.assert_close(alone.bias, kv.bias)
    mean, _ = kvmerger(kv, stats, Scored(cut), torch.tensor([1]), ask(1, 8), values="mean")
    assert mean.bias is not None
    assert mean.bias.item() == pytest.approx(math.log(8 / 3))


@pytest.mark.parametrize("share", [0.02, 0.1, 0.22, 0.35, 0.5, 0.9])
def test_protected_runs_fit_the_budget(share: float) -> None:
    generator = torch.Generator().manual_seed(3)
    kv = layer(torch.randn(3, 400, 8, generator=generator))
    mass = torch.rand(3, 400, generator=generator)
    B = int(share * 400)
    for sink, recent in ((0, 0), (B // 8, B // 4)):
        kept = protected(kv, mass, ask(B, 400, sink, recent), share, 0)
        assert bool((must_start(kept).sum(1) <= B).all())
        assert bool(kept[:, :sink].all()) and bool(kept[:, 400 - recent :].all())


def test_raising_the_budget_refines_the_partition() -> None:
    generator = torch.Generator().manual_seed(4)
    score = torch.rand(1, 60, generator=generator)
    score[:, 0] = math.inf
    kv, stats = layer(torch.randn(1, 60, 4, generator=generator)), Stats(attn_mass=torch.rand(1, 60))
    starts = []
    for B in (10, 20, 40):
        small, _ = kvmerger(kv, stats, Scored(score), torch.tensor([B]), ask(B, 60), values="mean")
        assert small.span is not None and int(small.span.sum()) == 60
        begins = small.span[0].cumsum(0) - small.span[0]
        starts.append(set(begins.tolist()))
    assert starts[0] < starts[1] < starts[2]


def partition(kv: LayerKV, mass: Tensor, B: int) -> list[int]:
    stats = Stats(attn_mass=mass)
    score = kvmerger_score(kv, stats, ask(B, kv.pos.shape[1]))
    small, _ = kvmerger(kv, stats, score, torch.tensor([B]), ask(B, kv.pos.shape[1]), values="mean")
    assert small.span is not None
    return small.span[0].tolist()


def test_reversing_the_tokens_reverses_the_runs_and_scaling_keys_keeps_them() -> None:
    generator = torch.Generator().manual_seed(5)
    k, mass = torch.randn(1, 80, 6, generator=generator), torch.rand(1, 80, generator=generator)
    # The newest tokens are protected on one side only, so compare what the cosines alone decide.
    link = torch.cosine_similarity(k[:, 1:], k[:, :-1], dim=-1)
    sizes = []
    for cosines in (link, link.flip(1)):
        score = torch.cat([torch.full((1, 1), math.inf), -cosines], 1)
        kv = layer(k if cosines is link else k.flip(1))
        small, _ = kvmerger(kv, Stats(attn_mass=mass), Scored(score), torch.tensor([30]), ask(30, 80), values="mean")
        assert small.span is not None
        sizes.append(small.span[0].tolist())
    assert sizes[0] == sizes[1][::-1]
    assert partition(layer(k), mass, 30) == partition(layer(4.0 * k), mass, 30)


def test_four_runs_with_both_ends_protected() -> None:
    kv, stats = example()
    score = kvmerger_score(kv, stats, ask(4, 8, sink=1, recent=1)).score
    assert (score[0] > -0.9).nonzero().flatten().tolist() == [0, 1, 3, 7]


def test_attention_over_exact_duplicates_is_exact() -> None:
    generator = torch.Generator().manual_seed(6)
    times = torch.randint(1, 6, (25,), generator=generator)
    rows = [torch.randn(1, 25, 8, generator=generator).repeat_interleave(times, 1) for _ in range(2)]
    kv, N = layer(*rows), int(times.sum())
    cut = torch.full((1, N), -1.0)
    cut[0, times.cumsum(0) - times] = math.inf
    stats = Stats(attn_mass=torch.rand(1, N, generator=generator))
    small, _ = kvmerger(kv, stats, Scored(cut), torch.tensor([25]), ask(25, N), values="logcount")
    q, later = torch.randn(2, 9, 8, generator=generator), torch.full((9,), N)
    torch.testing.assert_close(
        attend(q, later, small.entries, 0.35), attend(q, later, kv.entries, 0.35), atol=1e-6, rtol=1e-5
    )
