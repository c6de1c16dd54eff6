"""An operation with its definition and its faster twins; the one place that chooses between them."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .launch import interpreted, triton

Fn = Callable[..., Any]


@dataclass(frozen=True)
class Op:
    """One operation on tensors. Call it: if the first is on a card `fused` is taken, else `cpu`; `ref` is for all.

    inputs: (case, dtype, seed) -> the arguments; used by tests and benchmarks.
    cases: sizes to try, at least one of them odd.
    usual: the case of tables and benchmarks: one layer of 8 heads of size D with T entries.
    variants: what changes in `usual` make another kernel of it.
    cost: (case, bytes of a number) -> bytes it has to move, each input read once and each output written; flops.
    """

    name: str
    ref: Fn
    inputs: Callable[..., tuple[Any, ...]]
    cases: Sequence[Mapping[str, Any]]
    usual: Mapping[str, Any]
    cost: Callable[[Mapping[str, Any], int], tuple[int, int]]
    variants: Sequence[Mapping[str, Any]] = ({},)
    cpu: Fn | None = None
    fused: Fn | None = None

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.path(args)(*args, **options)

    def path(self, args: Sequence[Any]) -> Fn:
        """The twin these arguments will take; KVCLI_KERNELS=ref|cpu|triton forces one."""
        twin = forced()
        if not twin:  # decoding comes here for every layer of every token
            return (self.fused if args[0].is_cuda else self.cpu) or self.ref
        return {"ref": self.ref, "cpu": self.cpu, "triton": self.fused}[twin] or self.ref

    def twin(self, args: Sequence[Any]) -> str:
        """The name of that twin."""
        chosen = self.path(args)
        return "ref" if chosen is self.ref else "cpu" if chosen is self.cpu else "triton"

    def at(self, tokens: int) -> Mapping[str, Any]:
        """The usual case with another T, where it has one."""
        return {**self.usual, "T": tokens} if "T" in self.usual else self.usual


def forced() -> str:
    """What KVCLI_KERNELS says, "" by default; a ValueError if that is none of the twins."""
    twin = os.environ.get("KVCLI_KERNELS", "")
    if twin not in ("", "ref", "cpu", "triton"):
        raise ValueError(f"KVCLI_KERNELS={twin}: write ref, cpu or triton")
    return twin


def check_forced() -> None:
    """A ValueError if KVCLI_KERNELS asks for what this machine has not."""
    if forced() != "triton":
        return
    if triton is None:
        raise ValueError("KVCLI_KERNELS=triton: Triton is not installed, write ref or cpu")
    if not torch.cuda.is_available() and not interpreted():
        raise ValueError(
            "KVCLI_KERNELS=triton: there is no CUDA device, write ref or cpu, or set TRITON_INTERPRET=1 too"
        )


def random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Seeded normal numbers in any dtype."""
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(dtype)


def strained(case: Mapping[str, Any], q: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Queries whose logits reach 1e4 in a `loud` case, and some biases of -1e9 in a `far` one."""
    if bias is not None and case.get("far"):
        bias[..., 1::3] = -1e9
    return q * 3000 if case.get("loud") else q, bias
