"""kvcli kernels: what each op has to move, what its Triton kernels take of a card, and how fast it is here."""

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import click

from ..errors import GateError, KvError, UsageError
from .compiled import SCHEMA, TARGETS, compile_all
from .forced import check_kernels
from .tables import print_plain
from .ui import Ui, complain, current, output_options, size

if TYPE_CHECKING:
    from ..kernels.op import Op

UNITS = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
LAYERS = 32  # of the table for people
TOKENS = {"cpu": 4096, "cuda": 32768}
Row = dict[str, Any]


@click.command("kernels", short_help="Show, compile or time the kernels.")
@click.option("--compile", "build", is_flag=True, help="Compile them all, for cards that need not be here.")
@click.option("--target", multiple=True, type=click.Choice(TARGETS), help="Compile for these alone.")
@click.option("--all", "every", is_flag=True, help="With --compile a line for every case.")
@click.option("--bench", is_flag=True, help="Time them here, each checked against its reference first.")
@click.option("--tokens", type=click.IntRange(1), help="How many --bench takes [32768, on the CPU 4096].")
@click.option(
    "--bandwidth", metavar="SPEED", default="3.35TB/s", show_default=True, help="What the floor is counted by."
)
@output_options
def command(bandwidth: str, **options: Any) -> None:
    """List the operations inside prefill, compress and resume, with the path each takes here.

    The floor is the time a memory of that bandwidth needs for the bytes that one layer of 8 heads and 32,768 tokens
    has to move, in bfloat16. --compile says what kernels take of a card: registers, spills, bytes of shared memory,
    and the tensor-core instruction their products became; it fails where one spills or does not fit. --bench on a
    machine with a card is worth sending to us.

    \b
    Examples:
      kvcli kernels
      kvcli kernels --bandwidth 1.6TB/s
      kvcli kernels --compile --target sm_90
      kvcli kernels --bench --json > kernels.json
    """
    ui, speed = current(), read_bandwidth(bandwidth)
    _check(options)
    with ui.phases() as phase:
        phase("loading torch")
        from ..kernels.table import OPS

        check_kernels()
    if options["build"]:
        code = compile_all(ui, OPS, options["target"] or TARGETS, options["every"])
    elif options["bench"]:
        code = _bench(ui, OPS, options["tokens"])
    else:
        code = _list(ui, OPS, speed, bandwidth)
    if code:
        raise click.exceptions.Exit(code)


def read_bandwidth(text: str) -> float:  # bytes a second
    """`3.35TB/s`, units from B to TB in powers of ten; UsageError otherwise."""
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,15})?) ?([KMGT]?B)(?:/s)?", text.strip(), re.IGNORECASE)
    speed = float(match[1]) * UNITS[match[2].upper()] if match else 0.0
    if not speed:
        raise UsageError(f"--bandwidth {text!r} is no bandwidth", fix="write 3.35TB/s or 900GB/s")
    return speed


def _check(options: dict[str, Any]) -> None:
    if options["build"] and options["bench"]:
        raise UsageError("--compile and --bench exclude each other", fix="give one of them")
    if (options["target"] or options["every"]) and not options["build"]:
        raise UsageError("--target and --all say what to compile", fix="add --compile")
    if options["tokens"] and not options["bench"]:
        raise UsageError("--tokens says how many to time", fix="add --bench")


def floors(ops: "Sequence[Op]", speed: float) -> Iterator[Row]:
    """What the usual case of each op has to move in bfloat16, and the seconds that takes at `speed` bytes a second."""
    import torch

    from ..kernels.build import launches

    here = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
    for op in ops:
        moved, flops = op.cost(op.usual, torch.bfloat16.itemsize)
        kernels = dict.fromkeys(launch.kernel.name for _, launch in launches(op, op.usual["D"], torch.bfloat16))
        row = {"op": op.name, "path": op.twin([here]), "kernels": [*kernels], "case": dict(op.usual)}
        yield row | {"bytes": moved, "flops": flops, "floor_s": moved / speed}


def _list(ui: Ui, ops: "Sequence[Op]", speed: float, bandwidth: str) -> int:
    rows = list(floors(ops, speed))
    if ui.as_json:
        ui.result(SCHEMA, {"bandwidth": speed, "rows": rows})
        return 0
    cells = [["op", "here", "Triton kernels", "moves", "flops", "floor a layer", f"{LAYERS} layers"]]
    cells += [[row["op"], row["path"], ", ".join(row["kernels"]) or "none", *costs(row)] for row in rows]
    print_plain(f"one layer of 8 heads and 32,768 tokens in bf16, floor at {bandwidth}", cells, left=3)
    return 0


def costs(row: Row) -> list[str]:
    """Bytes, flops, and the floor of one layer and of all, for people."""
    flops = f"{row['flops'] / 1e9:,.2f} G"
    return [size(row["bytes"]), flops, f"{row['floor_s'] * 1e6:,.1f} µs", f"{row['floor_s'] * LAYERS * 1e3:,.2f} ms"]


def _bench(ui: Ui, ops: "Sequence[Op]", tokens: int | None) -> int:
    import torch

    from ..kernels.matrix import reason
    from ..kernels.timing import timed
    from ..stamp import commit, stamp

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows: list[Row] = []
    with ui.phases() as phase, torch.inference_mode():
        for op in ops:
            phase(f"timing {op.name}")
            try:
                rows.append(timed(op, tokens or TOKENS[device.type], device))
            except Exception as cause:  # on a card not tried before the others are still worth having
                rows.append({"op": op.name, "failed": reason(cause)})
    if ui.as_json:
        ui.result(SCHEMA, {"config": {**stamp(device), "triton": _triton(), "commit": commit()}, "rows": rows})
    else:
        about = stamp(device)
        _show_times(rows, f"{about['processor']}, torch {about['torch']}")
    return _verdict(rows)


def _triton() -> str | None:
    from ..kernels.launch import triton

    return triton and str(triton.__version__)


def _show_times(rows: Sequence[Row], title: str) -> None:
    cells = [["op", "path", "tokens", "median", "p20 to p80", "GB/s", "of a copy", "error"]]
    for row in rows:
        if "ms" in row:
            ms = row["ms"]
            speed = [f"{row['gb_s']:.1f}", f"{row['of_copy']:.1%} of {row['copy_gb_s']:.1f}", f"{row['error']:.1e}"]
            times = [f"{ms['p50']:.3f} ms", f"{ms['p20']:.3f} to {ms['p80']:.3f}"]
            cells.append([row["op"], row["path"], f"{row['tokens']:,}", *times, *speed])
    print_plain(title, cells)


def _verdict(rows: Sequence[Row]) -> int:
    """Says what was not timed, and gives the exit code."""
    failed = [row for row in rows if "failed" in row]
    wrong = [row for row in rows if row.get("matches") is False]
    for row in failed:
        complain(f"{row['op']} was not timed: it failed", row["failed"])
    for row in wrong:
        off = "is not finite, or has another shape" if row["error"] is None else f"is off by {row['error']:.1e}"
        complain(f"{row['op']} was not timed: its result by {row['path']} {off}", "its reference says otherwise")
    return KvError.exit_code if failed else GateError.exit_code if wrong else 0
