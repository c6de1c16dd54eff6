"""The snapshot as a transformers cache: an immutable prefix shared by all questions and a growing suffix."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..errors import InfeasibleError
from ..kernels.attention import causal_attention, join, ragged_attention
from ..kernels.dense import dense_attention
from ..snapshot import Rows
from .attend import NAME


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: `prefix` rows that are never copied or changed, and the tokens that came after them.

    It reports the logical length, `start` tokens of the prefix plus its own, so that positions stay right
    whatever the number of entries kept.
    """

    is_sliding = False

    def __init__(self, prefix: Rows | None = None, start: int = 0, room: int = 64) -> None:
        super().__init__()
        self.prefix, self.start, self.room = prefix, start, room
        self.lens = [] if prefix is None else prefix.lens.tolist()
        self.length = 0  # tokens in the suffix

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.dtype, self.device = key_states.dtype, key_states.device
        self.keys = key_states.new_empty(key_states.shape[1], self.room, key_states.shape[-1])
        self.values = value_states.new_empty(value_states.shape[1], self.room, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [1, H, M, D]; what is returned carries this layer to the attention function."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.length + key_states.shape[2]
        if end > self.keys.shape[1]:
            self.keys, self.values = (_grow(part, 2 * end) for part in (self.keys, self.values))
        self.keys[:, self.length : end] = key_states[0]
        self.values[:, self.length : end] = value_states[0]
        self.length = end
        setattr(key_states, NAME, self)
        return key_states, value_states

    def attend(self, q: Tensor, scale: float, module: nn.Module) -> Tensor:  # [Hq, M, D] -> [Hq, M, Dv]
        """Attention of the newest M tokens over prefix and suffix."""
        return self.attend_lse(q, scale)[0]

    def attend_lse(self, q: Tensor, scale: float) -> tuple[Tensor, Tensor]:  # -> [Hq, M, Dv], [Hq, M] float32
        """The same with the log-sum-exp of the logits."""
        new = q.shape[1]
        past = self.length - (new if new > 1 else 0)  # a single token sees itself as any other
        parts = []
        if self.prefix is not None:
            parts.append(ragged_attention(q, self.prefix.k, self.prefix.v, self.lens, self.prefix.bias, scale))
        if past:
            parts.append(dense_attention(q, self.keys[:, :past], self.values[:, :past], None, scale))
        if new > 1:
            k, v = (part[:, past : self.length] for part in (self.keys, self.values))
            parts.append(causal_attention(q, k, v, scale))
        return join(parts)

    def get_seq_length(self) -> int:
        return self.start + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        physical = self.length + max(self.lens, default=0)
        return physical + query_length, self.get_seq_length() - physical

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = 0


def _grow(part: Tensor, room: int) -> Tensor:  # [H, T, D] -> [H, room, D]
    grown = part.new_empty(part.shape[0], room, part.shape[2])
    grown[:, : part.shape[1]] = part
    return grown


def make_cache(net: PreTrainedModel, prefix: Sequence[Rows], start: int) -> Cache:
    """A fresh cache on a shared prefix of `start` tokens, for `past_key_values` of the model's forward or generate.

    Raises InfeasibleError if the model's attention is not ours: any other would ignore the prefix.
    """
    if net.config._attn_implementation != NAME:
        raise InfeasibleError(
            f"the model's attention is {net.config._attn_implementation}, which cannot read a snapshot",
            fix=f'load it with attn_implementation="{NAME}"',
        )
    return Cache(layers=[Layer(rows, start) for rows in prefix])


def place(rows: Rows, device: torch.device, dtype: torch.dtype) -> Rows:
    """The rows where the model is and in its precision; nothing is copied that is so already."""
    bias = None if rows.bias is None else rows.bias.to(device)
    return replace(rows, k=rows.k.to(device, dtype), v=rows.v.to(device, dtype), bias=bias)
