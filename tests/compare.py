"""Results of ops held against each other, with a tolerance for each dtype."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative RMS error by the dtype of a result: half a unit in its last place.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.int64: 0.0}
# With 16-bit inputs the flash call takes a quick exponential, and its LSE is float32 all the same.
QUICK = {**EXACT, torch.float32: 2e-5}
# At 1e4 a float32 logit has a unit in the last place of 1e-3, and weights are exponentials of such logits.
LOUD = {**EXACT, torch.float32: 5e-3}
Results = list[Tensor]


def results(fn: Callable[..., Any], args: tuple[Any, ...]) -> Results:
    out = fn(*args)
    return [out] if isinstance(out, Tensor) else list(out)


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS difference; infinite where infinities or shapes differ."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if got.shape != want.shape or not torch.equal(got[~finite], want[~finite]):
        return math.inf
    return float((got - want)[finite].norm() / want[finite].norm().clamp(min=1e-30))


def tolerance(case: Mapping[str, Any], usual: Mapping[torch.dtype, float]) -> Mapping[torch.dtype, float]:
    return LOUD if case.get("loud") else usual


def check(got: Results, want: Results, tolerance: Mapping[torch.dtype, float]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert error(one, other) <= tolerance[one.dtype]
