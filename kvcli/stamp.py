"""Where numbers come from: versions, and the processor they were measured on."""

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from . import __version__

STAMP = ("kvcli", "torch", "transformers", "python", "device", "processor")


def stamp(device: torch.device) -> dict[str, str]:
    """Where numbers come from: versions, kind of device, and its name."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    found = (__version__, torch.__version__, version("transformers"), platform.python_version(), device.type, processor)
    return dict(zip(STAMP, map(str, found), strict=True))


def commit() -> str | None:
    """The commit of the checkout this is run from, with -dirty where files differ; None where it was installed."""
    root = Path(__file__).parent.parent
    if not (root / ".git").exists():
        return None
    describe = ["git", "describe", "--always", "--dirty"]
    done = subprocess.run(describe, capture_output=True, text=True, cwd=root, check=False)
    return done.stdout.strip() or None


def _cpu() -> str:
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.exists() else []
    about = {name.strip(): text.strip() for name, _, text in (line.partition(":") for line in lines)}
    amx = " with AMX" if "amx_bf16" in about.get("flags", "").split() else ""
    return (
        f"{about.get('model name') or platform.machine()}, {torch.get_num_threads()} threads of {os.cpu_count()}{amx}"
    )
