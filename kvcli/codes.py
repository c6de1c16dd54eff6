"""Keys and values as codes: how numbers become codes, and a layer of which some entries are codes, the others whole."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import KvError
from .kernels.codes import Codes, pack
from .snapshot import Rows


@dataclass(frozen=True)
class Split:
    """Keys and values of a layer as an encoder stores them, in the order of entries."""

    coded: Tensor  # [E] bool, which entries are codes
    k: Codes  # [C, D]
    v: Codes  # [C, Dv]
    whole_k: Tensor  # [E - C, D]
    whole_v: Tensor  # [E - C, Dv]

    @property
    def numbers(self) -> dict[str, Tensor | None]:
        """All that has to be finite, by name."""
        scales = {"k.scale": self.k.scale, "k.zero": self.k.zero, "v.scale": self.v.scale, "v.zero": self.v.zero}
        return {"k": self.whole_k, "v": self.whole_v, **scales}

    def rows(self) -> tuple[Tensor, Tensor]:  # [E, D], [E, Dv]
        """All entries, in the dtype of those that are whole."""
        both = zip((self.k, self.v), (self.whole_k, self.whole_v), strict=True)
        k, v = (self._joined(codes.rows(), whole) for codes, whole in both)
        return k, v

    def layer(self, pos: Tensor, lens: Tensor, bias: Tensor | None) -> "Coded":  # [E], [H], [E]
        """The same for attention that reads codes as they are."""
        counts = torch.stack([part.sum() for part in torch.split(self.coded, lens.tolist())]).cpu()
        of_whole, of_codes = (None if bias is None else bias[at] for at in (~self.coded, self.coded))
        whole = Rows(self.whole_k, self.whole_v, pos[~self.coded], lens - counts, of_whole)
        return Coded(whole, self.k, self.v, pos[self.coded], lens, of_codes)

    def _joined(self, rows: Tensor, whole: Tensor) -> Tensor:
        joined = whole.new_empty(len(self.coded), whole.shape[1])
        joined[self.coded], joined[~self.coded] = rows.to(whole.dtype), whole
        return joined


@dataclass(frozen=True)
class Coded:
    """One layer as it is resumed from: entries that are whole, and head after head those that are codes."""

    whole: Rows  # a head may have none
    k: Codes  # [C, D]
    v: Codes  # [C, Dv]
    pos: Tensor  # [C] int32
    lens: Tensor  # [H] int64, entries a head of both kinds, on the CPU
    bias: Tensor | None = None  # [C] float32


def quantised(x: Tensor, bits: int, gt: int, gc: int) -> Codes:  # [E, D]
    """Codes between the least and the greatest number of each block, rounded half to even; E is a multiple of `gt`.

    Scale and zero are float16 and the codes are those nearest by what is stored: where float16 holds the least number,
    as it does for 16-bit keys and values, none is further off than half a scale. A block of equal numbers has scale 1.
    Raises KvError for numbers that float16 does not hold.
    """
    (E, D), C = x.shape, -(-x.shape[1] // gc)
    # The last block of a row is filled up with its last channel, which changes no extreme.
    wide = x.float() if D % gc == 0 else x.float()[:, torch.arange(C * gc, device=x.device).clamp(max=D - 1)]
    blocks = wide.view(E // gt, gt, C, gc)
    low, high = blocks.amin((1, 3)), blocks.amax((1, 3))
    zero, scale = low.half(), ((high - low) / (2**bits - 1)).half()
    scale = torch.where(scale == 0, 1, scale)
    if not bool((zero.isfinite() & scale.isfinite()).all()):
        raise KvError("keys or values are too large for float16, in which scales are stored", fix="use int8, or raw")
    code = (blocks - zero[:, None, :, None]).div_(scale[:, None, :, None]).round_().clamp_(0, 2**bits - 1)
    return Codes(pack(code.view(E, C * gc)[:, :D].to(torch.uint8), bits), scale, zero, bits, gt, gc, D)


def loaded(payload: Mapping[str, Tensor], name: str, *sizes: int) -> Codes:
    """The codes of k or v again; `sizes` are bits, gt, gc and D."""
    return Codes(payload[f"{name}.q"], payload[f"{name}.scale"], payload.get(f"{name}.zero"), *sizes)


def stored(name: str, codes: Codes) -> dict[str, Tensor]:
    """The codes of k or v as tensors of a file."""
    parts = {"q": codes.q, "scale": codes.scale, "zero": codes.zero}
    return {f"{name}.{part}": tensor for part, tensor in parts.items() if tensor is not None}
