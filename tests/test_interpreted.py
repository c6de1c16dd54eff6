"""The main job on Triton's kernels in Triton's interpreter: what the CPU path makes of it, from text to answer."""

import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model

import kvcli
from kvcli.kernels import launch
from kvcli.kernels.build import launches
from kvcli.kernels.table import OPS
from kvcli.snapshot import Snapshot
from kvcli.storage import Reader

pytest.importorskip("triton", reason="no Triton for this system")

TEXT = "The harbour opened at six. " * 2 + "The new ferry is called Kestrel.\n"
CLOSE = {"atol": 1e-5, "rtol": 1e-4}  # float32, two orders of summation
PIPE = """
set -euo pipefail
kvcli() { "$PYTHON" -m kvcli "$@"; }
kvcli prefill -q doc.txt --chunk 32 -o full
kvcli compress -q -m kvmerger -b 35% - < full > small
kvcli resume -q -p "What?" -n 3 - < small > said
"""


def work(folder: Path, **env: str) -> str:
    """Run the pipe in a new folder with a document and a model; the answer."""
    folder.mkdir()
    (folder / "doc.txt").write_text(TEXT)
    model = {"KVCLI_MODEL": str(tiny_model(folder / "model")), "KVCLI_DTYPE": "float32", "PYTHON": sys.executable}
    subprocess.run(["bash", "-c", PIPE], cwd=folder, env={**os.environ, **model, **env}, check=True)
    return (folder / "said").read_text()


@pytest.mark.slow
def test_the_main_job_interpreted_is_that_of_the_cpu(tmp_path: Path) -> None:
    folders = [tmp_path / "cpu", tmp_path / "triton"]
    assert work(folders[0]) == work(folders[1], TRITON_INTERPRET="1", KVCLI_KERNELS="triton")
    for name in ("full", "small"):
        with Reader(folders[0] / name) as one, Reader(folders[1] / name) as other:
            same(one.snapshot(), other.snapshot())


def same(one: Snapshot, other: Snapshot) -> None:
    for part, twin in ((one.rows, other.rows), (one.stats, other.stats)):
        for layer, its_twin in zip(part, twin, strict=True):
            for field in fields(layer):
                found, expected = getattr(its_twin, field.name), getattr(layer, field.name)
                assert (found is None) == (expected is None)
                if found is not None:
                    close = CLOSE if found.dtype is torch.float32 else {}  # 16 bits are off by a last one
                    torch.testing.assert_close(found, expected, **close)
    torch.testing.assert_close(dict(other.extra), dict(one.extra), **CLOSE)


@pytest.mark.slow
def test_every_kernel_has_its_part(model: Any, interpreted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def job() -> tuple[list[Snapshot], list[int]]:
        full = kvcli.prefill(TEXT, model, raw=True, chunk=40, collect="kvzip")
        small = [kvcli.compress(full, recipe, "35%") for recipe in ("kvmerger", "snapkv+adakv", "lookm")]
        coded = kvcli.compress(full, "kivi:group=8")  # a last bit may be a whole step of its scale
        asked = [part.inputs(model, "?") for part in (small[1], coded)]
        said = [model.net.generate(**each, max_new_tokens=2, do_sample=False) for each in asked]
        return [full, *small], torch.cat(said).flatten().tolist()

    started, run = set(), launch.run
    monkeypatch.setattr(launch, "run", lambda one: (started.add(one.kernel.name), run(one)))
    snapshots, said = job()
    assert not started
    monkeypatch.setenv("KVCLI_KERNELS", "triton")
    found, said_there = job()
    assert started == {launch.kernel.name for op in OPS for _, launch in launches(op, 64, torch.float32, "sm_90")}
    assert said == said_there
    for one, other in zip(snapshots, found, strict=True):
        same(one, other)
