"""kvcli kernels --compile: what kernels take of cards, and whether any spills or does not fit."""

import os
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from itertools import groupby
from typing import TYPE_CHECKING, Any

from ..errors import GateError, InfeasibleError, KvError, UsageError
from .tables import print_plain
from .ui import Ui, complain

if TYPE_CHECKING:
    from ..kernels.op import Op

SCHEMA = "kvcli.kernels/1"
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
Row = dict[str, Any]


def compile_all(ui: Ui, ops: "Sequence[Op]", targets: Sequence[str], every: bool) -> int:
    """Show what all kernels take of the targets, a line for each or for `every` case; the exit code.

    Raises InfeasibleError without Triton, UsageError where it interprets, KvError where a process dies.
    """
    from ..kernels.launch import triton
    from ..kernels.matrix import matrix

    if triton is None:
        raise InfeasibleError("nothing can be compiled", "Triton is not installed", "pip install triton, on Linux")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise UsageError("nothing can be compiled", "TRITON_INTERPRET=1 is set", "unset it")
    try:
        with ui.progress("compiling") as tick:
            rows = [asdict(row) for row in matrix(ops, targets, tick)]
    except BrokenProcessPool as cause:
        fix = "give it more memory, or find out where with --target"
        raise KvError("a process that compiles was killed, or its compiler crashed", str(cause), fix) from cause
    if ui.as_json:
        ui.result(SCHEMA, {"rows": rows})
    else:
        _show(rows, every)
    return _verdict(rows)


def _name(row: Row) -> str:
    return f"{row['op']}: {row['kernel']} for {row['target']}"


def _show(rows: Sequence[Row], every: bool) -> None:
    sound = [row for row in rows if "failed" not in row]
    cells = [["op", "kernel", "target", "case" if every else "cases", "registers", "spills", "shared", "dot"]]
    for _, each in groupby(sorted(sound, key=_name), key=lambda row: row["case"] if every else _name(row)):
        same = list(each)
        worst = [f"{max(row[name] for row in same):,}" for name in ("registers", "spills", "shared")]
        dots = dict.fromkeys(row["dot"] for row in same if row["dot"])
        about = [same[0][name] for name in ("op", "kernel", "target")]
        cells.append([*about, same[0]["case"] if every else str(len(same)), *worst, ", ".join(dots)])
    print_plain("worst of the cases" if not every else "every case", cells, left=4)


def _verdict(rows: Sequence[Row]) -> int:
    """Says what is wrong, and gives the exit code."""
    from ..kernels.build import SHARED

    failed = [row for row in rows if "failed" in row]
    sound = [row for row in rows if "failed" not in row]
    spilled = [row for row in sound if row["spills"]]
    large = [row for row in sound if row["shared"] > SHARED[row["target"]]]
    for row in failed:
        complain(f"{_name(row)} does not compile", f"{row['case']}: {row['failed']}")
    for what, guilty in (("registers are spilled", spilled), ("more shared memory than there is", large)):
        if guilty:
            complain(f"{what} by {', '.join(dict.fromkeys(map(_name, guilty)))}")
    return KvError.exit_code if failed else GateError.exit_code if spilled or large else 0
