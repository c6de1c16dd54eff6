"""The default encoding: keys and values as they are."""

from torch import Tensor

from ..meta import Layout
from ..registry import Ask, Scored, Shapes, encode
from ..snapshot import LayerKV


@encode()
def raw(kv: LayerKV, scored: Scored | None, ask: Ask) -> dict[str, Tensor]:
    """Store keys and values bit for bit."""
    rows = kv.rows()
    heads = (len(rows.lens),) if rows.uniform else ()
    return {name: part.reshape(*heads, -1, part.shape[-1]) for name, part in (("k", rows.k), ("v", rows.v))}


@raw.shapes
def shapes(lens: list[int], layout: Layout) -> Shapes:
    """[H, n, D] where all heads hold n entries, else [E, D]."""
    entries = (len(lens), lens[0]) if len(set(lens)) == 1 else (sum(lens),)
    return {"k": (layout.dtype, (*entries, layout.head_dim)), "v": (layout.dtype, (*entries, layout.v_dim))}


@raw.decoder
def decode(payload: dict[str, Tensor], lens: Tensor) -> tuple[Tensor, Tensor]:  # [H] -> [E, D], [E, Dv]
    """The same numbers as flat rows, without a copy."""
    k, v = payload["k"], payload["v"]
    return k.flatten(0, -2), v.flatten(0, -2)
