"""Ids through a model, a chunk at a time, behind what cache layers hold."""

from collections.abc import Callable, Sequence

from torch import Tensor
from transformers import Cache

from ..device import blaming_card
from ..errors import KvError
from ..snapshot import finite
from .cache import Layer, check_shapes, named, need_own_attention
from .load import Model
from .observed import ObservedLayer


@blaming_card()
def read(
    model: Model,
    layers: Sequence[Layer],
    ids: Tensor,
    chunk: int,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Tensor:  # -> [M, d] hidden states of the last chunk after the final norm
    """Run these ids through the model behind what the layers hold.

    Raises MismatchError for ids beyond the model's vocabulary, InfeasibleError for a model whose layers are not of one
    shape, KvError where what it computes is not finite.
    """
    model.check_ids(ids.tolist())
    cache, net = Cache(layers=list(layers)), model.net
    need_own_attention(net)
    for start in range(0, len(ids), chunk):
        part = ids[start : start + chunk].long()[None].to(net.device)
        out = net.base_model(input_ids=part, use_cache=True, **named(net.base_model, cache))
        hidden: Tensor = out.last_hidden_state[0]
        check_shapes(layers)
        tick(min(start + chunk, len(ids)), len(ids))
    bad = [f"layer {i}" for i, layer in enumerate(layers) if isinstance(layer, ObservedLayer) and not layer.finite]
    if bad or not finite(hidden):
        who = bad[0] if bad else "the model's last hidden state"
        raise KvError(f"NaN or infinity in {who}", f"computed in {net.dtype}", "try --dtype float32")
    return hidden
