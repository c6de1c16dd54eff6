"""How far results of an op may lie from its reference, by the dtype of a result."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

# Relative RMS error: half a unit in the last place.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.int64: 0.0}
# With 16-bit inputs the flash call takes a quick exponential, and its LSE is float32 all the same.
QUICK = {**EXACT, torch.float32: 2e-5}


def results(fn: Callable[..., Any], args: tuple[Any, ...]) -> list[Tensor]:
    """What an op returns, as a list whether it is one tensor or several."""
    out = fn(*args)
    return [out] if isinstance(out, Tensor) else list(out)


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS difference; infinite where infinities or shapes differ."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if got.shape != want.shape or not torch.equal(got[~finite], want[~finite]):
        return math.inf
    return float((got - want)[finite].norm() / want[finite].norm().clamp(min=1e-30))
