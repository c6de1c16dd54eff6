"""What people hand to the Python interface, held against what it takes: models, snapshots, ids."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..snapshot import Snapshot
from .load import Model


def need_model(model: Any) -> None:
    """Raise UsageError for anything but a model with its tokenizer."""
    if not isinstance(model, Model):
        fix = "kvcli.load(network, tokenizer) makes one of it"
        raise UsageError(f"a {type(model).__name__} is no model of kvcli", "its tokenizer belongs to it too", fix)


def need_snapshot(snapshot: Any) -> None:
    """Raise UsageError for anything but a snapshot, such as the name of its file."""
    if not isinstance(snapshot, Snapshot):
        raise UsageError(f"a {type(snapshot).__name__} is no snapshot", fix="kvcli.open(FILE) reads one")


def listed(ids: Sequence[int] | Tensor, model: Model) -> list[int]:
    """Ids as a list; a batch of one is taken for its sequence. UsageError for what is none, see Model.check_ids."""
    try:
        tokens = torch.as_tensor(ids)
    except (TypeError, ValueError, RuntimeError) as cause:  # torch raises any of them
        what = f"a {type(ids).__name__} is neither text nor ids of tokens"
        raise UsageError(what, f"{cause!s:.80}", "give a string, or a list or tensor of ids") from cause
    if tokens.dim() == 2 and len(tokens) == 1:
        tokens = tokens[0]
    if tokens.dim() != 1 or not len(tokens):
        raise UsageError(f"ids of the shape {tuple(tokens.shape)} are not one sequence")
    if tokens.is_floating_point() or tokens.is_complex() or tokens.dtype == torch.bool:
        raise UsageError(f"{tokens.dtype} is no type for ids", fix="give whole numbers")
    found: list[int] = tokens.tolist()
    model.check_ids(found)
    return found
