"""One byte a number, with one scale for each entry's key and one for its value."""

import torch
from torch import Tensor

from ..codes import Split, loaded, stored
from ..kernels.codes import Codes
from ..meta import Layout
from ..registry import Ask, Scored, Shapes, Source, encode
from ..snapshot import LayerKV

SOURCE = Source(checked="worked examples")


@encode(source=SOURCE, lossy=True)
def int8(kv: LayerKV, scored: Scored | None, ask: Ask) -> dict[str, Tensor]:
    """Store keys and values in 8 bits, symmetric about 0, with a float32 scale each."""
    rows = kv.rows()
    return stored("k", _codes(rows.k)) | stored("v", _codes(rows.v))


@int8.shapes
def shapes(lens: list[int], layout: Layout) -> Shapes:
    """D + 4 bytes a key, Dv + 4 a value."""
    E, found = sum(lens), Shapes()
    for name, D in (("k", layout.head_dim), ("v", layout.v_dim)):
        found |= {f"{name}.q": ("I8", (E, D)), f"{name}.scale": ("F32", (E, 1))}
    return found


@int8.codes
def codes(payload: dict[str, Tensor], lens: Tensor) -> Split:  # [H]
    """Every entry is codes."""
    k, v = (loaded(payload, name, *_sizes(payload[f"{name}.q"])) for name in "kv")
    whole_k, whole_v = (part.scale.new_empty(0, part.D) for part in (k, v))
    return Split(torch.ones_like(k.scale[:, 0], dtype=torch.bool), k, v, whole_k, whole_v)


def _codes(rows: Tensor) -> Codes:  # [E, D]
    peak = rows.float().abs().amax(1, keepdim=True)
    scale = torch.where(peak == 0, 1, peak / 127)
    q = (rows.float() / scale).round().to(torch.int8)
    return Codes(q, scale, None, *_sizes(q))


def _sizes(q: Tensor) -> tuple[int, int, int, int]:
    return 8, 1, q.shape[1], q.shape[1]
