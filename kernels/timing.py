"""Ops timed on the device at hand beside a copy of as many bytes; what differs from its reference is not timed."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from .build import NAMES
from .compare import QUICK, error, results
from .op import Op

Row = dict[str, Any]
DTYPE = torch.bfloat16
SECONDS, LEAST, MOST = 0.5, 5, 100  # that the runs of one op should take together; how many runs there may be
FLUSH = 256 << 20  # bytes that no cache of a card holds


def timed(op: Op, tokens: int, device: torch.device) -> Row:
    """An op's usual case over so many tokens: its error and, if that is small enough, milliseconds and GB/s."""
    case = {**op.usual, "T": tokens} if "T" in op.usual else op.usual
    args = tree_map_only(Tensor, lambda part: part.to(device), op.inputs(case, DTYPE, 0))
    row = {"op": op.name, "path": op.twin(args), "dtype": NAMES[DTYPE], "tokens": case.get("T") or case["M"]}
    row |= _compared(op, args)
    if row["matches"]:
        moved = op.cost(case, DTYPE.itemsize)[0]
        row |= _speeds(moved, durations(lambda: op(*args), device), durations(_copy(moved, device), device))
    return row


def _compared(op: Op, args: tuple[Any, ...]) -> Row:
    pairs = list(zip(results(op, args), results(op.ref, args), strict=True))
    errors = [error(one, other) for one, other in pairs]
    matches = all(
        found <= QUICK[one.dtype] and one.dtype == other.dtype
        for found, (one, other) in zip(errors, pairs, strict=True)
    )
    finite = all(map(math.isfinite, errors))
    return {"error": max(errors) if finite else None, "matches": matches}


def _copy(moved: int, device: torch.device) -> Callable[[], Tensor]:
    """Half of the bytes read, half of them written."""
    source, target = (torch.ones(moved // 2, dtype=torch.uint8, device=device) for _ in range(2))
    return lambda: target.copy_(source)


def _speeds(moved: int, own: Tensor, copy: Tensor) -> Row:
    p20, p50, p80 = own.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=own.dtype)).tolist()
    gb_s, copy_gb_s = moved / p50 / 1e9, moved / float(copy.median()) / 1e9
    ms = {"p20": p20 * 1e3, "p50": p50 * 1e3, "p80": p80 * 1e3}
    return {"ms": ms, "gb_s": gb_s, "copy_gb_s": copy_gb_s, "of_copy": gb_s / copy_gb_s}


def durations(run: Callable[[], Any], device: torch.device) -> Tensor:  # [runs] float64
    """Seconds of each run; two before them compile, warm up, and tell how many there should be."""
    on_card = device.type == "cuda"
    for _ in range(2):
        start = time.perf_counter()
        run()
        if on_card:
            torch.cuda.synchronize(device)
        estimate = time.perf_counter() - start
    n = min(max(int(SECONDS / estimate), LEAST), MOST)
    return torch.tensor(_on_card(run, n, device) if on_card else [_once(run) for _ in range(n)], dtype=torch.float64)


def _once(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _on_card(run: Callable[[], Any], n: int, device: torch.device) -> list[float]:
    """Between events, all in the card's queue at once, each run on cold caches."""
    flush = torch.empty(FLUSH, dtype=torch.uint8, device=device)
    marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(n)]  # type: ignore[no-untyped-call]
    for begin, end in marks:
        flush.zero_()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize(device)
    return [begin.elapsed_time(end) / 1e3 for begin, end in marks]
