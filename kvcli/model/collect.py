"""What `--collect` adds to the statistics of prefill: asked of the layers, with hooks, for the time of reading."""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from ..collect import COLLECT, collect_for
from ..snapshot import Stats
from .attend import Law
from .cache import Layer, named, need_own_attention, windows
from .load import Model
from .observed import ObservedLayer
from .rope import frequencies

NOT_KNOWN = "the model does not show its layers, output projection or how its queries turn, or the text is too short"
SINKS = 4  # first tokens, whose queries are unlike all others


class _Noting(Layer):
    """A cache layer that knows whose attention it serves."""

    def attend(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:
        self.module = module
        return super().attend(q, law, module)


@contextmanager
def collecting(
    model: Model, layers: Sequence[ObservedLayer], ids: Tensor, names: Collection[str], lead: int
) -> Iterator[None]:
    """While the document of these ids [N] is read, the layers also collect what the names of COLLECT stand for.

    Of the queries those of the `lead` tokens of the template and of the first four are left out. A statistic the
    model does not allow stays absent: where its decoder layers are not found, or how its queries turn is not known.
    """
    if not names:
        yield
        return
    model.check_ids(ids.tolist())
    need_own_attention(model.net)
    held, parts = [i for i, layer in enumerate(layers) if not layer.slides], {*_parts(names)}
    freq = frequencies(model.net, held, ids) if "q_mean" in parts else None
    for i in held:
        layers[i].collect, layers[i].skip = parts, max(lead, SINKS)
        layers[i].freq = None if freq is None else torch.tensor(freq, device=model.device)
    with hearing(model, layers, held, COLLECT["norms"] if "resid_norm" in parts else (), ids[-1:]):
        yield


@contextmanager
def hearing(
    model: Model, layers: Sequence[Layer], held: Sequence[int], names: Collection[str], token: Tensor
) -> Iterator[None]:
    """While the model reads, the layers `held` hear of the hidden states that are about to be attended to.

    names: which, of those in COLLECT["norms"]. token: [1], run once on its own where any is asked for.
    """
    blocks = _blocks(model, token) if names else {}
    hooks = [
        blocks[i][name].register_forward_pre_hook(partial(_hear, layers[i], name), with_kwargs=True)
        for i in held
        for name in names
        if i in blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def known(stats: Sequence[Stats]) -> tuple[str, ...]:
    """The names of COLLECT of which something is there."""
    return collect_for(part for each in stats for part in each.present())


def absent(stats: Sequence[Stats], held: Sequence[int], names: Collection[str]) -> list[str]:
    """The statistics under these names of COLLECT that some of the layers `held` lack."""
    return [part for part in _parts(names) if any(getattr(stats[i], part) is None for i in held)]


def _parts(names: Collection[str]) -> list[str]:
    return [part for name, parts in COLLECT.items() if name in names for part in parts]


def _blocks(model: Model, token: Tensor) -> dict[int, dict[str, nn.Module]]:  # [1]
    """By layer the modules that see the hidden state: the decoder layer, and its attention behind the first norm.

    A token run on its own shows which attention serves which layer; the decoder layers are the list of modules of
    which each owns one of them. Empty where there is no such list.
    """
    layers = [_Noting(room=1, window=window) for window in windows(model.config)]
    net = model.net.base_model
    net(input_ids=token.long()[None].to(model.net.device), use_cache=True, **named(net, Cache(layers=layers)))
    own = [layer.module for layer in layers]
    for blocks in (part for part in net.modules() if isinstance(part, nn.ModuleList) and len(part) == len(own)):
        if all(module in {*block.modules()} for block, module in zip(blocks, own, strict=True)):
            pairs = zip(blocks, own, strict=True)
            return {i: {"resid_norm": block, "attn_in_norm": module} for i, (block, module) in enumerate(pairs)}
    return {}


def _hear(layer: Any, name: str, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
    hidden = args[0] if args else given.get("hidden_states")
    if isinstance(hidden, Tensor) and hidden.dim() == 3:
        layer.hear(name, hidden[0])
