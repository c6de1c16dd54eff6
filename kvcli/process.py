"""kvcli run in a process of its own, whose seconds and memory are its alone."""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import KvError
from .recipe import Cell

Facts = dict[str, Any]


def compressing(full: Path, small: Path, cell: Cell, seed: int) -> list[str]:
    """The arguments of kvcli for one cell."""
    recipe, budget = cell
    size = ["-b", budget.text] if budget else []
    return ["compress", str(full), "-m", str(recipe), *size, "-o", str(small), "-f", "--seed", str(seed), "--json"]


def compressed(args: Sequence[str]) -> Facts:
    """The row of one compression; raises the KvError it ended with."""
    code, out = apart(args)
    try:
        told = json.loads(out)
    except ValueError as cause:
        why = f"signal {-code}: often the system has no more memory" if code < 0 else f"exit code {code}"
        raise KvError("kvcli compress ended without a word", why) from cause
    if error := told.get("error"):
        kinds = {kind.exit_code: kind for kind in KvError.__subclasses__()}
        raise kinds.get(error["code"], KvError)(error["what"], error["why"], error["fix"])
    facts: Facts = told["rows"][0]
    return facts


def apart(args: Sequence[str]) -> tuple[int, str]:
    """Exit code and stdout of kvcli in a process of its own, whose seconds and memory are its alone."""
    # The same code whatever lies in the current folder, where `-m kvcli` would look first.
    code = f"import sys; sys.path[:] = {sys.path!r}; from kvcli.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, *args],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def medians(runs: Sequence[Mapping[str, float]]) -> Facts:
    """The median of each number, and under `spread` its 20th and 80th percentile."""
    facts, spread = {}, {}
    for name in runs[0]:
        values = torch.tensor([run[name] for run in runs], dtype=torch.float64)
        low, facts[name], high = values.quantile(torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64)).tolist()
        spread[name] = [low, high]
    return {**facts, "spread": spread}
