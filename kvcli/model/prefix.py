"""A snapshot in the model's memory, and what the model expects behind it: logits, never more than a chunk at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import Cache

from ..codes import Coded
from ..device import ahead, blaming_card
from ..errors import FormatError, InfeasibleError, KvError
from ..snapshot import Rows, Snapshot
from .cache import make_cache, named, place
from .load import Model
from .text import need_room

CHUNK = 128  # rows of logits at once: float32 of a vocabulary of 150,000 is 77 MB
HEAD = ("logit_scale", "logits_scaling", "final_logit_softcapping")  # what configs call the factors of their logits


@dataclass(frozen=True)
class Prefix:
    """A snapshot in the model's memory: what every layer holds, shared by all questions and never copied."""

    rows: Sequence[Rows | Coded]
    tokens: int  # where the next token goes
    tail: str  # text between a question and its answer
    chat: bool = True
    hidden: Tensor | None = None  # [d_model] final hidden state of the last token

    @classmethod
    @blaming_card()
    def read(cls, snapshot: Snapshot, model: Model) -> "Prefix":
        """Read every layer once, straight into the memory it is used from."""
        with ahead(snapshot, model.device, resuming=True) as layers:
            rows = [place(part, model.device, model.net.dtype) for _, part, _ in layers]
        seq = snapshot.meta.seq
        return cls(rows, seq.next_pos, seq.tail, seq.chat, snapshot.extra.get("stat.final_hidden"))

    def cache(self, model: Model) -> Cache:
        """A fresh cache behind which tokens can be run."""
        return make_cache(model.net, self.rows, self.tokens)


def check_room(model: Model, tokens: int, asked: int, n: int = 0) -> None:
    """Raise InfeasibleError if the context ends before `asked` tokens are run and `n` generated behind `tokens`."""
    more = f"{asked:,} tokens and an answer of {n:,}" if n else f"{asked:,} tokens"
    fix = "ask for fewer with -n, or ask less" if n else "shorten the text"
    need_room(model.config, tokens + asked + n, f"no room for {more} behind the {tokens:,} that are read", fix)


@torch.inference_mode()
def run(model: Model, cache: Cache, ids: Sequence[int], keep: int, chunk: int = CHUNK) -> Iterator[Tensor]:
    """Run `ids` a chunk at a time; yields the logits of the last `keep` of them, [m, V] a chunk.

    Raises KvError for logits that are not finite: any token drawn from them would be garbage.
    """
    model.check_ids(ids)
    for start in range(0, len(ids), chunk):
        part = torch.tensor([ids[start : start + chunk]], device=model.net.device)
        here = min(part.shape[1], start + part.shape[1] - (len(ids) - keep))
        # Indices, since of a slice of the hidden states torch would make a product that copies the whole head first.
        rows = torch.arange(part.shape[1] - max(here, 1), part.shape[1], device=part.device)
        out = model.net(input_ids=part, use_cache=True, logits_to_keep=rows, **named(model.net, cache))
        if here > 0:
            yield finite_logits(model, out.logits[0, -here:])


@torch.inference_mode()
def predict(model: Model, prefix: Prefix, ids: Sequence[int], keep: int) -> Iterator[Tensor]:
    """Logits of the last `keep` of these ids, run behind the prefix, [m, V] a chunk.

    `keep` may be one more than there are ids: then the first row comes from the prefix's final hidden state.
    """
    if keep > len(ids):
        yield opening(model, prefix)
    yield from run(model, prefix.cache(model), ids, min(keep, len(ids)))


def logits(model: Model, prefix: Prefix, ids: Sequence[int], keep: int) -> Tensor:  # -> [keep, V]
    """The same in one piece."""
    return torch.cat([*predict(model, prefix, ids, keep)])


@torch.inference_mode()
def opening(model: Model, prefix: Prefix) -> Tensor:  # -> [1, V]
    """Logits of the token right behind the prefix, from the final hidden state that was saved.

    The model itself shows on another token that its head is used as it does. Raises InfeasibleError if not, or if no
    hidden state was saved.
    """
    if prefix.hidden is None:
        raise InfeasibleError("there is nothing to go on from", "the snapshot has no final_hidden", "ask something")
    net, token = model.net, torch.zeros(1, 1, dtype=torch.long, device=model.net.device)
    body, head = ({"input_ids": token, **named(part, prefix.cache(model))} for part in (net.base_model, net))
    hidden = net.base_model(use_cache=True, **body).last_hidden_state[0]
    own = finite_logits(model, net(use_cache=True, **head).logits[0]).float()
    if not torch.allclose(_head(model, hidden).float(), own, rtol=1e-2, atol=1e-2 * float(own.abs().max())):
        what = f"models of type {model.net.config.model_type} cannot go on without a question"
        raise InfeasibleError(what, "how they make logits of a hidden state is not known", "ask something")
    if prefix.hidden.shape != hidden.shape[1:]:
        raise FormatError(f"the snapshot's tensor stat.final_hidden is {tuple(prefix.hidden.shape)}")
    return finite_logits(model, _head(model, prefix.hidden[None].to(net.device, net.dtype)))


def _head(model: Model, hidden: Tensor) -> Tensor:  # [M, d_model] -> [M, V]
    """Logits of hidden states behind the final norm: scaled as Cohere and Granite do, capped as Gemma does."""
    scale, divisor, cap = (getattr(model.config, name, None) for name in HEAD)
    out: Tensor = model.net.get_output_embeddings()(hidden) * (scale or 1.0) / (divisor or 1.0)
    return (out / cap).tanh() * cap if cap else out


def finite_logits(model: Model, found: Tensor) -> Tensor:  # [M, V] -> [M, V]
    """The same; raises KvError where a row is not finite."""
    if not bool(found.amax(-1).isfinite().all()):
        raise KvError("the model's logits are NaN or infinite", f"computed in {model.net.dtype}", "try --dtype float32")
    return found
