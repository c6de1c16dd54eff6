"""A synthetic snapshot of 1 GiB, and one timed run over it: `python tests/big.py ours|theirs FOLDER`."""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch

from kvcli.cli.ui import peak_memory

LAYERS, HEADS, Q_HEADS, TOKENS, DIM = 32, 8, 32, 8192, 128


def make_big(path: Path) -> None:
    """Keys drift slowly, as neighbours in text do, so that runs are of every length."""
    from make import make_snapshot

    from kvcli.snapshot import Snapshot
    from kvcli.storage import write_snapshot

    one = make_snapshot(1, HEADS, Q_HEADS, TOKENS, DIM)
    steps = torch.randn(HEADS, TOKENS, DIM, generator=torch.Generator().manual_seed(1))
    k = steps + 0.9 * steps.roll(1, 1) + 0.8 * steps.roll(2, 1)
    rows = replace(one.rows[0], k=k.bfloat16().flatten(0, 1), pos=torch.arange(TOKENS, dtype=torch.int32).repeat(HEADS))
    layout = replace(one.meta.layout, layers=LAYERS, kinds=("full",) * LAYERS)
    queries = torch.randn(Q_HEADS, 64, DIM, generator=torch.Generator().manual_seed(2)).bfloat16()
    stats = replace(
        one.stats[0],
        q_last=queries,
        q_last_pos=torch.arange(TOKENS - 64, TOKENS, dtype=torch.int32),
        q_probe=queries,
        q_probe_pos=torch.linspace(0, TOKENS - 1, 64).int(),
    )
    meta = replace(one.meta, layout=layout)
    write_snapshot(Snapshot(meta, one.ids, [rows] * LAYERS, [stats] * LAYERS, one.extra), path)


def compress(folder: Path) -> dict[str, int]:
    from kvcli.budget import Budget
    from kvcli.pipeline import carry_out, make_plans
    from kvcli.recipe import Recipe
    from kvcli.storage import Reader

    with Reader(folder / "big") as reader:
        snapshot = reader.snapshot()
        plans = make_plans(snapshot, Recipe.parse("kvmerger"), [Budget.parse("35%")])
        carry_out(snapshot, plans, [folder / "small"], force=True)
    return {"layer": HEADS * TOKENS * 2 * DIM * 2, "scores": LAYERS * HEADS * TOKENS * 4}


def rewrite(folder: Path) -> dict[str, int]:
    from safetensors.torch import load_file, save_file

    save_file({name: tensor.clone() for name, tensor in load_file(folder / "big").items()}, folder / "copy")
    return {}


if __name__ == "__main__":
    before, start = peak_memory(), time.perf_counter()
    facts = {"ours": compress, "theirs": rewrite}[sys.argv[1]](Path(sys.argv[2]))
    print(json.dumps({"seconds": time.perf_counter() - start, "peak": peak_memory(), "baseline": before, **facts}))
