"""Triton kernels without a card: interpreted against the reference, and compiled for real targets."""

import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from compare import DTYPES, EXACT, check, each, results, strided, tolerance

from kvcli.kernels.build import TARGETS, build, launches
from kvcli.kernels.matrix import DTYPES as COMPILED
from kvcli.kernels.matrix import SIZES, fits
from kvcli.kernels.op import Op
from kvcli.kernels.table import OPS

triton = pytest.importorskip("triton", reason="no Triton for this system")

FUSED = [op for op in OPS if op.fused]
CASES = [pytest.param(op, case, id=f"{op.name}-{i}") for op in FUSED for i, case in enumerate(op.cases)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_interpreted_is_the_reference(
    op: Op, case: Mapping[str, Any], dtype: torch.dtype, interpreted: None, fresh_memory_is_nan: None
) -> None:
    args = op.inputs(case, dtype, seed=5)
    once = results(op.fused, args)
    check(once, results(op.ref, args), tolerance(case, EXACT))
    assert all(map(torch.equal, once, results(op.fused, args)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_interpreted_with_any_strides(op: Op, dtype: torch.dtype, interpreted: None, fresh_memory_is_nan: None) -> None:
    args = op.inputs(op.cases[2], dtype, seed=5)
    check(results(op.fused, each(strided, args)), results(op.ref, args), EXACT)


@pytest.mark.parametrize("i", range(len(TARGETS)))
@pytest.mark.parametrize("op", FUSED, ids=lambda op: op.name)
def test_compiled_without_spills(op: Op, i: int) -> None:
    """Every op meets each target, size and dtype, if not all of them together as in `kvcli kernels --compile`."""
    turn = i + OPS.index(op)
    target, D, dtype = [*TARGETS][i], SIZES[turn % len(SIZES)], COMPILED[turn % len(COMPILED)]
    for label, launch in launches(op, D, dtype, target):
        built = build(op, label, launch, target)
        assert fits(built) and built.registers > 0, built
        assert built.dot not in ("fma",) or dtype is torch.float32, built


def test_without_a_card_or_an_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", "triton")
    assert os.environ.get("TRITON_INTERPRET") != "1"
    op = next(op for op in OPS if op.name == "window_scores")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        op(*op.inputs(op.cases[2], torch.float32, 0))
