"""kvcli diff: which entries two snapshots of one document keep, and how far their attention differs."""

from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from . import streams
from .ui import Ui, clean, current, output_options, size, uses_kernels

if TYPE_CHECKING:
    from ..diff import Overlap
    from ..snapshot import Snapshot
    from ..storage import Reader

COUNTS = ("both", "changed", "only_a", "only_b")


@click.command("diff", short_help="Compare the entries of two snapshots of one document.")
@click.argument("a", metavar="A|-", type=click.Path())
@click.argument("b", metavar="B|-", type=click.Path())
@click.option("--heads", is_flag=True, help="A line for every head instead of every layer.")
@output_options
@uses_kernels
def command(a: str, b: str, heads: bool) -> None:
    """Say which entries A and B keep, how many they share, and the attention output error of B against A.

    Entries are told apart by position; "changed" are those of both whose key, value or bias differs, such as
    merged ones. The error needs saved queries in one of the files. --json lists the positions too.

    \b
    Examples:
      kvcli diff report.kv.safetensors small.kv.safetensors
      kvcli compress report.kv.safetensors -m snapkv -b 35% | kvcli diff report.kv.safetensors -
    """
    ui = current()
    if a == b == "-":
        raise UsageError("A and B cannot both come from stdin", fix="name the FILE of one of them")
    facts = _compare(ui, streams.source(a, ui), streams.source(b, ui))
    if ui.as_json:
        ui.result("kvcli.diff/1", facts)
    else:
        _show(ui, facts, heads)


def _compare(ui: Ui, *origins: streams.Source) -> dict[str, Any]:
    with ui.phases() as phase:
        phase("loading torch")
        from ..diff import check_same
        from ..storage import Reader

    with ExitStack() as stack:
        readers = []
        for origin in origins:
            with streams.waiting(origin, ui):
                readers.append(stack.enter_context(Reader(origin)))
        names = streams.shown(origins[0]), streams.shown(origins[1])
        check_same(readers[0].meta, readers[1].meta, names)
        layers = _layers(ui, readers)
    files = [{"file": name, "bytes": reader.header.size} for name, reader in zip(names, readers, strict=True)]
    same = readers[0].digest == readers[1].digest
    return {
        "a": files[0],
        "b": files[1],
        "identical": same,
        **_sum(layers),
        "output_error": _mean(layers),
        "layers": layers,
    }


def _layers(ui: Ui, readers: "list[Reader]") -> list[dict[str, Any]]:
    a, b = (reader.snapshot() for reader in readers)
    with ui.progress("comparing") as tick:
        layers = [_layer(a, b, i, tick) for i in range(len(a.rows))]
    for reader in readers:
        reader.verify()
    return layers


def _layer(a: "Snapshot", b: "Snapshot", i: int, tick: Any) -> dict[str, Any]:
    from ..diff import errors, overlap

    kv_a, kv_b = a.layer(i), b.layer(i)
    heads = [_head(part) for part in overlap(kv_a, kv_b)]
    error = errors(i, kv_a, kv_b, (a.stats[i], b.stats[i]), a.meta.layout)
    tick(i + 1, len(a.rows))
    return {**_sum(heads), "output_error": error, "heads": heads}


def _head(part: "Overlap") -> dict[str, Any]:
    from ..diff import runs

    counts = (part.both, part.changed, len(part.only_a), len(part.only_b))
    places = {"only_a_at": runs(part.only_a), "only_b_at": runs(part.only_b)}
    return {**dict(zip(COUNTS, counts, strict=True)), "overlap": part.share, **places}


def _sum(rows: list[dict[str, Any]]) -> dict[str, Any]:
    total: dict[str, Any] = {name: sum(row[name] for row in rows) for name in COUNTS}
    return {**total, "overlap": total["both"] / (total["both"] + total["only_a"] + total["only_b"])}


def _mean(layers: list[dict[str, Any]]) -> dict[str, float]:
    """Each error averaged over the layers where it is known."""
    found: dict[str, list[float]] = {}
    for layer in layers:
        for name, error in layer["output_error"].items():
            found.setdefault(name, []).append(error)
    return {name: sum(known) / len(known) for name, known in found.items()}


def _show(ui: Ui, facts: dict[str, Any], heads: bool) -> None:
    for key in "ab":
        entries, file = facts["both"] + facts[f"only_{key}"], facts[key]
        click.echo(f"{key.upper()}  {clean(file['file'])}: {entries:,} entries, {size(file['bytes'])}")
    if facts["identical"]:
        click.echo("A and B are identical")
        return
    click.echo(_line("layer", *(name.replace("_a", " A").replace("_b", " B") for name in COUNTS), "overlap", "error"))
    for i, layer in enumerate(facts["layers"]):
        for h, row in enumerate(layer["heads"] if heads else [layer]):
            click.echo(_row(f"{i}.{h}" if heads else str(i), row))
    click.echo(_row("all", facts))
    if facts["output_error"]:
        ui.say("error: median of |b - a| / |a| over attention outputs at the saved queries; all: the mean")
    else:
        ui.say("the output error is not known: neither snapshot has saved queries")


def _row(name: str, row: dict[str, Any]) -> str:
    error = row.get("output_error") or {}
    median = error.get("q_probe_median", error.get("q_last_median"))
    return _line(
        name, *(f"{row[key]:,}" for key in COUNTS), f"{row['overlap']:.1%}", "" if median is None else f"{median:.3f}"
    )


def _line(name: str, *cells: str) -> str:
    return (f"{name:<7}" + "".join(cell.rjust(9) for cell in cells)).rstrip()
