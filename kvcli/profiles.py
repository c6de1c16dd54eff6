"""Profiles: what a method has to know of a model beforehand, as JSON, one file a method and hash of weights."""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .errors import FormatError, InfeasibleError, MismatchError, StorageError
from .meta import Json
from .spool import blaming, open_output

SHIPPED = Path(__file__).parent / "methods/profiles"  # those of the default model
LARGEST = 1e30  # of a number in a profile, so that float32 holds it


def home() -> Path:
    """The folder of converted models and of what is known about others: KVCLI_HOME, else kvcli in the user's cache."""
    if own := os.environ.get("KVCLI_HOME"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "kvcli"


def profile_path(method: str, weights: str) -> Path:
    """Where `kvcli calibrate` keeps the profile of a method for a model, known by the hash of its weights."""
    return home() / "profiles" / _folder(weights) / f"{method}.json"


def load_profile(method: str, weights: str) -> Json:
    """The profile of a method for these weights: the user's own, else the one that is shipped.

    Raises InfeasibleError where there is none, MismatchError for one of other weights, FormatError if damaged.
    """
    shipped = SHIPPED / _folder(weights) / f"{method}.json"
    path = next((path for path in (profile_path(method, weights), shipped) if path.is_file()), None)
    if path is None:
        why = f"the model that made the snapshot is calibrated once; looked in {profile_path(method, weights).parent}"
        raise InfeasibleError(f"{method} has no profile of this model", why, f"kvcli calibrate --for {method}")
    return read_profile(path, method, weights)


def read_profile(path: Path, method: str, weights: str) -> Json:
    """The profile in a file; raises as `load_profile` does."""
    again = f"kvcli calibrate --for {method}"
    try:
        found = json.loads(path.read_text())
        about = found["method"], found["weights"]
    except OSError as cause:
        raise StorageError(f"cannot read {path}", cause.strerror or "") from cause
    except (KeyError, TypeError, ValueError, RecursionError) as cause:
        raise FormatError(f"{path} is not a profile", f"{cause!s:.80}", again) from cause
    if about != (method, weights):
        why = f"it was made for {about[0]!s:.40} on weights {about[1]!s:.32}, not for {method} on {weights:.32}"
        raise MismatchError(f"{path} is the profile of another model", why, again)
    return dict(found)


def numbers(profile: Json, name: str, layers: Sequence[int], width: int | None = None) -> list[Any]:
    """What a profile says of these layers: a number each, or a list of `width` numbers.

    Raises InfeasibleError for a layer it was not calibrated for, FormatError for a table of another shape.
    """
    again, table = f"kvcli calibrate --for {profile['method']}", profile.get(name)
    if not isinstance(table, list) or len(table) <= max(layers):
        raise FormatError(f"the profile of {profile['method']} has no {name} of layer {max(layers)}", fix=again)
    found = [table[i] for i in layers]
    if None in found:
        raise InfeasibleError(
            f"{profile['method']} was not calibrated for layer {layers[found.index(None)]}", fix=again
        )
    if not all(_is_number(row) if width is None else _are_numbers(row, width) for row in found):
        raise FormatError(f"the profile of {profile['method']} does not hold {width or 1} {name} a layer", fix=again)
    return found


def _are_numbers(row: object, width: int) -> bool:
    return isinstance(row, list) and len(row) == width and all(map(_is_number, row))


def _is_number(value: object) -> bool:
    return type(value) in (int, float) and -LARGEST < value < LARGEST  # type: ignore[operator]


def save_profile(profile: Json) -> Path:
    """Keep a profile, which names its `method` and `weights`, and return its path. Raises StorageError."""
    path = profile_path(profile["method"], profile["weights"])
    data = (json.dumps(profile, sort_keys=True, indent=1) + "\n").encode()
    with blaming("write", path):
        path.parent.mkdir(parents=True, exist_ok=True)
    with open_output(path, len(data), force=True) as write:
        write(data)
    return path


def _folder(weights: str) -> str:
    """A hash as the name of a folder, whatever a file says its hash is."""
    return re.sub(r"[^0-9A-Za-z]", "_", weights)[:64] or "_"
