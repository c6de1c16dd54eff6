"""Triton's interpreter in the same process: kernels run on the CPU, and others can still be compiled."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from card import bare
from triton.language import core  # noqa: F401
from triton.runtime import interpreter as theirs
from triton.runtime.interpreter import InterpretedFunction, _patch_lang
from triton.runtime.jit import JITFunction

from kvcli.kernels.launch import Launch

CONVERT = theirs._convert_float


@cache
def interpreted(fn: Any) -> InterpretedFunction:
    return InterpretedFunction(fn)


def rounded(data: Any, source: Any, target: Any, mode: Any) -> Any:
    """As cards convert numbers to bf16; the interpreter cuts them off."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return CONVERT(data, source, target, mode)
    return torch.tensor(data).bfloat16().view(torch.int16).numpy().view(np.uint16)


@contextmanager
def interpreter() -> Iterator[None]:
    """Functions that kernels call are interpreted as well, those of Triton itself among them."""
    scope = _patch_lang(interpret)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            JITFunction, "__call__", lambda self, *args, **more: interpreted(self.fn).rewrite()(*args, **more)
        )
        patch.setattr(theirs, "_convert_float", rounded)
        try:
            yield
        finally:
            scope.restore()


def interpret(launch: Launch) -> None:
    """In place of `launch.run`; tensors of the pretended card are as good. Its globals `tl` and `core` are patched."""
    with interpreter(), np.errstate(all="ignore"):  # a card divides by zero without a word
        blocks = launch.kernel.blocks(launch.blocks, True)
        interpreted(launch.kernel.fn)[launch.grid](*map(bare, launch.args), **blocks)
