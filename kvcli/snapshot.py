"""The snapshot as a value: padded heads and flat rows, statistics, and the whole; knows tensors, no files."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .collect import COLLECT
from .errors import FormatError
from .kernels.take import take_rows
from .meta import Meta

T = TypeVar("T")


@dataclass(frozen=True)
class Rows:
    """One layer as flat rows, head after head: E entries in all, `lens` of them in each of the H heads."""

    k: Tensor  # [E, D]
    v: Tensor  # [E, Dv]
    pos: Tensor  # [E] int32
    lens: Tensor  # [H] int64, on the CPU wherever the others are
    bias: Tensor | None = None  # [E] float32
    span: Tensor | None = None  # [E] int32

    def __post_init__(self) -> None:
        entries = int(self.lens.sum())
        for name in ("k", "v", "pos", "bias", "span"):
            part = getattr(self, name)
            if part is not None and part.shape[0] != entries:
                raise ValueError(f"{name} has {part.shape[0]} rows, lens add up to {entries}")

    @property
    def uniform(self) -> bool:
        """Whether all heads hold the same number of entries."""
        return bool((self.lens == self.lens[0]).all())


@dataclass(frozen=True)
class LayerKV:
    """One layer, heads padded to the longest: padding comes last in a head and has position -1."""

    k: Tensor  # [H, T, D]
    v: Tensor  # [H, T, Dv]
    pos: Tensor  # [H, T] int32
    bias: Tensor | None = None  # [H, T] float32
    span: Tensor | None = None  # [H, T] int32

    def __post_init__(self) -> None:
        for name in ("k", "v", "pos", "bias", "span"):
            part = getattr(self, name)
            if part is not None and part.shape[:2] != self.pos.shape:
                raise ValueError(f"{name} is {tuple(part.shape)}, positions are {tuple(self.pos.shape)}")

    @property
    def real(self) -> Tensor:  # [H, T] bool
        """Which slots hold an entry."""
        return self.pos >= 0

    @property
    def entries(self) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """What attention is over: keys, values, positions, biases."""
        return self.k, self.v, self.pos, self.bias

    @property
    def lens(self) -> Tensor:  # [H] int64
        return self.real.sum(1)

    def by_entry(self, part: Tensor) -> Tensor:  # [N] or [H, N] -> [H, T]
        """What is known of each position, for the entries there; padding gives numbers without meaning."""
        return part.expand(len(self.pos), -1).gather(1, self.pos.clamp(min=0).long())

    def rows(self) -> Rows:
        """The same entries without padding; a view when no head is padded."""
        real, lens = self.real, self.lens.cpu()
        if bool(real.all()):
            return Rows(lens=lens, **{name: part.flatten(0, 1) for name, part in _parts(self)})
        return Rows(lens=lens, **_taken(self, real.flatten().nonzero().flatten()))

    @classmethod
    def from_rows(cls, rows: Rows) -> "LayerKV":
        """Padded heads from flat rows; a view when all heads are of one length."""
        heads, longest = len(rows.lens), int(rows.lens.max())
        if rows.uniform:
            return cls(**{name: part.reshape(heads, longest, *part.shape[1:]) for name, part in _parts(rows)})
        lens = rows.lens.to(rows.pos.device)[:, None]
        slot = torch.arange(longest, device=rows.pos.device)
        return cls(**_taken(rows, torch.where(slot < lens, lens.cumsum(0) - lens + slot, -1)))


def _parts(layer: Rows | LayerKV) -> list[tuple[str, Tensor]]:
    every = ((name, getattr(layer, name)) for name in ("k", "v", "pos", "bias", "span"))
    return [(name, part) for name, part in every if part is not None]


def _taken(layer: Rows | LayerKV, index: Tensor) -> dict[str, Tensor]:  # [...] int64, rows head after head
    """All parts of the entries named; index -1 gives padding, of position -1 and else zeros."""
    k, v = take_rows(layer.k, layer.v, index)
    small = {name: part.flatten()[index] for name, part in _parts(layer) if name not in ("k", "v")}
    return {"k": k, "v": v} | {n: part.masked_fill(index < 0, -1 if n == "pos" else 0) for n, part in small.items()}


def append(rows: Rows, new: Rows, since: int = 0) -> Rows:
    """The entries of each head at positions `since` and later, and behind them those of `new`, which has no bias."""
    seen = rows.pos >= since
    lens = torch.stack([part.sum() for part in torch.split(seen, rows.lens.tolist())]).cpu()
    blank = {"bias": torch.zeros(len(new.pos), device=new.pos.device), "span": torch.ones_like(new.pos)}
    joined = {}
    for name, part in _parts(rows):
        old, added = part if bool(seen.all()) else part[seen], blank.get(name, getattr(new, name)).to(part.dtype)
        pairs = zip(torch.split(old, lens.tolist()), torch.split(added, new.lens.tolist()), strict=True)
        joined[name] = torch.cat([piece for pair in pairs for piece in pair])
    return Rows(lens=lens + new.lens, **joined)


def gather(kv: LayerKV, index: Tensor) -> LayerKV:  # [H, n] int64, -1 = padding
    """The entries named by `index` in each head; index -1 gives padding."""
    H, T = kv.pos.shape
    begin = torch.arange(0, H * T, T, device=index.device)[:, None]
    return LayerKV(**_taken(kv, torch.where(index < 0, -1, index + begin)))


def top_mask(score: Tensor, count: Tensor) -> Tensor:  # [H, T], [H] -> [H, T] bool
    """The `count` highest scores of each head; of equal scores the lower index."""
    lowest = [row.kthvalue(len(row) + 1 - max(n, 1)).values for row, n in zip(score, count.tolist(), strict=True)]
    edge = torch.stack(lowest)[:, None]  # [H, 1], a selection costs a seventh of sorting twice
    above, tied = score > edge, score == edge
    return above | (tied & (tied.cumsum(1) <= count[:, None].to(score.device) - above.sum(1, keepdim=True)))


def mask_index(mask: Tensor) -> Tensor:  # [H, T] bool -> [H, n] int64
    """Where each head's mask is set, ascending, padded with -1 to the longest."""
    lens = mask.sum(1)
    index = mask.new_full((len(lens), int(lens.max())), -1, dtype=torch.int64)
    real = torch.arange(index.shape[1], device=mask.device) < lens[:, None]
    index[real] = mask.nonzero()[:, 1]
    return index


@dataclass(frozen=True)
class Stats:
    """What prefill observed in one layer; every field may be absent. Per-token fields are indexed by position."""

    q_last: Tensor | None = None  # [Hq, W, D] the last queries, post-RoPE
    q_last_pos: Tensor | None = None  # [W] int32
    q_probe: Tensor | None = None  # [Hq, P, D] queries spread evenly, post-RoPE
    q_probe_pos: Tensor | None = None  # [P] int32
    attn_mass: Tensor | None = None  # [H, N] float32, attention received, mean over the group
    value_norm: Tensor | None = None  # [H, N] float32, 1-norm of v W_O, mean over the group
    sink_logit: Tensor | None = None  # [Hq] float32, a learned logit in each softmax that no entry receives
    mass_sq: Tensor | None = None  # [H, N] float32, squares of the attention received, mean over the group
    q_mean: Tensor | None = None  # [Hq, D] float32, of the queries without their rotation, the sinks' left out
    q_cov: Tensor | None = None  # [Hq, D, D] float32, their covariance
    resid_norm: Tensor | None = None  # [N] float32, 2-norm of the hidden state that enters the layer
    attn_in_norm: Tensor | None = None  # [N] float32, the same behind the layer's first norm
    kvzip: Tensor | None = None  # [H, N] float16, most attention of a query while the model repeats the document
    kvzip_rms: Tensor | None = None  # [H, N] float16, root mean square of it over all those queries
    kvzip_plus: Tensor | None = None  # [H, N] float16, as `kvzip`, of the value's size beside the hidden state's
    q_repeat: Tensor | None = None  # [Hq, R, D] queries of that repetition spread evenly over the document
    q_repeat_pos: Tensor | None = None  # [R] int32, behind the document

    def present(self) -> dict[str, Tensor]:
        """The fields that are there, by name, in the order they are written."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def mass_of(self, kv: LayerKV) -> Tensor:  # [H, T] float32
        """The attention each entry has received, a merged one its pivot; padding gives numbers without meaning."""
        if self.attn_mass is None:
            raise ValueError("attn_mass is missing: name it in needs=")
        return kv.by_entry(self.attn_mass)


def usual(stats: Stats) -> Stats:
    """Those that are recorded of every document, without what `--collect` adds."""
    return replace(stats, **{part: None for parts in COLLECT.values() for part in parts})


def finite(part: Tensor) -> bool:
    """Whether no number is NaN or infinite.

    The extremes show both, NaN being passed on by them, at a tenth of the price of a mask over all numbers.
    """
    return not part.numel() or bool(torch.stack(part.aminmax()).isfinite().all())


def check_finite(layer: int, **parts: Tensor | None) -> None:
    """Raise FormatError, which names layer and part, where a number is NaN or infinite."""
    for name, part in parts.items():
        if part is not None and not finite(part):
            raise FormatError(f"layer {layer}: {name} holds NaN or infinity", fix="prefill the document again")


class Lazy(Sequence[T]):
    """What `read` gives for each of `indices` when asked; `compact` the same in fewer bytes, in a form of its own."""

    def __init__(self, indices: range, read: Callable[[int], T], compact: Callable[[int], Any] | None = None) -> None:
        self._indices, self._read, self.compact = indices, read, compact or read

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: Any) -> Any:
        found = self._indices[index]
        return [self._read(i) for i in found] if isinstance(found, range) else self._read(found)


@dataclass(frozen=True)
class Snapshot:
    """One sequence as a model remembers it. `rows` and `stats` may read a layer when it is asked for.

    Layers may lie on a card; ids, `extra` and the lengths of heads are on the CPU.
    extra: tensors of the whole file by their name there: `stat.final_hidden` [d_model],
        `stat.probe_k`, `stat.probe_v` [L, H, P, D], `report` [L, 4], and those of later versions.
    """

    meta: Meta
    ids: Tensor  # [N] int32
    rows: Sequence[Rows]
    stats: Sequence[Stats]
    extra: Mapping[str, Tensor]

    @property
    def lasting(self) -> dict[str, Tensor]:
        """What of `extra` still holds when entries change: no report, nothing that a later version keeps of a layer."""
        return {name: part for name, part in self.extra.items() if not re.fullmatch(r"report|L[0-9]+\..*", name)}

    def layer(self, index: int) -> LayerKV:
        """Layer `index` with padded heads."""
        return LayerKV.from_rows(self.rows[index])
