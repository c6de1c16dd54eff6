"""A campaign of kill -9: `python tests/kills.py [N]` kills N writers at random moments and looks at what they leave.

Two names are written in turn: one holds a snapshot that is replaced, the other nothing yet. Whatever the moment, the
first must hold the old file or the new one, the second nothing or the whole file, and a later write clears up the rest.
"""

import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from make import make_snapshot, packed

from kvcli.snapshot import Snapshot
from kvcli.storage import verify, write_snapshot


def write(snapshot: Snapshot, path: Path, killed_after: float | None = None) -> float:
    """Write in a child, kill it that many seconds after it began, and return how long it lived."""
    r, w = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(w, b"!")
            write_snapshot(snapshot, path, force=path.exists())
        finally:
            os._exit(0)
    os.read(r, 1)
    start = time.perf_counter()
    if killed_after is not None:
        time.sleep(killed_after)
        os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(r)
    os.close(w)
    return time.perf_counter() - start


def campaign(n: int, folder: Path, seed: int = 0) -> Counter[str]:
    """How often the old file, the new file, none, and a temporary were found; AssertionError for anything else."""
    rng, counts = random.Random(seed), Counter[str]()
    snapshots = [make_snapshot(tokens=4000, dim=64, stats=False, seed=seed) for seed in (1, 2)]
    bytes_of = [packed(snapshot) for snapshot in snapshots]
    kept, fresh = folder / "kept", folder / "fresh"
    typical, old = min(write(snapshots[0], kept) for _ in range(5)), 0
    for i in range(n):
        path, new = (kept, 1 - old) if i % 2 else (fresh, 0)
        write(snapshots[new], path, rng.uniform(0, 1.2 * typical))
        counts["temporaries"] += bool(list(folder.glob(f".{path.name}.*")))
        found = path.read_bytes() if path.exists() else None
        if path == kept:
            assert found in bytes_of, f"kill {i} left {path.name} neither old nor new"
            counts["old" if found == bytes_of[old] else "new"] += 1
            old = bytes_of.index(found)
        else:
            assert found in (None, bytes_of[new]), f"kill {i} left {path.name} incomplete"
            counts["none" if found is None else "whole"] += 1
            path.unlink(missing_ok=True)
    for path in (kept, fresh):
        write_snapshot(snapshots[0], path, force=True)
        verify(path)
    left = sorted(path.name for path in folder.iterdir())
    assert left == ["fresh", "kept"], f"never swept: {left}"
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        n = int(sys.argv[1]) if len(sys.argv) > 1 else 100
        print(json.dumps({"killed": n, **campaign(n, Path(place))}))
