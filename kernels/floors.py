"""What an op has to move and compute for one layer, and the time that takes at a given bandwidth."""

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from .build import launches
from .op import Op

DTYPE, D, TARGET = torch.bfloat16, 128, "sm_90"


def floors(ops: Iterable[Op], device: torch.device, tokens: int, speed: float) -> Iterator[dict[str, Any]]:
    """A row an op: its path on the device, and seconds a layer of `tokens` entries a head at `speed` bytes a second."""
    here = torch.empty(0, device=device)
    for op in ops:
        case = op.at(tokens)
        moved, flops = op.cost(case, DTYPE.itemsize)
        kernels = list(dict.fromkeys(launch.kernel.name for _, launch in launches(op, D, DTYPE, TARGET)))
        about = {"op": op.name, "path": op.twin([here]), "kernels": kernels, "case": case}
        yield {**about, "bytes": moved, "flops": flops, "floor_s": moved / speed}
