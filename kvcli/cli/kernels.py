"""kvcli kernels: what each op has to move and what it takes; its Triton kernels compiled for cards; its speed here."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import GateError, InfeasibleError, KvError, UsageError
from .tables import plain
from .ui import Ui, complain, current, output_options, size, uses_kernels

if TYPE_CHECKING:
    import torch

    from ..kernels.build import Built
    from ..kernels.matrix import Failed
    from ..kernels.op import Op

SCHEMA, LAYERS = "kvcli.kernels/1", 32
TARGETS = ("sm_80", "sm_90", "sm_100", "gfx942")
TOKENS, TOKENS_CPU = 32768, 4096
UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
Row = dict[str, Any]


def bandwidth(text: str) -> float:
    """Bytes a second, from words such as 3.35TB/s or 900 GB/s; UsageError otherwise."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?B)/s", text.strip(), re.IGNORECASE | re.ASCII)
    found = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if not 0 < found < math.inf:
        raise UsageError(f"--bandwidth {text[:40]!r} is not a bandwidth", fix="write 3.35TB/s or 900GB/s")
    return found


@click.command("kernels", short_help="Say what ops cost, compile their kernels, time them here.")
@click.argument("ops", nargs=-1, metavar="[OP]...")
@click.option("--compile", "compiles", is_flag=True, help="Compile all Triton kernels for cards that need not be here.")
@click.option("--target", multiple=True, type=click.Choice(TARGETS), help="With --compile: for these only.")
@click.option("-a", "--all", "every", is_flag=True, help="With --compile: a line for every case, not every kernel.")
@click.option("--bench", is_flag=True, help="Time every op here, beside a copy of as many bytes.")
@click.option("--tokens", type=click.IntRange(1), help="Entries a head [32768; --bench on a CPU 4096].")
@click.option(
    "--bandwidth",
    default="3.35TB/s",
    show_default=True,
    callback=lambda ctx, param, text: bandwidth(text),
    help="For the floor: how fast all bytes can be moved.",
)
@output_options
@uses_kernels
def command(ops: tuple[str, ...], **options: Any) -> None:
    """List the operations that prefill, compress and resume spend their time in, or those named OP.

    For each: the path taken on this machine, its Triton kernels, and for one layer the bytes it has to move, the
    floating-point operations, and the time those bytes take. --compile shows registers, spills and shared memory of
    every kernel and whether its products became tensor-core instructions; exit 7 if one spills or does not fit.
    --bench holds every op against its reference first, and does not time one that differs (exit 7).

    \b
    Examples:
      kvcli kernels
      kvcli kernels --bandwidth 8TB/s --tokens 131072 --json
      kvcli kernels take_rows --compile --target sm_90
      kvcli kernels adjacent_cosine merge_runs --bench --tokens 512 --json
    """
    ui = current()
    if options["compiles"] and options["bench"]:
        raise UsageError("--compile and --bench are two jobs", fix="give one of them")
    if options["target"] and not options["compiles"]:
        raise UsageError("--target says what to compile for", fix="give --compile too")
    with ui.phases() as phase:
        phase("loading torch")
        chosen = _named(ops)
    if options["compiles"]:
        code = _compile(ui, chosen, options["target"] or TARGETS, options["every"])
    elif options["bench"]:
        code = _bench(ui, chosen, options["tokens"])
    else:
        code = _list(ui, chosen, options["tokens"] or TOKENS, options["bandwidth"])
    click.get_current_context().exit(code)


def _named(names: Sequence[str]) -> "list[Op]":
    from ..kernels.table import OPS

    known = {op.name: op for op in OPS}
    if unknown := [name for name in names if name not in known]:
        raise UsageError(f"there is no op {unknown[0]!r}", fix="write one of: " + ", ".join(known))
    return [known[name] for name in dict.fromkeys(names or known)]


def _device() -> "torch.device":
    import torch

    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _list(ui: Ui, ops: "Sequence[Op]", tokens: int, speed: float) -> int:
    from ..kernels.floors import floors

    rows = [*floors(ops, _device(), tokens, speed)]
    ui.result(SCHEMA, {"dtype": "bf16", "bandwidth": speed, "rows": rows})
    if not ui.as_json:
        head = ["op", "path here", "Triton kernels", "case", "bytes", "GFLOP", "floor", f"{LAYERS} layers"]
        plain(f"one layer in bf16, floor at {speed / 1e12:g} TB/s", [head, *map(_floor_cells, rows)], left=4)
    return 0


def _floor_cells(row: Row) -> list[str]:
    floor = row["floor_s"]
    times = [f"{floor * 1e6:,.1f} µs", f"{floor * LAYERS * 1e3:,.2f} ms"]
    kernels = ", ".join(row["kernels"]) or "none"
    return [
        row["op"],
        row["path"],
        kernels,
        case_words(row["case"]),
        size(row["bytes"]),
        f"{row['flops'] / 1e9:,.2f}",
        *times,
    ]


def case_words(case: Mapping[str, Any]) -> str:
    """The sizes of a case and what it has; what it has not is left out."""
    return " ".join(f"{name}={value}" for name, value in case.items() if value not in (None, False))


def _compile(ui: Ui, ops: "Sequence[Op]", targets: Sequence[str], every: bool) -> int:
    from dataclasses import asdict

    found = _compiled(ui, ops, targets)
    rows = [asdict(one) for one in found]
    ui.result(SCHEMA, {"rows": rows})
    if not ui.as_json:
        products = "products" if every else "16-bit products"
        head = ["op", "kernel", "target", "case", "registers", "spills", "shared", products]
        plain("registers a thread, shared memory a block", [head, *_compiled_cells(rows, every)], left=4)
    return _judged(found)


def _judged(found: "Sequence[Built | Failed]") -> int:
    """The exit code, and a line for everything that is behind it."""
    from ..kernels.build import Built
    from ..kernels.matrix import Failed, fits

    failed = [one for one in found if isinstance(one, Failed)]
    for one in failed:
        complain(f"{_title(one)} {one.case} failed to compile: {one.failed.splitlines()[-1]}")
    bad = [one for one in found if isinstance(one, Built) and not fits(one)]
    for name in dict.fromkeys(map(_title, bad)):
        cases = ", ".join(one.case for one in bad if _title(one) == name)
        complain(f"{name} spills or needs more shared memory than there is: {cases}")
    return GateError.exit_code if bad else KvError.exit_code if failed else 0


def _title(one: "Built | Failed") -> str:
    return f"{one.op} {one.kernel} on {one.target}"


def _compiled(ui: Ui, ops: "Sequence[Op]", targets: Sequence[str]) -> "list[Built | Failed]":
    from concurrent.futures.process import BrokenProcessPool

    from ..kernels.launch import interpreted, triton
    from ..kernels.matrix import compile_all, tasks

    if triton is None:
        raise InfeasibleError(
            "Triton is not installed", "there are no wheels of it for every system", "pip install triton"
        )
    if interpreted():
        raise UsageError("nothing can be compiled with TRITON_INTERPRET=1", fix="unset it")
    todo = tasks(ops, targets)
    found: list[Built | Failed] = []
    try:
        with ui.progress("compiling") as tick:
            for done, some in enumerate(compile_all(todo), 1):
                found += some
                tick(done, len(todo))
    except BrokenProcessPool as cause:
        fix = "name OPs to find the one it is"
        raise KvError("a process that compiles died", "by a bug of its compiler, or for want of memory", fix) from cause
    return found


def _compiled_cells(rows: Sequence[Row], every: bool) -> Iterator[list[str]]:
    """A line a kernel and target with the worst of its cases and the sum of its spills, or a line a case."""
    by = ("op", "kernel", "target", *["case"] * every)
    for name in dict.fromkeys(tuple(row[key] for key in by) for row in rows):
        mine = [row for row in rows if tuple(row[key] for key in by) == name]
        case = mine[0]["case"] if len(mine) == 1 else f"{len(mine)} cases"
        if any("failed" in row for row in mine):
            yield [*name[:3], case, "failed", "", "", ""]
            continue
        most = {key: max(row[key] for row in mine) for key in ("registers", "shared")}
        spills = sum(row["spills"] for row in mine)
        # float32 products never are tensor-core instructions: beside 16-bit ones they tell nothing
        dots = {row["dot"]: None for row in mine if row["dot"] and (every or "fp32" not in row["case"])}
        yield [*name[:3], case, str(most["registers"]), str(spills), size(most["shared"]), ", ".join(dots)]


def _bench(ui: Ui, ops: "Sequence[Op]", tokens: int | None) -> int:
    from ..kernels.launch import interpreted, triton
    from ..stamp import commit, stamp

    if interpreted():
        raise UsageError("the times of Triton's interpreter say nothing", fix="unset TRITON_INTERPRET")
    device = _device()
    about = {**stamp(device), "triton": triton and triton.__version__, "commit": commit()}
    rows = [{**row, **about} for row in _timed(ui, ops, device, tokens)]
    ui.result(SCHEMA, {"rows": rows})
    if not ui.as_json:
        head = ["op", "path", "tokens", "p20 ms", "p50 ms", "p80 ms", "GB/s", "copy GB/s", "of copy", "error"]
        plain(f"one layer in bf16 on {about['processor']}", [head, *map(_bench_cells, rows)])
    failed = [row for row in rows if "failed" in row]
    for row in failed:
        complain(f"{row['op']} failed: {row['failed'].splitlines()[0]}")
    missed = [row for row in rows if "ms" not in row and "error" in row]
    for row in missed:
        complain(f"{row['op']} ({row['path']}) is not its reference, and is not timed: error {_error(row)}")
    return GateError.exit_code if missed else KvError.exit_code if failed else 0


def _timed(ui: Ui, ops: "Sequence[Op]", device: "torch.device", tokens: int | None) -> Iterator[Row]:
    from ..kernels.timing import timed

    with ui.phases() as phase:
        for op in ops:
            phase(f"timing {op.name}")
            try:
                row = timed(op, device, tokens or (TOKENS if device.type == "cuda" else TOKENS_CPU))
            except Exception as cause:  # the other rows are of use all the same
                row = {"op": op.name, "failed": f"{type(cause).__name__}: {cause}"}
            yield row


def _bench_cells(row: Row) -> list[str]:
    if "failed" in row:
        return [row["op"], "failed", *[""] * 8]
    if "ms" not in row:
        return [row["op"], row["path"], f"{row['tokens']:,}", *["not timed", *[""] * 5], _error(row)]
    times = [f"{row['ms'][name]:.3f}" for name in ("p20", "p50", "p80")]
    speeds = [f"{row['gb_s']:,.1f}", f"{row['copy_gb_s']:,.1f}", f"{row['of_copy']:.0%}"]
    return [row["op"], row["path"], f"{row['tokens']:,}", *times, *speeds, _error(row)]


def _error(row: Row) -> str:
    return "" if row["error"] is None else f"{row['error']:.1e}"
