"""The rotation a model gives its keys: its frequencies, taken from the model and tried on it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm
from transformers import Cache

from ..kernels.rope import rotate
from .cache import Layer, check_shapes, named, windows
from .identity import NEAR, NEAR_16_BIT

BUFFERS = ("full_attention_inv_freq", "inv_freq")  # of a model whose sliding layers turn differently, and of others
OF_LENGTH = ("dynamic", "longrope")  # kinds whose frequencies depend on how long the text is


@torch.inference_mode()
def frequencies(net: Any, held: Sequence[int], ids: Tensor) -> list[float] | None:  # [N]
    """How fast pairs of channels turn, if the layers `held` all turn alike over the document; else None.

    A token on its own sees only itself, so its keys at two positions differ by nothing but the rotation: the last
    token is tried at the first position and at its own.
    """
    rotary = getattr(net.base_model, "rotary_emb", None)
    freq = next((part for name in BUFFERS if isinstance(part := getattr(rotary, name, None), Tensor)), None)
    rope = getattr(net.config.get_text_config(), "rope_parameters", None) or {}
    if freq is None or not held or rope.get("full_attention", rope).get("rope_type") in OF_LENGTH:
        return None
    last = max(len(ids) - 1, 1)
    first, moved = (_keys(net, held, ids[-1:], at) for at in (0, last))
    if 2 * len(freq) > first.shape[-1]:
        return None
    turned = rotate(first, torch.full(first.shape[:-1], last, device=first.device), freq)
    off = vector_norm(turned - moved, dim=(1, 2)) / vector_norm(turned, dim=(1, 2))  # NaN, and so unknown, for no keys
    return freq.tolist() if bool((off < (NEAR if net.dtype == torch.float32 else NEAR_16_BIT)).all()) else None


def _keys(net: Any, held: Sequence[int], token: Tensor, at: int) -> Tensor:  # [1] -> [held layers, H, D] float32
    layers = [Layer(room=1, window=window) for window in windows(net.config.get_text_config())]
    where = {"input_ids": token.long()[None].to(net.device), "position_ids": torch.tensor([[at]], device=net.device)}
    net.base_model(**where, use_cache=True, **named(net.base_model, Cache(layers=layers)))
    check_shapes(layers)
    return torch.stack([layers[i].keys[:, 0].float() for i in held])
