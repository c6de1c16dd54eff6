"""What it costs to compress before the question is known: repeating the document, fitting, and bits on top."""

import json
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from blind import BEST
from ratios import ROOT, document, row, timed

from kvcli.model.load import Model
from kvcli.model.observe import prefill
from kvcli.model.replay import replay
from kvcli.model.text import document_ids
from kvcli.snapshot import Snapshot
from kvcli.storage import write_snapshot

TOKENS, BUDGETS = 4096, ("50%", "20%")
BITS, GROUP = 4, 64


def repeating(model: Model) -> list[dict[str, Any]]:
    """Rows as `ratios` has them."""
    _, lead, tail = document(model)
    text = (ROOT / "samples/harbour.txt").read_text()
    ids, seq = document_ids(model.tokenizer, text * 2, chat=True)[0][:TOKENS], (lead, tail, True)
    found: list[Snapshot] = []
    reading, telling = [], []
    for _ in range(4):
        reading.append(timed(lambda: found.append(prefill(model, ids, seq))))
        telling.append(timed(lambda: found.append(replay(model, found[-1]))))
    what = f"repeating {TOKENS:,} tokens for --collect kvzip / their prefill with statistics"
    rows = [row(what, "at most 2.5", telling[1:], reading[1:])]
    with TemporaryDirectory() as folder:
        full = Path(folder) / "full"
        write_snapshot(found[-1], full)
        rows += [seconds(full, budget) for budget in BUDGETS]
        return [*rows, memory(full), bits(full)]


def compressed(full: Path, recipe: str, budget: str) -> dict[str, Any]:
    """What the command says of itself, in a process of its own."""
    words = ["compress", str(full), "-m", recipe, "-b", budget, "-f", "-o", str(full.with_name("small")), "--json"]
    out = subprocess.run([sys.executable, "-m", "kvcli", *words], stdout=subprocess.PIPE, check=True).stdout
    found: dict[str, Any] = json.loads(out)["rows"][0]
    return found


def seconds(full: Path, budget: str) -> dict[str, Any]:
    runs = [compressed(full, BEST, budget)["seconds"] for _ in range(3)]
    what = f"seconds of compressing {TOKENS:,} tokens by {BEST} to {budget}, of 60"
    return {"kind": "ratio", "what": what, "ratio": sorted(runs)[1] / 60, "aim": "under 1", "first_s": sorted(runs)}


def memory(full: Path) -> dict[str, Any]:
    """Beyond a method that reads as much, two layers at a time, and fits nothing: what the queries of a head see."""
    plain, fitted = (compressed(full, recipe, "50%")["peak_memory"] for recipe in ("kvzip", BEST))
    what = "MB of peak memory of that to 50% beyond kvzip alone, which holds two layers"
    facts = {"plain": plain, "fitted": fitted}
    return {"kind": "ratio", "what": what, "ratio": (fitted - plain) / 1e6, "aim": "", **facts}


def bits(full: Path) -> dict[str, Any]:
    """Bytes of keys and values with kivi on top; the floor is codes, and a scale and a zero of 16 bit a group."""
    plain, coded = (compressed(full, recipe, "20%")["kv_bytes"] for recipe in (BEST, f"{BEST}+kivi:bits={BITS}"))
    floor = (BITS + 32 / GROUP) / 16
    what = f"bytes of keys and values of {BEST} at 20%, {TOKENS:,} tokens: with kivi:bits={BITS} / without"
    facts = {"plain": plain, "coded": coded, "floor": floor}
    return {"kind": "ratio", "what": what, "ratio": coded / plain, "aim": f"at most 0.45, floor {floor:.2f}", **facts}
