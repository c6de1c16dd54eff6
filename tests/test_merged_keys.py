"""Which keys KVMerger averages: as they are, without their rotation, or the pivot's own."""

import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from make import shrunk
from test_merging import FREQ, ask, layer, runs, smooth

from kvcli.budget import Budget
from kvcli.errors import InfeasibleError
from kvcli.kernels.rope import rotate
from kvcli.methods.kvmerger import kvmerger
from kvcli.pipeline import make_plans
from kvcli.recipe import Recipe
from kvcli.registry import Scored
from kvcli.snapshot import LayerKV, Stats


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_pivots_key_stays_bit_for_bit(dtype: torch.dtype, tmp_path: Path) -> None:
    full = smooth(dtype=dtype)
    small, rotated = (shrunk(full, f"kvmerger:keys={keys}", tmp_path / keys) for keys in ("pivot", "rotated"))
    for before, after, other in zip(full.rows, small.rows, rotated.rows, strict=True):
        head = torch.arange(2).repeat_interleave(after.lens)
        assert torch.equal(after.k, before.k.view(2, 120, 8)[head, after.pos.long()])
        assert torch.equal(after.v, other.v) and torch.equal(after.pos, other.pos) and not torch.equal(after.k, other.k)


@pytest.mark.parametrize(
    ("freq", "size", "share"),
    [
        (1.0, 2, 0.8776), (1.0, 3, 0.6935), (1.0, 4, 0.4742), (1.0, 8, 0.1973), (1.0, 16, 0.1290),
        (0.1, 8, 0.9740), (0.1, 32, 0.6250),
    ],
)  # fmt: skip
def test_averaging_rotated_keys_shrinks_them_and_averaging_unrotated_keys_does_not(
    freq: float, size: int, share: float
) -> None:
    """Equal keys before rotation: one that is turned back and averaged is the pivot's own."""
    plain = torch.tensor([3.0, -4.0]).expand(1, size, 2)
    turned = rotate(plain, torch.arange(size).expand(1, -1), torch.tensor([freq]))
    cut, count = runs(size, 1, size)
    stats = Stats(attn_mass=torch.eye(size)[size // 2][None])
    asked = replace(ask(1, size), rope={"head_dim": 2, "inv_freq": [freq]})
    for keys, left in (("rotated", share), ("rerotate", 1.0), ("pivot", 1.0)):
        small, pivot = kvmerger(layer(turned), stats, Scored(cut), count, asked, keys=keys, sigma=1e9)
        assert float(small.k.norm()) == pytest.approx(5 * left, abs=5e-4)
        if keys != "rotated":
            torch.testing.assert_close(small.k[0, 0], turned[0, int(pivot)], atol=2e-6, rtol=0)


def test_keys_turned_back_against_float64(tmp_path: Path) -> None:
    """By the complex numbers of the definition, partial rotation included; entries on their own stay bit for bit."""
    rng = torch.Generator().manual_seed(1)
    k, v = torch.randn(2, 60, 8, generator=rng), torch.randn(2, 60, 3, generator=rng)
    cut = torch.rand(2, 60, generator=rng)
    cut[:, 0] = math.inf
    stats = Stats(attn_mass=torch.rand(2, 60, generator=rng))
    kv, count = LayerKV(k, v, layer(k).pos), torch.tensor([20, 20])
    small, pivot = kvmerger(kv, stats, Scored(cut), count, ask(20, 60), keys="rerotate", sigma=2.0)
    angle = torch.arange(60)[:, None] * torch.tensor(FREQ, dtype=torch.float64)
    turn = torch.polar(torch.ones_like(angle), angle)  # [N, 3]
    plain = torch.complex(k[..., :3].double(), k[..., 3:6].double()) / turn
    whole = torch.cat([plain.real, plain.imag, k[..., 6:].double()], -1)
    assert small.span is not None
    for h in range(2):
        ends = small.span[h].cumsum(0).tolist()
        for run, (begin, end) in enumerate(pairwise([0, *ends])):
            p = int(pivot[h, run])
            weight = (-((whole[h, begin:end] - whole[h, p]).norm(dim=-1) ** 2) / 8).exp()
            mean = (weight / weight.sum()) @ whole[h, begin:end]
            back = torch.complex(mean[:3], mean[3:6]) * turn[p]
            expected = torch.cat([back.real, back.imag, mean[6:]])
            torch.testing.assert_close(small.k[h, run].double(), expected, atol=2e-5, rtol=0)
            torch.testing.assert_close(small.v[h, run].double(), (weight / weight.sum()) @ v[h, begin:end].double())
            assert end - begin > 1 or torch.equal(small.k[h, run], k[h, begin])


@pytest.mark.parametrize("freq", [None, [], ["1.0"], [1.0, math.nan], [1.0] * 5, "1.0", 1.0])
def test_without_frequencies_no_key_is_turned_back(freq: object, tmp_path: Path) -> None:
    full = smooth()
    rope = {"rope_type": "longrope", "head_dim": 8, "inv_freq": freq}
    strange = replace(full, meta=replace(full.meta, rope=rope))
    with pytest.raises(InfeasibleError, match="longrope"):
        make_plans(strange, Recipe.parse("kvmerger:keys=rerotate"), [Budget.parse("30%")])
    make_plans(strange, Recipe.parse("kvmerger:keys=pivot"), [Budget.parse("30%")])
