"""Several questions to one snapshot at a time: greedy answers in step, so that weights and prefix are read once."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from ..device import blaming_card
from .attend import NAME, Law
from .cache import Layer, Part, PrefixCache, named
from .load import Model
from .prefix import Prefix, check_room, finite_logits, opening, run
from .text import stop_ids

MOST = 16  # questions at a time: each holds a cache of its own


class Batch(CacheLayerMixin):  # type: ignore[misc]
    """One layer of B caches on the same prefix, each of which takes one token at a time."""

    is_sliding = False
    is_initialized = True

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers = layers
        self.window, self.batch = layers[0].window, len(layers)

    @property
    def attended(self) -> bool:
        """Whether the newest tokens have attended."""
        return all(layer.attended for layer in self.layers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        """Append [B, H, 1, D], a token to each."""
        for layer, k, v in zip(self.layers, key_states, value_states, strict=True):
            layer.update(k[None], v[None])
        setattr(key_states, NAME, self)
        return key_states, value_states

    def attend_batch(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:  # [B, Hq, 1, D] -> [B, Hq, 1, Dv]
        """Attention of the newest token of each, over the prefix all at once."""
        parts: list[Part | None] = [None] * self.batch
        if all(layer.plain(law) for layer in self.layers):
            out, lse = self.layers[0].attend_prefix(q[:, :, 0].transpose(0, 1), law.scale)  # [Hq, B, Dv], [Hq, B]
            parts = list(zip(torch.split(out, 1, 1), torch.split(lse, 1, 1), strict=True))
        each = zip(self.layers, q, parts, strict=True)
        return torch.stack([layer.attend_lse(one, law, part)[0] for layer, one, part in each])

    def get_seq_length(self) -> int:
        return max(layer.get_seq_length() for layer in self.layers)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        longest: Layer = max(self.layers, key=Layer.get_seq_length)
        return longest.get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        return


@torch.inference_mode()
@blaming_card()
def answers(model: Model, prefix: Prefix, asked: Sequence[Sequence[int]], n: Sequence[int]) -> list[list[int]]:
    """The ids of the greedy answer to each question, at most `n` of each, with the token that ended the turn.

    As `answer` gives them, but for the rounding of products with several rows. Raises InfeasibleError if the model's
    context has no room for an answer, KvError for logits that are not finite.
    """
    ends, found = stop_ids(model.net, model.tokenizer, prefix.tail), list[list[int]]()
    for start in range(0, len(asked), MOST):
        pairs = zip(asked[start : start + MOST], n[start:], strict=False)
        group = [_Speaker(model, prefix, ids, most) for ids, most in pairs]
        while speaking := [one for one in group if one.goes_on(ends)]:
            _step(model, speaking)
        found += [one.said for one in group]
    return found


class _Speaker:
    """A question that was read, and its answer so far."""

    def __init__(self, model: Model, prefix: Prefix, ids: Sequence[int], most: int) -> None:
        check_room(model, prefix.tokens, len(ids), most)
        self.cache, self.most = prefix.cache(model), most
        first = next(run(model, self.cache, ids, 1, chunk=1024)) if ids else opening(model, prefix)
        self.said = [int(first.argmax())]

    def goes_on(self, ends: Sequence[int]) -> bool:
        return len(self.said) < self.most and self.said[-1] not in ends


def _step(model: Model, speaking: Sequence[_Speaker]) -> None:
    """A token more for each."""
    columns = zip(*(one.cache.layers for one in speaking), strict=True)
    cache: Cache = PrefixCache(layers=[Batch(column) for column in columns])
    device = model.net.device
    last = torch.tensor([one.said[-1:] for one in speaking], device=device)
    at = torch.tensor([[one.cache.get_seq_length()] for one in speaking], device=device)
    out = model.net(input_ids=last, position_ids=at, use_cache=True, logits_to_keep=1, **named(model.net, cache))
    drawn = finite_logits(model, out.logits[:, -1]).argmax(-1).tolist()
    for one, token in zip(speaking, drawn, strict=True):
        one.said.append(token)
