"""Write what is generated: the table of method names for help and completion, and the marked parts of README.md."""

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from kvcli.cli import COMMANDS
from kvcli.recipe import written
from kvcli.registry import stages

ROOT = Path(__file__).parent.parent
NAMES = ROOT / "kvcli/cli/names.py"
README = ROOT / "README.md"


def names_file() -> str:
    about = '"""Names of methods for help and completion, so that these need no torch. Written by `make docs`."""'
    names = sorted({stage.name for stage in stages()})
    return "\n".join([about, "", "METHODS = (", *(f'    "{name}",' for name in names), ")", ""])


def methods_table() -> str:
    rows = ["| name | stage | what it does | options | needs | paper |", "| --- | --- | --- | --- | --- | --- |"]
    for stage in stages():
        options = ", ".join(
            f"`{written(key, option.default)}`" + (f" ({option.words})" if option.choices or option.optional else "")
            for key, option in stage.options.items()
        )
        cells = (f"`{stage.name}`", stage.kind, stage.help, options, ", ".join(stage.needs), stage.paper)
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def commands_text() -> str:
    blocks = []
    for command in COMMANDS:
        shown = [sys.executable, "-m", "kvcli", command, "--help"]
        text = subprocess.run(shown, capture_output=True, text=True, check=True, env={"COLUMNS": "110"}).stdout
        blocks.append(f"```\n$ kvcli {command} --help\n{text.strip()}\n```")
    return "\n\n".join(blocks)


def bench_rows(*kinds: str) -> list[dict[str, object]]:
    path = ROOT / "samples/bench.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [row for row in rows if row["kind"] in kinds]


def quality_table(kind: str = "quality") -> str:
    rows = ["| method | keep | hits | KL | top-1 | file |", "| --- | --- | --- | --- | --- | --- |"]
    for row in bench_rows(kind):
        keep = f"{row['keep']:.0%}"
        cells = (f"`{row['recipe']}`", keep, f"{row['hits']} of {row['asked']}", _number(row.get("kl_mean")))
        rows.append("| " + " | ".join([*cells, _share(row.get("top1")), f"{row['file_bytes'] / 1e6:.1f} MB"]) + " |")
    return "\n".join(rows)


def ratio_table() -> str:
    rows = ["| what | ratio | aim |", "| --- | --- | --- |"]
    rows += [f"| {row['what']} | {row['ratio']:.2f} | {row['aim']} |" for row in bench_rows("ratio", "ragged")]
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
    "quality": quality_table,
    "known": partial(quality_table, "known"),
    "kvmerger": partial(quality_table, "kvmerger"),
    "ratios": ratio_table,
}


if __name__ == "__main__":
    NAMES.write_text(names_file())
    README.write_text(readme())
