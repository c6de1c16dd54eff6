"""Rotary positions: keys turned by their positions, or turned back."""

import torch
from torch import Tensor


def rotate(x: Tensor, pos: Tensor, freq: Tensor, *, back: bool = False) -> Tensor:  # [..., D], [...], [R] -> [..., D]
    """Channels i and i + R, i < R, turned by pos * freq[i]; channels from 2 R on stay. In float32.

    Angles are rounded as models round them, so that turning back undoes what a model did.
    """
    half = len(freq)
    angle = pos[..., None].float() * freq.to(pos.device)
    cos, sin = angle.cos(), (-angle if back else angle).sin()
    left, right = x[..., :half].float(), x[..., half : 2 * half].float()
    return torch.cat([left * cos - right * sin, right * cos + left * sin, x[..., 2 * half :].float()], -1)
