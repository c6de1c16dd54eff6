"""Triton kernels without a card: interpreted against the reference, and compiled for real targets."""

import os
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from compare import DTYPES, EXACT, check, each, results, strided, tolerance

from kvcli.kernels.build import SHARED, TARGETS, build, launches
from kvcli.kernels.op import Op
from kvcli.kernels.table import OPS

triton = pytest.importorskip("triton", reason="no Triton for this system")

FUSED = [op for op in OPS if op.fused]
CASES = [pytest.param(op, case, id=f"{op.name}-{i}") for op in FUSED for i, case in enumerate(op.cases)]
# Each target, size and dtype meets each op: any four of these in a row have all of them. `kvcli kernels --compile`
# shows every pair.
KINDS = [(64, torch.bfloat16), (128, torch.float32), (256, torch.bfloat16)]
KINDS += [(64, torch.float32), (128, torch.bfloat16), (256, torch.float32)]
CELLS = [
    pytest.param(op, target, *KINDS[(i + j) % 6], id=f"{op.name}-{target}")
    for i, op in enumerate(FUSED)
    for j, target in enumerate(TARGETS)
]


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


@pytest.mark.parametrize(("op", "target", "D", "dtype"), CELLS)
def test_compiled_without_spills(op: Op, target: str, D: int, dtype: torch.dtype) -> None:
    for label, launch in launches(op, D, dtype):
        built = build(op, label, launch, target)
        assert built.spills == 0 and built.registers > 0, built
        assert built.shared <= SHARED[target], built
        assert built.dot not in ("fma",) or dtype is torch.float32, built


def test_without_a_card_or_an_interpreter_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", "triton")
    assert os.environ.get("TRITON_INTERPRET") != "1"
    op = next(op for op in OPS if op.name == "window_scores")
    with pytest.raises(RuntimeError, match="TRITON_INTERPRET=1"):
        op(*op.inputs(op.cases[2], torch.float32, 0))
