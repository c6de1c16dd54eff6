"""The attention function `kvcli` for transformers: attention over what our cache layers hold. Registered on import."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from ..errors import InfeasibleError
from .text import rope_switch, too_long

NAME = "kvcli"
# Arguments a model may pass along that change nothing here.
HARMLESS = frozenset(
    "position_ids cache_position use_cache is_causal output_attentions output_hidden_states output_router_logits "
    "return_dict dropout".split()
)


@dataclass(frozen=True)
class Law:
    """What makes attention weights of queries and keys, but for the window, which a cache layer knows itself."""

    scale: float
    softcap: float | None = None
    sink_logit: Tensor | None = None  # [Hq], one more logit in each softmax that no entry receives


def attend(
    module: nn.Module,
    query: Tensor,  # [B, Hq, M, D]
    key: Tensor,  # [B, H, M, D]
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    sliding_window: int | None = None,
    **rest: Any,
) -> tuple[Tensor, None]:  # [B, M, Hq, Dv]
    """Attend causally over the new tokens and everything the cache layer behind `key` holds.

    Raises InfeasibleError for a batch that the cache is not made for, and for arguments it does not know: leaving one
    out would be silently wrong.
    """
    law = Law(query.shape[-1] ** -0.5 if scaling is None else scaling, softcap, s_aux)
    layer = getattr(key, NAME, None)
    refuse(query, attention_mask, rest, 1 if layer is None else layer.batch)
    if layer is None:
        raise InfeasibleError(
            "the model's attention did not get its keys from a cache of kvcli",
            "the model changes keys after it caches them, or runs without a cache",
        )
    if layer.window != sliding_window:
        spans = [f"{size} tokens" if size else "all tokens" for size in (sliding_window, layer.window)]
        raise InfeasibleError(f"the model's attention spans {spans[0]}, by its config it should span {spans[1]}")
    return layer.attend_batch(query, law, module).transpose(1, 2), None


def refuse(query: Tensor, mask: Tensor | None, rest: dict[str, Any], batch: int) -> None:
    """Raise InfeasibleError naming what this attention cannot honour."""
    strange = sorted(name for name in rest.keys() - HARMLESS if rest[name] is not None)
    if rest.get("is_causal") is False:
        strange.append("attention in both directions")
    if mask is not None:
        strange.append("attention_mask")
    if query.shape[0] != batch:
        strange.append(f"a batch of {query.shape[0]}")
    if strange:
        raise InfeasibleError(f"the model's attention asks for {', '.join(strange)}, which kvcli does not support")


def no_mask(
    *_: Any,
    config: Any,
    attention_mask: Tensor | None = None,  # [B, N + M] bool
    q_offset: int = 0,
    q_length: int = 0,
    **__: Any,
) -> None:
    """Called once a forward pass, for its mask: there is none, positions say who sees whom.

    Raises InfeasibleError for a mask that hides tokens, and for tokens beyond the length at which positions change.
    """
    if attention_mask is not None and not bool(attention_mask.all()):
        raise InfeasibleError("the attention_mask hides tokens", "attention over a snapshot sees all", "leave it out")
    end = q_offset + q_length
    if end > min(rope_switch(config).values(), default=end):
        raise too_long(config, f"there are {end:,} tokens with those generated", "generate fewer")


AttentionInterface.register(NAME, attend)
# Without a function of its own transformers would drop the mask unseen.
AttentionMaskInterface.register(NAME, no_mask)
