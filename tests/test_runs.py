"""Run merging: the worked examples of its specification, weights by every rule, and what is copied bit for bit."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from compare import DTYPES, EXACT, check, results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some
from torch import Tensor

from kvcli.kernels import flat
from kvcli.kernels.runs import merge_runs

RUNS = [
    pytest.param(merge_runs.ref, id="ref"),
    pytest.param(merge_runs.cpu, id="cpu"),
    pytest.param(merge_runs.fused, id="triton"),
]
CANCELLED = {**EXACT, torch.float32: 1e-5}  # the few numbers of a merged row may be far smaller than its members
pytestmark = pytest.mark.usefixtures("interpreted")


def merge_one(run: Callable[..., Any], k: Tensor, v: Tensor, pivot: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """The key and value of a single run."""
    mass, start = torch.zeros(1, len(k)), torch.zeros(1, len(k), dtype=torch.bool)
    mass[0, pivot], start[0, 0] = 1.0, True
    new_k, new_v, *_ = run(k[None], v[None], mass, start, **options)
    return new_k[0], new_v[0]


def weights(run: Callable[..., Any], keys: list[float], sigma: str | float = "mean") -> Tensor:
    return merge_one(run, torch.tensor(keys)[:, None], torch.eye(len(keys)), sigma=sigma)[1]


def close(got: Tensor, want: list[float], places: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), atol=places, rtol=0)


@pytest.mark.parametrize("run", RUNS)
def test_runs_of_the_worked_example(run: Callable[..., Any]) -> None:
    angle = torch.tensor([0.0, 10, 12, 80, 85, 90, 95, 170]).deg2rad()
    k, v = torch.stack([angle.cos(), angle.sin()], -1)[None], torch.arange(8.0)[None, :, None]
    mass = torch.tensor([[3, 0.2, 0.5, 0.1, 0.4, 0.3, 0.1, 0.6]])
    start = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1]]).bool()
    new_k, new_v, lens, pivot, size = run(k, v, mass, start)
    assert (lens.tolist(), pivot.tolist(), size.tolist()) == ([5], [0, 2, 3, 4, 7], [1, 2, 1, 3, 1])
    close(new_k[1], [0.98066, 0.19498])
    close(new_k[3], [0.02320, 0.99757])
    close(new_v[:, 0], [0, 1.62246, 3, 4.73386, 7])


@pytest.mark.parametrize("run", RUNS)
def test_weights_of_every_rule(run: Callable[..., Any]) -> None:
    keys = [0.0, 3.0, 4.0]
    close(weights(run, keys, 5), [0.39041, 0.32610, 0.28349])
    close(weights(run, keys, 3.5), [0.45187, 0.31295, 0.23518])
    close(weights(run, keys, "mean"), [0.45187, 0.31295, 0.23518])
    close(weights(run, keys, "rms"), weights(run, keys, math.sqrt(12.5)).tolist())
    close(weights(run, keys, "literal"), [1, 0, 0])
    close(weights(run, [0.0, 0.5, 0.5], "literal"), [0.4322, 0.2839, 0.2839], 5e-5)
    close(weights(run, [7.0] * 3, "literal"), [1 / 3] * 3)
    close(weights(run, keys, 1e-3), [1, 0, 0])
    close(weights(run, keys, 1e6), [1 / 3] * 3)
    close(weights(run, [1.5, -8.0]), [0.62246, 0.37754])  # two members: whatever their distance
    with pytest.raises(ValueError, match="sigma=median"):
        weights(run, keys, "median")


@pytest.mark.parametrize("sigma", ["mean", "rms", "literal", 5.0, 0.0])
@pytest.mark.parametrize("run", RUNS)
def test_equal_keys_merge_to_themselves(run: Callable[..., Any], sigma: str | float) -> None:
    for key in (0.0, -3.25):
        new_k, new_v = merge_one(run, torch.full((7, 5), key), torch.arange(7.0)[:, None], 3, sigma=sigma)
        close(new_k, [key] * 5)
        close(new_v, [3.0])


@pytest.mark.parametrize("sigma", ["mean", "rms"])
@pytest.mark.parametrize("run", RUNS)
def test_weights_ignore_the_scale_of_keys(run: Callable[..., Any], sigma: str) -> None:
    keys = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    _, small = merge_one(run, keys * 2**-20, torch.eye(9), 4, sigma=sigma)
    _, large = merge_one(run, keys, torch.eye(9), 4, sigma=sigma)
    assert torch.equal(small, large)
    assert small.argmax() == 4
    close(small.sum(0, True), [1.0], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_single_entries_are_copied_and_padding_is_not_read(run: Callable[..., Any], dtype: torch.dtype) -> None:
    k, v, mass, start, *_ = merge_runs.inputs({"H": 4, "T": 33, "D": 8, "Dv": 8, "share": 0.6}, dtype, seed=0)
    k[:, ::3] = -0.0
    v[0, 0, 0] = math.inf
    real = torch.arange(33) < torch.tensor([[33], [20], [0], [1]])
    start[0, 1] = True
    want = merge_runs.ref(k, v, mass, start & real, real=real)
    padding = (k, v, mass)
    for part in padding:
        part[~real] = math.nan
    start |= ~real
    new_k, new_v, lens, pivot, size = run(k, v, mass, start, real=real)
    assert lens.tolist() == (start & real).sum(1).tolist()
    check([new_k, new_v, lens, pivot, size], list(want), EXACT)
    head, bits = torch.arange(4).repeat_interleave(lens), torch.int32 if dtype is torch.float32 else torch.int16
    for old, new in ((k, new_k), (v, new_v)):
        assert torch.equal(old[head, pivot][size == 1].view(bits), new[size == 1].view(bits))


def test_blocks_of_runs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    args = merge_runs.inputs({"H": 3, "T": 129, "D": 16, "Dv": 8, "share": 0.2}, torch.float32, seed=0)
    whole = results(merge_runs, args)
    monkeypatch.setattr(flat, "BLOCK", 10)
    assert all(map(torch.equal, whole, results(merge_runs, args)))


@settings(max_examples=20, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    some.lists(some.lists(some.booleans(), max_size=12), min_size=1, max_size=3),
    some.sampled_from(["mean", "rms", 0.0, 2.0]),
    some.integers(0, 9),
)
def test_any_runs_in_heads_of_any_length(heads: list[list[bool]], sigma: str | float, seed: int) -> None:
    T = max(1, *map(len, heads))
    real = torch.arange(T) < torch.tensor([len(head) for head in heads])[:, None]
    start = torch.tensor([[*head, *[True] * T][:T] for head in heads])  # what padding says is not read
    start[:, 0] = True
    random = torch.Generator().manual_seed(seed)
    k, v, mass = (torch.randn(len(heads), T, n, generator=random) for n in (5, 3, 1))
    args = (k.masked_fill(~real[..., None], math.nan), v, mass[..., 0].round(), start, sigma, real)
    want = results(merge_runs.ref, args)
    for run in (merge_runs.cpu, merge_runs.fused):
        check(results(run, args), want, CANCELLED)
