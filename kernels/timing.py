"""Ops timed on the device at hand, each held against its reference first and beside a copy of as many bytes."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .close import QUICK, error, results
from .op import Op

DTYPE = torch.bfloat16
SECONDS, FEWEST, MOST = 1.0, 5, 100  # how long an op is timed, within so many runs
FLUSH = 256 << 20  # bytes written between runs: more than the L2 cache of any card
P = torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)


def timed(op: Op, device: torch.device, tokens: int) -> dict[str, Any]:
    """A row for an op's usual case: milliseconds and GB/s, or only the error of an op that misses its reference.

    That error is the largest of its results, None where one is NaN or infinities lie elsewhere.
    """
    case = op.at(tokens)
    args = tree_map_only(Tensor, lambda part: part.to(device), op.inputs(case, DTYPE, 0))
    about = {"op": op.name, "path": op.twin(args), "dtype": "bf16", "tokens": case.get("T", case.get("M"))}
    found = zip(results(op, args), results(op.ref, args), strict=True)
    errors = [(error(one, other), QUICK[one.dtype]) for one, other in found]
    finite = all(math.isfinite(missed) for missed, _ in errors)
    row = {**about, "error": max(errors)[0] if finite else None}
    if not all(missed <= tolerance for missed, tolerance in errors):  # NaN is no match
        return row
    moved = op.cost(case, DTYPE.itemsize)[0]
    ms, copy_ms = _ms(lambda: op(*args), device), _ms(_copy(moved, device), device)
    gb_s, copy_gb_s = (moved / 1e6 / each["p50"] for each in (ms, copy_ms))
    return {**row, "ms": ms, "gb_s": gb_s, "copy_gb_s": copy_gb_s, "of_copy": gb_s / copy_gb_s}


def _copy(moved: int, device: torch.device) -> Callable[[], Any]:
    """Half is read and half is written."""
    source, target = torch.zeros(2, max(moved // 2, 1), dtype=torch.uint8, device=device)
    return lambda: target.copy_(source)


def _ms(run: Callable[[], Any], device: torch.device) -> dict[str, float]:
    """Percentiles of its milliseconds; a first run, in which kernels are compiled, does not count."""
    once = _on_card if device.type == "cuda" else _on_cpu
    once(run)
    runs = min(max(int(SECONDS * 1e3 / max(once(run), 1e-3)), FEWEST), MOST)
    times = torch.tensor([once(run) for _ in range(runs)], dtype=torch.float64)
    return dict(zip(("p20", "p50", "p80"), times.quantile(P).tolist(), strict=True))


def _on_cpu(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


def _on_card(run: Callable[[], Any]) -> float:
    """By the card's own clock. What it is started with lies in no cache, and is sent off while the flush still runs."""
    event: Any = torch.cuda.Event
    start, end = event(enable_timing=True), event(enable_timing=True)
    torch.empty(FLUSH, dtype=torch.uint8, device="cuda").zero_()
    start.record()
    run()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))
