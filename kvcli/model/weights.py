"""The weights in a model folder: their hash, their dtype, and whether a loaded network has them."""

import json
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
import xxhash
from torch import Tensor

from ..errors import StorageError
from ..layers import DTYPES
from .convert import recall, remember, stamps, weight_files

BLOCK = 1 << 22  # bytes


class _Weight(NamedTuple):
    name: str
    dtype: str
    shape: list[int]
    file: Path
    start: int
    size: int


def weights_hash(folder: Path) -> str:
    """XXH3-128 over name, dtype, shape and bytes of every weight, however they are spread over files.

    Cached in `known.json` by size and times of the files. Raises StorageError for a file that cannot be read.
    """
    folder = folder.resolve()
    if digest := recall(folder):
        return digest
    try:
        before, digest = stamps(folder), _hash(_weights(folder))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as cause:
        raise StorageError(f"cannot read the weights in {folder}", f"{type(cause).__name__}: {cause}") from cause
    remember(folder, before, digest)
    return digest


def weights_dtype(folder: Path) -> str:
    """The dtype most of the stored weights have, as safetensors names it."""
    sizes: Counter[str] = Counter()
    for weight in _weights(folder):
        sizes[weight.dtype] += weight.size
    return sizes.most_common(1)[0][0]


def _weights(folder: Path) -> list[_Weight]:
    found = []
    for file in weight_files(folder):
        with file.open("rb") as handle:
            length = int.from_bytes(handle.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError(f"{file.name} is no safetensors file")
            table = json.loads(handle.read(length))
        for name, info in table.items():
            if name != "__metadata__":
                start, end = info["data_offsets"]
                found.append(_Weight(name, info["dtype"], info["shape"], file, 8 + length + start, end - start))
    if not found:
        raise ValueError("there is no model.safetensors")
    return sorted(found)


def _hash(weights: list[_Weight]) -> str:
    digest, buffer = xxhash.xxh3_128(), memoryview(bytearray(BLOCK))
    with ExitStack() as stack:
        files = {file: stack.enter_context(file.open("rb", 0)) for file in {weight.file for weight in weights}}
        for weight in weights:
            digest.update(json.dumps(weight[:3]).encode())
            files[weight.file].seek(weight.start)
            left = weight.size
            while left:
                got = files[weight.file].readinto(buffer[: min(left, BLOCK)])
                if not got:
                    raise ValueError(f"{weight.file.name} is cut short")
                digest.update(buffer[:got])
                left -= got
    return digest.hexdigest()


def holds(folder: Path, net: Any) -> bool:
    """Whether the network still has the weights of the folder's safetensors files, rounded to its own precision.

    Those that transformers merges or renames when it loads them cannot be compared.
    """
    mine, compared = net.state_dict(), 0
    for weight in _weights(folder):
        name = weight.name if weight.name in mine else f"{net.base_model_prefix}.{weight.name}"
        if name in mine and weight.dtype in DTYPES:
            stored = _stored(weight).view(DTYPES[weight.dtype]).view(weight.shape)
            if not torch.equal(stored.to(mine[name].dtype), mine[name].cpu()):
                return False
            compared += 1
    return compared > 0


def _stored(weight: _Weight) -> Tensor:  # -> [bytes] uint8
    data = torch.empty(weight.size, dtype=torch.uint8)
    with weight.file.open("rb", 0) as handle:
        handle.seek(weight.start)
        rest = data.numpy().data
        while rest and (n := handle.readinto(rest)):
            rest = rest[n:]
    return data
