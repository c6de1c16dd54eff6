"""Results of ops held against each other, with a tolerance for each dtype."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass, tree_map_only

from kvcli.kernels.close import EXACT, QUICK, error, results
from kvcli.kernels.codes import Codes

__all__ = ["DTYPES", "EXACT", "QUICK", "check", "each", "error", "results", "strided"]

register_dataclass(Codes)  # so that its tensors count among the arguments
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# At 1e4 a float32 logit has a unit in the last place of 1e-3, and weights are exponentials of such logits.
LOUD = {**EXACT, torch.float32: 5e-3}
Results = list[Tensor]


def each(change: Callable[[Tensor], Tensor], args: Any) -> Any:
    """The same arguments with every tensor changed, those inside tuples as well."""
    return tree_map_only(Tensor, change, args)


def strided(part: Tensor) -> Tensor:
    """The same numbers, every other one in memory."""
    return torch.stack([part, part.roll(1, 0)], -1)[..., 0]


def tolerance(case: Mapping[str, Any], usual: Mapping[torch.dtype, float]) -> Mapping[torch.dtype, float]:
    return LOUD if case.get("loud") else usual


def check(got: Results, want: Results, tolerance: Mapping[torch.dtype, float]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert error(one, other) <= tolerance[one.dtype]
