"""The snapshot as a transformers cache: an immutable prefix shared by all questions and a growing suffix."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from inspect import signature
from itertools import accumulate, pairwise
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from ..codes import Coded
from ..errors import InfeasibleError
from ..kernels.attention import causal_attention, ragged_attention
from ..kernels.banded import banded_attention
from ..kernels.codes import Codes
from ..kernels.dense import dense_attention, join
from ..kernels.packed import packed_attention
from ..snapshot import Rows
from .attend import NAME, Law

MEND = f'load it with attn_implementation="{NAME}", or net.set_attn_implementation("{NAME}")'
Held = TypeVar("Held", Rows, Coded)
Part = tuple[Tensor, Tensor]  # [Hq, M, Dv], [Hq, M] float32


class Layer(CacheLayerMixin):  # type: ignore[misc]
    """One layer: `prefix` rows and codes that are never copied or changed, and the tokens that came after them.

    It reports the logical length, `start` tokens of the prefix plus its own, so that positions stay right
    whatever the number of entries kept. With a `window`, a token sees itself and the `window - 1` before it, and
    tokens that none will see again are let go when room is needed.
    """

    is_sliding = False
    batch = 1  # sequences

    def __init__(
        self, prefix: Rows | Coded | None = None, start: int = 0, room: int = 64, window: int | None = None
    ) -> None:
        super().__init__()
        self.start, self.room, self.window = start, room, window
        self.codes = prefix if isinstance(prefix, Coded) else None
        self.prefix: Rows | None = prefix.whole if isinstance(prefix, Coded) else prefix
        self.lens = [] if self.prefix is None else self.prefix.lens.tolist()
        self.coded = [] if self.codes is None else (self.codes.lens - self.codes.whole.lens).tolist()
        self.longest = 0 if prefix is None else int(prefix.lens.max())
        self.length = 0  # tokens after the prefix
        self.gone = 0  # of them, no longer held
        self.attended = True  # whether the newest tokens have attended

    @property
    def held(self) -> int:
        """Tokens in the suffix; the first of them is at position `start + gone`."""
        return self.length - self.gone

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
        new = key_states.shape[2]
        if self.held + new > self.keys.shape[1]:
            self._make_room(new)
        here = slice(self.held, self.held + new)
        self.keys[:, here] = key_states[0]
        self.values[:, here] = value_states[0]
        self.length += new
        self.attended = False
        setattr(key_states, NAME, self)
        return key_states, value_states

    def _make_room(self, new: int) -> None:
        keep = self.held if self.window is None else min(self.held, self.window - 1)
        old = slice(self.held - keep, self.held)
        room = max(self.keys.shape[1], 2 * (keep + new))
        self.keys, self.values = (_moved(part[:, old], room) for part in (self.keys, self.values))
        self.gone = self.length - keep

    def attend_batch(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:  # [1, Hq, M, D] -> [1, Hq, M, Dv]
        """The same with the batch axis of the model."""
        return self.attend(q[0], law, module)[None]

    def attend(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:  # [Hq, M, D] -> [Hq, M, Dv]
        """Attention of the newest M tokens over prefix and suffix."""
        return self.attend_lse(q, law)[0]

    def attend_lse(self, q: Tensor, law: Law, prefix: Part | None = None) -> Part:
        """The same with the log-sum-exp of the logits; `prefix` is that over the prefix, where it is known already."""
        self.attended = True
        parts = self._all(q, law.scale, prefix) if self.plain(law) else self._banded(q, law)
        if law.sink_logit is not None:
            nothing = q.new_zeros(1).expand(*q.shape[:2], self.values.shape[-1])
            parts.append((nothing, law.sink_logit.float()[:, None].expand(q.shape[:2])))
        return join(parts)

    def plain(self, law: Law) -> bool:
        """Whether all that is held is seen, and logits are not capped."""
        return law.softcap is None and (self.window is None or self.get_seq_length() <= self.window)

    def _all(self, q: Tensor, scale: float, prefix: Part | None) -> list[Part]:
        new = q.shape[1]
        past = self.held - (new if new > 1 else 0)  # a single token sees itself as any other
        tail = self.keys[:, :past], self.values[:, :past]
        parts = []
        if self.prefix is not None:
            parts.append(prefix or self.attend_prefix(q, scale, tail))
        if past and (self.prefix is None or prefix):
            parts.append(dense_attention(q, *tail, None, scale))
        if new > 1:
            k, v = (part[:, past : self.held] for part in (self.keys, self.values))
            parts.append(causal_attention(q, k, v, scale))
        return parts

    def attend_prefix(self, q: Tensor, scale: float, tail: tuple[Tensor, Tensor] | None = None) -> Part:
        """Attention over the prefix, whose entries every query sees, and over a tail [H, S, D] that it sees as well."""
        if self.prefix is None:
            raise ValueError("the layer has no prefix")
        parts: list[Part] = []
        if any(self.lens):
            part = ragged_attention(q, self.prefix.k, self.prefix.v, self.lens, self.prefix.bias, scale, tail)
            parts.append(part)
        elif tail is not None and tail[0].shape[1]:
            parts.append(dense_attention(q, *tail, None, scale))
        if self.codes is not None:
            parts.append(packed_attention(q, self.codes.k, self.codes.v, self.coded, self.codes.bias, scale))
        return join(parts)

    def _banded(self, q: Tensor, law: Law) -> list[Part]:
        end, rest = self.get_seq_length(), (self.window, law.softcap)
        q_pos, pos = torch.arange(end - q.shape[1], end), torch.arange(end - self.held, end)
        k, v = self.keys[:, : self.held], self.values[:, : self.held]
        parts = [banded_attention(q, q_pos, k, v, pos, law.scale, None, *rest)]
        for heads in self._prefix_heads(q.dtype):
            groups = zip(q.chunk(len(self.lens)), heads, strict=True)
            each = [
                banded_attention(rows, q_pos, k, v, at, law.scale, bias, *rest) for rows, (k, v, at, bias) in groups
            ]
            parts.append((torch.cat([out for out, _ in each]), torch.cat([lse for _, lse in each])))
        return parts

    def _prefix_heads(self, dtype: torch.dtype) -> Iterator[Iterator[tuple[Any, ...]]]:
        """The whole rows a head at a time, k, v, pos and bias, then those of the codes, opened one by one."""
        for held, lens in ((self.prefix, self.lens), (self.codes, self.coded)):
            if held is not None:
                ends = list(accumulate(lens, initial=0))
                pos, bias = torch.split(held.pos, lens), _heads(held.bias, lens)
                each = ((_rows(part, a, b, dtype) for part in (held.k, held.v)) for a, b in pairwise(ends))
                yield ((*pair, at, added) for pair, at, added in zip(each, pos, bias, strict=True))

    def get_seq_length(self) -> int:
        return self.start + self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        physical = self.held + self.longest
        return physical + query_length, self.get_seq_length() - physical

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.length = self.gone = 0


def _moved(part: Tensor, room: int) -> Tensor:  # [H, T, D] -> [H, room, D]
    moved = part.new_empty(part.shape[0], room, part.shape[2])
    moved[:, : part.shape[1]] = part
    return moved


def _rows(part: Tensor | Codes, begin: int, end: int, dtype: torch.dtype) -> Tensor:  # -> [1, end - begin, D]
    return (part.rows(begin, end).to(dtype) if isinstance(part, Codes) else part[begin:end])[None]


def _heads(part: Tensor | None, lens: list[int]) -> Sequence[Tensor | None]:  # [E, ...] -> H x [1, T, ...]
    return [None] * len(lens) if part is None else torch.split(part[None], lens, 1)


class PrefixCache(Cache):  # type: ignore[misc]
    """A cache that does not let itself be read by an attention other than ours, which sees the new tokens alone."""

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        # Of the first layer it is the last one of the run before.
        if not self.layers[layer_idx - 1].attended:
            why = "it is not the network the cache was made for, or its attention was changed"
            raise InfeasibleError("the network did not attend to what the cache holds", why, MEND)
        return super().update(key_states, value_states, layer_idx, *args, **kwargs)


def windows(config: Any) -> list[int | None]:
    """How many tokens each layer's attention spans by a text config; None for all."""
    size = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [size if kind == "sliding_attention" else None for kind in kinds]


def named(net: Any, cache: Cache) -> dict[str, Cache]:
    """The cache as a keyword of the model's forward and generate, which called it `past_key_values` before 5.24."""
    return {"cache" if "cache" in signature(type(net).forward).parameters else "past_key_values": cache}


def need_own_attention(net: PreTrainedModel) -> None:
    """Raise InfeasibleError if the model's attention is not ours: any other would ignore what our caches hold."""
    if net.config._attn_implementation != NAME:
        raise InfeasibleError(
            f"the model's attention is {net.config._attn_implementation}, which cannot read a snapshot",
            fix=MEND,
        )


def check_shapes(layers: Sequence[Layer]) -> None:
    """Raise InfeasibleError for a model whose layers are not of one shape."""
    shapes = [f"keys {[*layer.keys.shape[::2]]} and values {[*layer.values.shape[::2]]}" for layer in layers]
    if odd := next((i for i, shape in enumerate(shapes) if shape != shapes[0]), 0):
        why = f"[heads, size] of a token: layer {odd} has {shapes[odd]}, layer 0 has {shapes[0]}"
        raise InfeasibleError("the model's layers are not of one shape, as those of a snapshot are", why)


def make_cache(net: PreTrainedModel, prefix: Sequence[Rows | Coded], start: int) -> Cache:
    """A fresh cache on a shared prefix of `start` tokens, for the model's forward or generate.

    Raises InfeasibleError if the model's attention is not ours.
    """
    need_own_attention(net)
    spans = windows(net.config.get_text_config())
    return PrefixCache(layers=[Layer(rows, start, window=span) for rows, span in zip(prefix, spans, strict=True)])


def place(rows: Held, device: torch.device, dtype: torch.dtype) -> Held:
    """The rows where the model is and in its precision; nothing is copied that is so already. Codes are there."""
    if isinstance(rows, Coded):
        return replace(rows, whole=place(rows.whole, device, dtype))
    bias = None if rows.bias is None else rows.bias.to(device)
    return replace(rows, k=rows.k.to(device, dtype), v=rows.v.to(device, dtype), bias=bias)
