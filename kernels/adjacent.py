"""Cosine of neighbouring keys, k [H, T, D] -> [H, T - 1] float32; rows of padding give numbers without meaning."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .op import Op, random

BLOCK = 8192  # rows at once: their float32 copy stays in the cache


def adjacent_cosine_ref(k: Tensor) -> Tensor:  # [H, T, D] -> [H, T - 1] float32
    """The definition: exactly 1 for equal neighbours, 0 beside a zero vector."""
    k = k.float()
    square = (k * k).sum(-1)
    product = (k[:, :-1] * k[:, 1:]).sum(-1)
    return _cosine(product, square)


def adjacent_cosine_cpu(k: Tensor) -> Tensor:  # [H, T, D] -> [H, T - 1] float32
    """The same, a block of tokens at a time: keys are read once."""
    H, T, _ = k.shape
    step = max(1, BLOCK // H)
    cosine = torch.empty(H, max(T - 1, 0))
    for i in range(0, T - 1, step):
        rows = k[:, i : i + step + 1].float()
        square = torch.linalg.vecdot(rows, rows)
        product = torch.linalg.vecdot(rows[:, :-1], rows[:, 1:])
        cosine[:, i : i + step] = _cosine(product, square)
    return cosine


def _cosine(product: Tensor, square: Tensor) -> Tensor:
    # sqrt(x * x) is exactly x, so that equal neighbours tie at 1
    norms = (square[:, :-1] * square[:, 1:]).sqrt()
    return torch.where(norms > 0, product / norms, 0.0)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    generator = torch.Generator().manual_seed(seed)
    return (random((case["H"], case["T"], case["D"]), dtype, generator).cumsum(1),)


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, T, D = (case[name] for name in "HTD")
    return H * T * D * itemsize + 4 * H * (T - 1), 4 * H * T * D


adjacent_cosine = Op(
    name="adjacent_cosine",
    ref=adjacent_cosine_ref,
    cpu=adjacent_cosine_cpu,
    inputs=_inputs,
    usual={"H": 8, "T": 32768, "D": 128},
    cost=_cost,
    cases=(
        {"H": 1, "T": 1, "D": 8},
        {"H": 3, "T": 2, "D": 63},
        {"H": 2, "T": 65, "D": 64},
        {"H": 5, "T": 129, "D": 80},
        {"H": 20, "T": 517, "D": 16},
    ),
)
