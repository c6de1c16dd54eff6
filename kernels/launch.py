"""Triton kernels with one way to start them, so that a launch can also be recorded, and compiled for an absent card."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None  # no wheel for this system: ref and cpu remain


__all__ = ["Kernel", "Launch", "helper", "interpreted", "recorded", "run", "target_of", "tl", "triton"]


@dataclass(frozen=True)
class Launch:
    """One start of a kernel: what it is given, and its compile-time `blocks` and options."""

    kernel: Kernel
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    blocks: dict[str, Any]


_record: ContextVar[list[Launch] | None] = ContextVar("record", default=None)
_target: ContextVar[str | None] = ContextVar("target", default=None)


class Kernel:
    """A Triton kernel: `kernel[grid](*args, **blocks)` runs it where its first tensor is; nothing on an empty grid.

    One with an argument UPCAST is given True in Triton's interpreter, whose 16-bit products are wrong.
    """

    def __init__(self, fn: Callable[..., Any]) -> None:
        self.fn, self.name = fn, fn.__name__.strip("_")
        self.jit: Any = triton.jit(fn) if triton else None

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda *args, **blocks: self._start(Launch(self, grid, args, blocks))

    def _start(self, launch: Launch) -> None:
        if (record := _record.get()) is not None:
            record.append(launch)
        elif all(launch.grid):
            run(launch)

    def blocks(self, given: dict[str, Any], upcast: bool) -> dict[str, Any]:
        """Compile-time arguments and options, with UPCAST where the kernel takes it."""
        return {**given, "UPCAST": upcast} if "UPCAST" in self.jit.arg_names else given


def helper(fn: Callable[..., Any]) -> Any:
    """A function that kernels call."""
    return triton.jit(fn) if triton else fn


def interpreted() -> bool:
    """Whether TRITON_INTERPRET=1 stands in for a card."""
    return triton is not None and bool(triton.knobs.runtime.interpret)


def run(launch: Launch) -> None:
    """Run a launch on the device of its first tensor."""
    kernel, first = launch.kernel, next(arg for arg in launch.args if isinstance(arg, Tensor))
    if not (first.is_cuda or interpreted()):
        raise RuntimeError("Triton kernels run on CUDA tensors; on the CPU only with TRITON_INTERPRET=1")
    with torch.cuda.device(first.device if first.is_cuda else -1):
        kernel.jit[launch.grid](*launch.args, **kernel.blocks(launch.blocks, interpreted()))


@contextmanager
def recorded(target: str) -> Iterator[list[Launch]]:
    """Kernels started inside are noted as for a target, and not run; what they should have written stays as it was."""
    launches: list[Launch] = []
    tokens = _record.set(launches), _target.set(target)
    try:
        yield launches
    finally:
        _record.reset(tokens[0])
        _target.reset(tokens[1])


def target_of(device: torch.device) -> str:
    """What kernels for this device are compiled for, such as sm_90; "" for AMD's cards and in the interpreter."""
    if (noted := _target.get()) is not None:
        return noted
    if device.type != "cuda" or torch.version.hip or not torch.version.cuda:
        return ""
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
