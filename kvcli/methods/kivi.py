"""KIVI: keys are quantised a channel at a time over groups of entries, values an entry at a time."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codes import Split, loaded, quantised, stored
from ..header import DTYPE_BYTES
from ..meta import Layout
from ..options import AtLeast0, AtLeast1, Bits
from ..registry import Ask, Scored, Shapes, Source, encode
from ..snapshot import LayerKV

SOURCE = Source("arXiv:2402.02750", 2024, checked="worked examples")


@dataclass(frozen=True)
class _Rule:
    """The options of `kivi`: which entries of a head are codes, and in what blocks."""

    bits: int
    bits_k: int | None
    bits_v: int | None
    group: int
    residual: int
    first: int

    @property
    def sides(self) -> tuple[tuple[str, int, int, int], tuple[str, int, int, int]]:
        """Of keys and of values: the name, bits, entries and channels of a block."""
        return ("k", self.bits_k or self.bits, self.group, 1), ("v", self.bits_v or self.bits, 1, self.group)

    def spans(self, lens: Sequence[int]) -> list[tuple[int, int]]:
        """How many entries of each head stay whole before those that are codes, and how many are codes."""
        ends = [(min(self.first, n // 8), min(self.residual, n // 4), n) for n in lens]
        return [(begin, (n - begin - rest) // self.group * self.group) for begin, rest, n in ends]

    def coded(self, lens: Sequence[int]) -> Tensor:  # -> [E] bool
        coded, start = torch.zeros(sum(lens), dtype=torch.bool), 0
        for n, (begin, count) in zip(lens, self.spans(lens), strict=True):
            coded[start + begin : start + begin + count] = True
            start += n
        return coded


@encode(source=SOURCE, lossy=True)
def kivi(
    kv: LayerKV,
    scored: Scored | None,
    ask: Ask,
    *,
    bits: Bits = 4,
    bits_k: Bits | None = None,
    bits_v: Bits | None = None,
    group: AtLeast1 = 32,
    residual: AtLeast0 = 128,
    first: AtLeast0 = 4,
) -> dict[str, Tensor]:
    """Store keys and values in 2, 4 or 8 bits; the `first` and the `residual` last entries of a head stay whole.

    `bits_k` and `bits_v` override `bits`. At most an eighth of a head stays whole at first and a quarter at last, and
    what is left over when the others are cut into groups of `group`.
    """
    rule, rows, found = _Rule(bits, bits_k, bits_v, group, residual, first), kv.rows(), dict[str, Tensor]()
    coded = rule.coded(rows.lens.tolist()).to(rows.k.device)
    for (name, *block), part in zip(rule.sides, (rows.k, rows.v), strict=True):
        found |= stored(name, quantised(part[coded], *block))
        found[f"{name}.whole"] = part[~coded]
    return found


@kivi.shapes
def shapes(lens: list[int], layout: Layout, **options: Any) -> Shapes:
    """Codes, a scale and a zero of float16 for each group, and the entries that are whole."""
    rule, found = _Rule(**options), Shapes()
    E, C = sum(lens), sum(count for _, count in rule.spans(lens))
    for (name, bits, gt, gc), D in zip(rule.sides, (layout.head_dim, layout.v_dim), strict=True):
        groups = C // gt, -(-D // gc)
        found |= {f"{name}.q": ("U8", (C, -(-D * bits // 8)))}
        found |= {f"{name}.scale": ("F16", groups), f"{name}.zero": ("F16", groups)}
        found |= {f"{name}.whole": (layout.dtype, (E - C, D))}
    return found


@kivi.bound
def bound(B: int, layout: Layout, **options: Any) -> float:
    """As if every head had as many whole entries as one of its length can have."""
    rule = _Rule(**options)
    codes = shapes([rule.group], layout, **{**options, "residual": 0, "first": 0})
    coded = sum(DTYPE_BYTES[dtype] * n * width for dtype, (n, width) in codes.values()) / rule.group
    whole = DTYPE_BYTES[layout.dtype] * (layout.head_dim + layout.v_dim)
    # An eighth and a quarter are rounded down in every head, so their mean may be 1 above those of the mean.
    most = min(B, min(rule.first, B // 8 + 1) + min(rule.residual, B // 4 + 1) + rule.group - 1)
    return coded * B + max(0.0, whole - coded) * most


@kivi.codes
def codes(payload: dict[str, Tensor], lens: Tensor, **options: Any) -> Split:  # [H]
    """A group of keys is `group` entries of one channel, one of values `group` channels of one entry."""
    rule, whole = _Rule(**options), [payload[f"{name}.whole"] for name in "kv"]
    k, v = (
        loaded(payload, name, *block, part.shape[1]) for (name, *block), part in zip(rule.sides, whole, strict=True)
    )
    return Split(rule.coded(lens.tolist()).to(k.q.device), k, v, *whole)
