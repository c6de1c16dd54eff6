"""Every kernel compiled for every target, head size and dtype, by as many processes as there are cores."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import active_children, get_context

import torch

from .build import Built, build, launches
from .op import Op

SIZES, DTYPES = (64, 128, 256), (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Failed:
    """A kernel that could not be compiled, and what its compiler said."""

    op: str
    kernel: str
    case: str
    target: str
    failed: str


def matrix(ops: Sequence[Op], targets: Sequence[str], tick: Callable[[int, int], None]) -> list[Built | Failed]:
    """All of them, by op and target; tick(done, total). Raises BrokenProcessPool where a compiler takes all with it."""
    cells = [(op, D, dtype, target) for op in ops if op.fused for target in targets for D in SIZES for dtype in DTYPES]
    workers = min(os.cpu_count() or 1, max(len(cells), 1))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), torch.set_num_threads, (1,))
    try:
        with _deaf():
            jobs = [pool.submit(compile_cell, *cell) for cell in cells]
        for done, job in enumerate(as_completed(jobs), 1):
            job.result()
            tick(done, len(jobs))
    except BaseException:
        for worker in active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
    return [row for job in jobs for row in job.result()]


@contextmanager
def _deaf() -> Iterator[None]:
    """Processes started inside do not hear Ctrl-C, of which each would show a traceback: their parent ends them."""
    heard = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, heard)


def compile_cell(op: Op, D: int, dtype: torch.dtype, target: str) -> list[Built | Failed]:
    """Every kernel an op starts, each once."""
    found: list[Built | Failed] = []
    for label, launch in launches(op, D, dtype):
        try:
            found.append(build(op, label, launch, target))
        except Exception as cause:  # a compiler fails in any way it likes
            found.append(Failed(op.name, launch.kernel.name, label, target, reason(cause)))
    return list(dict.fromkeys(found))


def reason(cause: Exception) -> str:
    """An error of a library in one line."""
    return f"{type(cause).__name__}: {cause}".strip().partition("\n")[0][:200]
