"""Write what is generated: the table of method names for help and completion, and the marked parts of README.md."""

import io
import json
import subprocess
import sys
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bench import EVALS

from kvcli.cli import COMMANDS
from kvcli.cli.kernels import LAYERS, case_words
from kvcli.cli.tables import print_tables
from kvcli.cli.ui import size
from kvcli.collect import COLLECT
from kvcli.kernels.floors import floors
from kvcli.kernels.table import OPS
from kvcli.recipe import written
from kvcli.registry import stages

ROOT = Path(__file__).parent.parent
NAMES = ROOT / "kvcli/cli/names.py"
README = ROOT / "README.md"
BANDWIDTH, FLOPS = 3.35e12, 990e12  # of an H100 SXM, the flops in bf16 on its tensor cores


def names_file() -> str:
    """Each tuple ends with a comma, which keeps a name a line when it is formatted."""
    about = '"""Names for help and completion, so that these need no torch. Written by `make docs`."""'
    tables = {
        "METHODS": sorted({stage.name for stage in stages()}),
        "CALIBRATED": sorted({stage.name for stage in stages() if stage.profile}),
        "STATISTICS": [*COLLECT],
    }
    lines = [[f"{key} = (", *(f'    "{name}",' for name in names), ")"] for key, names in tables.items()]
    return "\n".join([about, "", *(line for table in lines for line in table), ""])


def methods_table() -> str:
    titles = (
        "name",
        "stage",
        "what it does",
        "options",
        "needs",
        "paper",
        "year",
        "question in view",
        "checked against",
    )
    rows = ["| " + " | ".join(titles) + " |", "| --- " * len(titles) + "|"]
    for stage in stages():
        options = ", ".join(
            f"`{written(key, option.default)}`" + (f" ({option.words})" if option.choices or option.optional else "")
            for key, option in stage.options.items()
        )
        needs, source = ", ".join([*stage.needs, *["profile"] * bool(stage.profile)]), stage.source
        seen = ("yes" if source.question else "no") if source.paper else ""
        cells = (f"`{stage.name}`", stage.kind, stage.help, options, needs)
        cells += (source.paper, str(source.year or ""), seen, source.checked)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def commands_text() -> str:
    blocks = []
    for command in COMMANDS:
        shown = [sys.executable, "-m", "kvcli", command, "--help"]
        text = subprocess.run(shown, capture_output=True, text=True, check=True, env={"COLUMNS": "110"}).stdout
        blocks.append(f"```\n$ kvcli {command} --help\n{text.strip()}\n```")
    return "\n\n".join(blocks)


def bench_rows(kind: str) -> list[dict[str, Any]]:
    return [row for row in _rows(ROOT / "samples/bench.jsonl") if row["kind"] == kind]


def eval_table(kind: str) -> str:
    """The command of a kind of `make bench`, and what it prints with --markdown."""
    out = io.StringIO()
    with redirect_stdout(out):
        print_tables(bench_rows(kind), markdown=True)
    return f"```\n{EVALS[kind]}\n```\n\n{out.getvalue().strip()}"


def peer_table(path: Path = ROOT / "samples/peer.jsonl") -> str:
    """kvpress and kvcli beside each other, as `make peer` measured them, with versions and date."""
    rows = _rows(path)
    lines = [peer_about(rows), ""] if rows else []
    lines += ["| keep | method | by | found | KL | top-1 | keys and values | compress | tokens/s |", "| --- " * 9 + "|"]
    for row in rows:
        cells = [f"{row['budget']:.0%}", f"`{row['method']}`", row["by"]]
        cells += [row["error"], *[""] * 5] if "error" in row else peer_cells(row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def peer_cells(row: dict[str, Any]) -> list[str]:
    found = f"{row['hit']:.0%} ± {row['stderr']:.0%}"
    held = f"{row['bytes'] / 1e6:.1f} MB ({row['keep']:.0%})"
    cost = [f"{row['compress_seconds']:.2f} s", f"{row['tokens_per_second']:.0f}"]
    full = row["method"] == "full"
    return [
        found,
        *(["", ""] if full else [_number(row["kl"]), _share(row["top1"])]),
        held,
        "" if full else cost[0],
        cost[1],
    ]


def peer_about(rows: list[dict[str, Any]]) -> str:
    sides = [
        f"{by} {row[by]} (torch {row['torch']}, transformers {row['transformers']})"
        for by in ("kvcli", "kvpress")
        for row in rows
        if row["by"] == by and row["method"] == "full"
    ]
    row = rows[0]
    return (
        f"{' and '.join(sides)}, {row['date']}, {row['processor']}, threads: {row['threads']}; {row['model']} in "
        f"{row['dtype']}, {row['n']} questions about {row['texts']} texts of {row['tokens']:,} tokens. "
        f"The full caches of both answer {row['agree']} of the {row['n']} with the same tokens."
    )


def blind_table(path: Path = ROOT / "samples/blind.jsonl") -> str:
    """What is found of questions nobody knew while compressing, as `make peer` measured it; best first."""
    rows = _rows(path)
    lines = [blind_about(rows), ""] if rows else []
    titles = ("keep", "method", "by", "found", "KL of answers", "KL of what follows", "keys and values")
    lines += [f"| {' | '.join(titles)} |", "| --- " * len(titles) + "|"]
    for row in sorted(rows, key=lambda row: (-row["budget"], -row.get("hit", [-1])[0])):
        cells = [f"{row['budget']:.0%}", f"`{row['method']}`", row["by"]]
        cells += [row["error"], *[""] * 3] if "error" in row else blind_cells(row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def blind_cells(row: dict[str, Any]) -> list[str]:
    low, high = (f"{end:.0%}" for end in row["hit"][1:])
    kls = [f"{x:.3f} ({a:.3f} to {b:.3f})" for x, a, b in (row["kl"], row["continuation_kl"])]
    held, full = f"{row['bytes'] / 1e6:.1f} MB ({row['keep']:.0%})", row["method"] == "full"
    found = f"{row['hit'][0]:.1%} ({low} to {high})"
    return [found, *(["", ""] if full else kls), held]


def blind_about(rows: list[dict[str, Any]]) -> str:
    sides = [
        f"{by} {next(row[by] for row in rows if row['by'] == by)}" for by in dict.fromkeys(row["by"] for row in rows)
    ]
    row = rows[0]
    return (
        f"{' and '.join(sides)}, {row['date']}, {row['processor']}, threads: {row['threads']}; {row['model']} in "
        f"{row['dtype']}, {row['n']} questions about {row['texts']} texts of {row['tokens']:,} tokens; in brackets the "
        f"interval of 95 %, and of bytes the share of the full cache's."
    )


def grid_table(folder: Path = ROOT / "samples") -> str:
    """Every method at every budget, as `kvcli bench` measured them, without and with the question known."""
    plain, known = (_rows(folder / name) for name in ("grid.jsonl", "grid-known.jsonl"))
    asked = {(row["method"], row["budget"]): row for row in known}
    budgets = dict.fromkeys(row["budget"] for row in plain if row["method"] != "full")
    titles = ("method", "found", "question known", "KL", "top-1", "output error", "file", "GB/s")
    lines = []
    for budget in budgets:
        rows = [row for row in plain if row["budget"] == budget and row["method"] != "full"]
        lines += ["", f"**{budget or 'Every entry, in fewer bits'}**", "", f"| {' | '.join(titles)} |"]
        lines += ["| --- " * len(titles) + "|"]
        for row in sorted(rows, key=lambda row: -_metric(row, "hit")["value"]):
            lines.append("| " + " | ".join(grid_cells(row, asked.get((row["method"], budget)))) + " |")
    return "\n".join(lines).strip()


def grid_cells(row: dict[str, Any], known: dict[str, Any] | None) -> list[str]:
    seen = _bar(_metric(known, "hit")) if known else ""
    error = row["output_error"]["q_probe_median"]
    numbers = [f"{_metric(row, 'kl')['value']:.3f}", f"{_metric(row, 'top1')['value']:.1%}", f"{error:.3f}"]
    rest = [size(row["file_bytes"]), f"{row['bytes_per_second'] / 1e9:.3f}"]
    return [f"`{row['method']}`", _bar(_metric(row, "hit")), seen, *numbers, *rest]


def _metric(row: dict[str, Any], name: str) -> dict[str, float]:
    return next(found for key, found in row["metrics"].items() if key.endswith(f" {name}"))


def _bar(found: dict[str, float]) -> str:
    return f"{found['value']:.0%} ± {found['stderr']:.0%}"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def kept_table(path: Path = ROOT / "samples/kept.jsonl") -> str:
    """What kvpress and kvcli keep of the same cache, as `make peer` compared them."""
    rows = _rows(path)
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["cache"], row["recipe"], row["press"], row["why"]), []).append(row)
    budgets = [f"{row['budget']:.0%}" for row in next(iter(groups.values()), [])]
    lines = [f"| cache | kvcli | kvpress | {' | '.join(budgets)} | why not all |", "| --- " * (4 + len(budgets)) + "|"]
    for (cache, recipe, press, why), some in groups.items():
        press += f", {' / '.join(_options(row['options']) for row in some)}" if some[0]["options"] else ""
        cells = [cache, f"`{recipe}`", press, *(f"{row['agree']:.2%} ({row['same']:.2%})" for row in some), why]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _options(options: dict[str, float]) -> str:
    return ", ".join(f"{name}={value:.4g}" for name, value in options.items())


def ratio_table() -> str:
    rows = ["| what | ratio | aim |", "| --- | --- | --- |"]
    found = [*bench_rows("ratio"), *bench_rows("repeating")]
    rows += [f"| {row['what']} | {row['ratio']:.2f} | {row['aim']} |" for row in found]
    return "\n".join(rows)


def kernels_table() -> str:
    """What the ops cost a model of 32 layers, and the least time that takes on a card."""
    title = (
        f"| op | Triton kernels | one layer | bytes | GFLOP | {BANDWIDTH / 1e12} TB/s | {FLOPS / 1e12:.0f} TFLOP/s |"
    )
    rows = [title, "| --- | --- | --- |" + " ---: |" * 4]
    for row in floors(OPS, torch.device("cpu"), 32768, BANDWIDTH):
        moved, flops = LAYERS * row["bytes"], LAYERS * row["flops"]
        kernels = ", ".join(f"`{name}`" for name in row["kernels"]) or "none"
        times = (f"{moved / BANDWIDTH * 1e3:.2f} ms", f"{flops / FLOPS * 1e3:.2f} ms")
        cells = (f"`{row['op']}`", kernels, case_words(row["case"]), size(moved), f"{flops / 1e9:,.1f}", *times)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def _number(value: object) -> str:
    return f"{value:.3f}" if isinstance(value, float) else ""


def _share(value: object) -> str:
    return f"{value:.1%}" if isinstance(value, float) else ""


def readme() -> str:
    text = README.read_text()
    for name, make in PARTS.items():
        begin, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        head, rest = text.split(begin)
        text = head + begin + make() + "\n" + end + rest.split(end)[1]
    return text


PARTS = {
    "methods": methods_table,
    "commands": commands_text,
    **{kind: partial(eval_table, kind) for kind in EVALS},
    "grid": grid_table,
    "peer": peer_table,
    "blind": blind_table,
    "kept": kept_table,
    "ratios": ratio_table,
    "kernels": kernels_table,
}


if __name__ == "__main__":
    NAMES.write_text(names_file())
    README.write_text(readme())
