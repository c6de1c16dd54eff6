"""Ragged heads: flat rows, padded heads and parts of them are turned into one another without the loss of a bit."""

import math
from dataclasses import fields, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor

from kvcli.snapshot import LayerKV, Rows, gather, mask_index

pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan", "interpreted", "path")
few = settings(
    max_examples=15, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
LENS = some.lists(some.integers(0, 9), min_size=1, max_size=4).filter(any)


@pytest.fixture(params=["ref", "cpu", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", request.param)


def ragged(lens: list[int]) -> Rows:
    """Rows with NaN, infinities and negative zeros among them."""
    rng, n = torch.Generator().manual_seed(0), sum(lens)
    k, v = (torch.randn(n, size, generator=rng).bfloat16() for size in (5, 20))
    k.view(-1)[::3], v.view(-1)[::4], v.view(-1)[1::5] = -0.0, math.nan, -math.inf
    pos = torch.cat([torch.arange(n, dtype=torch.int32) for n in lens])
    return Rows(k, v, pos, torch.tensor(lens), torch.randn(n, generator=rng), pos + 1)


def bits(part: Tensor) -> Tensor:
    return part.contiguous().view(torch.int16)


def same(one: Rows, other: Rows) -> bool:
    return all(torch.equal(*(bits(getattr(rows, field.name)) for rows in (one, other))) for field in fields(Rows))


@few
@given(LENS)
def test_rows_are_padded_and_back_without_the_loss_of_a_bit(lens: list[int]) -> None:
    rows = ragged(lens)
    kv = LayerKV.from_rows(rows)
    assert kv.lens.tolist() == lens
    assert same(kv.rows(), rows)
    assert kv.bias is not None
    for part in (kv.k, kv.v, kv.bias):
        assert not part[~kv.real].any()


@few
@given(LENS, some.integers(0, 2**36))
def test_what_is_gathered_is_what_a_mask_keeps(lens: list[int], kept: int) -> None:
    rows = ragged(lens)
    kv = LayerKV.from_rows(rows)
    mask = kv.real & (torch.tensor(kept) >> torch.arange(kv.pos.numel()) & 1).view(kv.pos.shape).bool()
    mask[lens.index(max(lens)), 0] = True
    flat = mask[kv.real]
    parts = {field.name: getattr(rows, field.name) for field in fields(Rows)}
    want = {name: part[flat] for name, part in parts.items() if name != "lens"}
    got = gather(kv, mask_index(mask))
    assert same(got.rows(), Rows(lens=mask.sum(1), **want))
    assert bool((got.pos[~got.real] == -1).all())
    sparse = replace(kv, k=torch.stack([kv.k, kv.k], -1)[..., 1])  # other strides
    assert same(gather(sparse, mask_index(mask)).rows(), got.rows())
