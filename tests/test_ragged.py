"""The attention kernel over heads of any length, in any number of splits, with NaN where nothing may be read."""

import math
from typing import Any

import pytest
import torch
from compare import results
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as some

from kvcli.kernels import flash
from kvcli.kernels.attention import causal_attention, ragged_attention
from kvcli.kernels.banded import banded_attention
from kvcli.kernels.dense import dense_attention
from kvcli.kernels.error import output_error
from kvcli.kernels.flash import flash_fused

pytest.importorskip("triton", reason="no Triton for this system")
pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan", "interpreted")
few = settings(
    max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def check(found: list[torch.Tensor], wanted: list[torch.Tensor]) -> None:
    # a single logit may lie near 0: products that cancel
    torch.testing.assert_close(found, wanted, atol=2e-6, rtol=1e-5)


@few
@given(
    some.lists(some.integers(0, 40), min_size=1, max_size=4).filter(any),
    some.fixed_dictionaries(
        {
            "G": some.integers(1, 3),
            "M": some.integers(1, 20),
            "D": some.sampled_from([5, 16, 24]),
            "Dv": some.sampled_from([3, 16, 33]),
            "bias": some.booleans(),
        }
    ),
    some.sampled_from([8, 256]),
    some.integers(0, 9),
)
def test_heads_of_any_length(lens: list[int], case: dict[str, Any], split: int, seed: int) -> None:
    args = ragged_attention.inputs({"lens": lens, **case}, torch.float32, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "SPLIT", split)
        found = results(ragged_attention.fused, args)
    check(found, results(ragged_attention.ref, args))


@few
@given(
    some.fixed_dictionaries(
        {
            "H": some.integers(1, 2),
            "G": some.integers(1, 3),
            "M": some.integers(1, 20),
            "T": some.integers(1, 70),
            "first": some.integers(0, 160),
            "window": some.none() | some.integers(1, 90),
            "softcap": some.sampled_from([None, 3.0]),
            "bias": some.booleans(),
        }
    ),
    some.sampled_from([8, 256]),
)
def test_bands_of_any_width(case: dict[str, Any], split: int) -> None:
    args = banded_attention.inputs({"D": 16, **case}, torch.float32, seed=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flash, "SPLIT", split)
        found = results(banded_attention.fused, args)
    check(found, results(banded_attention.ref, args))


@pytest.mark.parametrize("split", [16, 100])
def test_splits_do_not_show(split: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flash, "SPLIT", split)
    monkeypatch.setattr(flash, "JOINED", 2)  # so that they are joined in several rounds
    for op in (dense_attention, causal_attention, banded_attention):
        args = op.inputs(op.cases[1], torch.float32, seed=0)
        check(results(op.fused, args), results(op.ref, args))


@pytest.mark.parametrize("M", [1, 7, 20])
def test_new_tokens_see_all_that_came_before_them(M: int) -> None:
    q, k, v, scale = causal_attention.inputs({"H": 2, "G": 2, "M": 20, "D": 16}, torch.float32, seed=0)
    whole = causal_attention.ref(q, k, v, scale)
    found = flash_fused(q[:, -M:], k, v, scale, causal=True)
    check(list(found), [part[:, -M:] for part in whole])


def test_without_entries_there_is_nothing() -> None:
    args = ragged_attention.inputs({"lens": [0, 0], "G": 2, "M": 3, "D": 16, "bias": True}, torch.float32, seed=0)
    out, lse = ragged_attention.fused(*args)
    assert not out.any() and bool((lse == -math.inf).all())


@pytest.mark.parametrize("op", [output_error.ref, output_error.cpu, output_error.fused], ids=["ref", "cpu", "triton"])
def test_output_error_does_not_read_padding(op: Any) -> None:
    case = {"H": 2, "G": 2, "R": 9, "T": 33, "D": 16, "bias": True, "pad": 0.5}
    q, q_pos, before, after, *law = output_error.inputs(case, torch.float32, seed=0)
    want = output_error.ref(q, q_pos, before, after, *law)
    for k, v, pos, bias in (before, after):
        for part in (k, v, bias):
            part[pos < 0] = math.nan
    check([op(q, q_pos, before, after, *law)], [want])
    assert not op(q, q_pos, before, before, *law).any()
