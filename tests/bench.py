"""make bench: tables of `kvcli eval` and ratios of speed, as rows of samples/bench.jsonl and as text.

`make bench WHAT=kvmerger` measures one kind alone: quality, instrument, kinds (of facts), known (the question),
kvmerger (its variants beside H2O and SnapKV), ratio, or repeating (the document, before the question is known).
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from kvcli.cli.tables import print_tables
from kvcli.stamp import commit

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "samples/bench.jsonl"
VARIANTS = ",".join(
    f"kvmerger:{option}" for option in ("values=count", "values=mean", "values=logcount", "keys=pivot", "keys=rerotate")
)
DOCUMENT = "kvcli eval samples/harbour.txt"
EVALS = {
    "quality": f"{DOCUMENT} -m random,streamingllm,knorm,keydiff,h2o,snapkv,snapkv+adakv,kvmerger -b 50%,35%,20%",
    "instrument": "kvcli eval -t needle:tokens=1000,copies=20 --raw -m snapkv,keydiff,streamingllm,h2o -b 35%",
    "kinds": f"{DOCUMENT} -t needle:all,tokens=2000 -m streamingllm,keydiff,snapkv,kvmerger -b 50%",
    "known": f"{DOCUMENT} -t needle --known -m snapkv,snapkv+adakv -b 35%,20%",
    "kvmerger": f"{DOCUMENT} -m {VARIANTS},kvmerger+global,h2o,snapkv -b 50%,35%",
}


def evaluated(kind: str) -> list[dict[str, Any]]:
    """The rows of a command, each with what its numbers depend on."""
    words = [sys.executable, "-m", *shlex.split(EVALS[kind]), "--json"]
    found = json.loads(subprocess.run(words, stdout=subprocess.PIPE, check=True, cwd=ROOT).stdout)
    where = {name: value for name, value in found["config"].items() if value not in (None, False)}
    return [{"kind": kind, **row, **where} for row in found["rows"]]


def measured(kind: str) -> list[dict[str, Any]]:
    if kind in EVALS:
        return evaluated(kind)
    from ratios import ratios
    from repeating import repeating

    from kvcli.model.load import load
    from kvcli.stamp import stamp

    model = load(None, dtype="bfloat16")
    rows = ratios(model) if kind == "ratio" else repeating(model)
    return [{**row, "kind": kind, **stamp(model.device)} for row in rows]


def show(kind: str, rows: list[dict[str, Any]]) -> None:
    if kind in EVALS:
        print(f"$ {EVALS[kind]}")
        print_tables(rows, markdown=False)
    for row in rows if kind not in EVALS else ():
        print(f"{row['what']:<86} {row['ratio']:6.2f}  (aim {row['aim']})")


def main() -> None:
    old = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    kinds = [*EVALS, "ratio", "repeating"]
    rows = {kind: [row for row in old if row["kind"] == kind] for kind in kinds}
    for kind in sys.argv[1:] or kinds:
        rows[kind] = [{**row, "commit": commit()} for row in measured(kind)]
        ROWS.write_text("".join(json.dumps(row) + "\n" for kind in kinds for row in rows[kind]))
    for kind in kinds:
        show(kind, rows[kind])


if __name__ == "__main__":
    main()
