"""What a model attends to while it answers, layer by layer, and what a few entries would have given it instead."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..codes import Coded
from ..errors import InfeasibleError
from ..kernels.banded import capped
from ..snapshot import LayerKV, Rows, Stats
from .attend import Law
from .cache import Layer, PrefixCache, windows
from .load import Model
from .observed import WINDOW, output_weight
from .prefix import Prefix, run
from .text import stop_ids

EPSILON = 1e-6


class Watched(Layer):
    """A cache layer that keeps its newest queries, and holds what `small` gives them against its own."""

    def __init__(self, prefix: Rows | Coded, start: int, window: int | None) -> None:
        super().__init__(prefix, start, window=window)
        self.law = Law(0.0)
        self.small: Layer | None = None  # which the tokens to come are put into as well
        self.error = 0.0  # |small - own| / |own| behind the output projection, summed over these tokens

    @property
    def whole(self) -> bool:
        """Whether no token has gone out of the window."""
        return self.window is None or self.get_seq_length() <= self.window

    def attend(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:
        out, lse = self.attend_lse(q, law)
        self.law, self.q, self.lse = law, q[:, -WINDOW:], lse[:, -1]
        if self.small is not None:
            new = slice(self.held - q.shape[1], self.held)
            self.small.update(self.keys[None, :, new], self.values[None, :, new])
            self.error += _off(self.small.attend(q, law, module), out, module)
        return out

    def mass(self, begin: int, end: int) -> Tensor:  # -> [Hq] float32
        """The attention that the newest query gives to these tokens of the prefix; 0 where the layer slides."""
        if not self.whole or self.prefix is None:
            return torch.zeros(len(self.q), device=self.q.device)
        k = torch.unflatten(self.prefix.k, 0, (len(self.lens), -1))[:, begin:end]
        q = torch.unflatten(self.q[:, -1], 0, (len(k), -1))  # [H, G, D]
        logit = capped(q.float() @ k.float().mT * self.law.scale, self.law.softcap).flatten(0, 1)
        return (logit - self.lse[:, None]).exp().sum(1)

    def shrink(self, entries: LayerKV) -> None:
        """From here on hold what these entries of all that was read give against what all of it gives."""
        self.small = Layer(entries.rows(), self.get_seq_length(), window=self.window)

    def seen(self) -> tuple[LayerKV, Stats]:
        """All that was read so far, and its last queries."""
        heads, end = self.keys.shape[0], self.get_seq_length()
        new = self.keys[:, : self.held], self.values[:, : self.held]
        old = () if self.prefix is None else (self.prefix.k, self.prefix.v)
        parts = [torch.unflatten(part, 0, (heads, -1)) for part in old]
        k, v = (torch.cat(both, 1) for both in zip(parts, new, strict=True)) if parts else new
        pos = torch.arange(end, dtype=torch.int32, device=k.device)
        last = Stats(q_last=self.q, q_last_pos=pos[-self.q.shape[1] :], sink_logit=self.law.sink_logit)
        return LayerKV(k, v, pos.expand(heads, end)), last


def _off(small: Tensor, own: Tensor, module: nn.Module) -> float:  # [Hq, M, Dv] twice
    weight = output_weight(module)
    if weight is None:
        what = f"where {type(module).__name__} projects its output is not known"
        raise InfeasibleError(what, "errors are measured behind that projection")
    rows = torch.stack([small - own, own]).transpose(1, 2).flatten(2)  # [2, M, Hq * Dv]
    error, size = (rows.to(weight.dtype) @ weight.T).float().norm(dim=-1)
    return float((error / (size + EPSILON)).sum())


@torch.inference_mode()
def speak(model: Model, prefix: Prefix, ids: Sequence[int], n: int) -> Iterator[tuple[int, list[Watched]]]:
    """The greedy answer to a question, at most `n` tokens of one line; each with the layers as its query saw them."""
    spans = windows(model.config)
    layers = [Watched(rows, prefix.tokens, span) for rows, span in zip(prefix.rows, spans, strict=True)]
    cache, ends = PrefixCache(layers=layers), stop_ids(model.net, model.tokenizer, prefix.tail)
    new = list(ids)
    for _ in range(n):
        token = int(next(run(model, cache, new, 1, chunk=len(new))).argmax())
        yield token, layers
        if token in ends or "\n" in model.tokenizer.decode([token]):
            return
        new = [token]
