"""Matrices of small whole numbers, packed into bytes, with a scale and a zero for each block of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad


@dataclass(frozen=True)
class Codes:
    """E rows of D numbers `code * scale + zero`; codes are packed along a row, the first in the lowest bits.

    A block is `gt` rows by `gc` channels, the last of a row may be narrower. E is a multiple of `gt`.
    """

    q: Tensor  # [E, ceil(D * bits / 8)] uint8, or int8 where codes of 8 bits have a sign
    scale: Tensor  # [E / gt, ceil(D / gc)] float16 or float32
    zero: Tensor | None  # the same; None is 0
    bits: int  # 2, 4 or 8
    gt: int
    gc: int
    D: int

    def rows(self, begin: int = 0, end: int | None = None) -> Tensor:  # -> [end - begin, D] float32
        """The numbers of rows begin to end, both multiples of `gt`."""
        code = unpack(self.q[begin:end], self.bits, self.D).float()
        code = pad(code, (0, -self.D % self.gc)) if self.D % self.gc else code
        at = slice(begin // self.gt, None if end is None else end // self.gt)
        blocks = code.view(len(code) // self.gt, self.gt, self.scale.shape[1], self.gc)
        blocks.mul_(self.scale[at, None, :, None])
        if self.zero is not None:
            blocks.add_(self.zero[at, None, :, None])
        return code[:, : self.D]


def pack(code: Tensor, bits: int) -> Tensor:  # [E, D] uint8 -> [E, ceil(D * bits / 8)] uint8
    """8 / bits codes a byte; what the last byte has left is 0."""
    per = 8 // bits
    if per == 1:
        return code
    full = pad(code, (0, -code.shape[1] % per)).view(len(code), -(-code.shape[1] // per), per)
    return (full << torch.arange(0, 8, bits, dtype=torch.uint8, device=code.device)).sum(-1, dtype=torch.uint8)


def unpack(q: Tensor, bits: int, D: int) -> Tensor:  # [E, bytes] -> [E, D]
    """The codes of `pack`."""
    if bits == 8:
        return q
    # by numbers and not by a tensor of them, which takes five times as long on the CPU
    return torch.stack([q >> shift & (2**bits - 1) for shift in range(0, 8, bits)], -1).flatten(1)[:, :D]
