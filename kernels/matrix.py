"""Every kernel of ops compiled for every target, by as many processes as there are cores."""

import os
import signal
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import active_children, get_context

import torch

from .build import SHARED, Built, build, launches
from .launch import Launch
from .op import Op

SIZES, DTYPES = (64, 128, 256), (torch.bfloat16, torch.float32)


@dataclass(frozen=True)
class Task:
    """An op for heads of size D on a target."""

    op: Op
    D: int
    dtype: torch.dtype
    target: str


@dataclass(frozen=True)
class Failed:
    """What could not be compiled, and why; without the name of a kernel the op did not come to start one."""

    op: str
    kernel: str
    case: str
    target: str
    failed: str


def tasks(ops: Iterable[Op], targets: Iterable[str]) -> list[Task]:
    """The whole matrix, in the order of a table."""
    targets = list(targets)
    return [Task(op, D, dtype, target) for op in ops for target in targets for D in SIZES for dtype in DTYPES]


def compile_all(tasks: Sequence[Task]) -> Iterator[list[Built | Failed]]:
    """The kernels of each task, in order, as soon as they are there; raises BrokenProcessPool if a compiler dies."""
    # spawned: a forked process would inherit torch's threads in any state
    jobs, context = min(os.cpu_count() or 1, len(tasks)), get_context("spawn")
    if jobs < 2:
        yield from map(compile_one, tasks)
        return
    with ProcessPoolExecutor(jobs, context, torch.set_num_threads, (1,)) as pool:
        # processes begun now are deaf to Ctrl-C, even while they import: it is for us to end them
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        running = [pool.submit(compile_one, task) for task in tasks]
        signal.signal(signal.SIGINT, before)
        try:
            for job in running:
                yield job.result()
        except BaseException:  # nobody waits for what is being compiled
            for child in active_children():
                child.terminate()
            raise


def compile_one(task: Task) -> list[Built | Failed]:
    """Every kernel of one task; what fails leaves the others alone."""
    try:
        noted = list(launches(task.op, task.D, task.dtype, task.target))
    except Exception as cause:
        return [Failed(task.op.name, "", f"D={task.D}", task.target, _why(cause))]
    return [_built(task, label, launch) for label, launch in noted]


def _built(task: Task, label: str, launch: Launch) -> Built | Failed:
    try:
        return build(task.op, label, launch, task.target)
    except Exception as cause:  # the compiler fails in any way it likes
        return Failed(task.op.name, launch.kernel.name, label, task.target, _why(cause))


def _why(cause: Exception) -> str:
    return f"{type(cause).__name__}: {cause}".strip()


def fits(built: Built) -> bool:
    """Whether nothing spills and a block's shared memory is within what its target has."""
    return built.spills == 0 and built.shared <= SHARED[built.target]
