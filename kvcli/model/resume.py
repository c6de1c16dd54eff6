"""Resume: answer questions from a snapshot, and compare two snapshots on the same continuation."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import GenerationConfig, TextStreamer

from ..errors import MismatchError, UsageError
from ..layers import DTYPES
from ..meta import Meta
from ..metrics import kl, top1
from ..snapshot import Rows, Snapshot
from .cache import make_cache, named, place
from .load import DEFAULT, Model, Tick, find_by_weights, load
from .text import context_length, stop_ids, too_long


@dataclass(frozen=True)
class Prefix:
    """A snapshot in the model's memory: flat rows of every layer, shared by all questions and never copied."""

    rows: Sequence[Rows]
    tokens: int  # where the next token goes
    tail: str

    @classmethod
    def read(cls, snapshot: Snapshot, model: Model) -> "Prefix":
        """Read every layer once, straight into the memory it is used from."""
        rows = [place(snapshot.rows[i], model.device, model.net.dtype) for i in range(len(snapshot.rows))]
        return cls(rows, snapshot.meta.seq.next_pos, snapshot.meta.seq.tail)


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn; a temperature of 0 is greedy."""

    n: int = 128  # most tokens to generate
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def config(self, stops: list[int]) -> GenerationConfig:
        """The same as transformers wants it."""
        drawn = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        return GenerationConfig(
            max_new_tokens=self.n,
            do_sample=self.temperature > 0,
            eos_token_id=stops,
            pad_token_id=stops[0] if stops else None,
            **(drawn if self.temperature > 0 else {}),
        )


@dataclass(frozen=True)
class Answer:
    """What the model said and how long it took."""

    text: str
    ids: list[int]
    computed: int  # tokens of the question that were run
    first_seconds: float  # until the first token
    seconds: float

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the first token left out; 0 for a single token."""
        spent = self.seconds - self.first_seconds
        return (len(self.ids) - 1) / spent if len(self.ids) > 1 and spent > 0 else 0.0


class _Stream(TextStreamer):  # type: ignore[misc]
    """Hands out text as it is made and remembers when the first token came."""

    def __init__(self, tokenizer: object, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text, self.first = on_text, 0.0

    def put(self, value: Tensor) -> None:
        if not self.next_tokens_are_prompt and not self.first:
            self.first = time.perf_counter()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.on_text(text)


def model_for(
    meta: Meta, name: str | None, *, device: str = "auto", dtype: str | None = None, tick: Tick = lambda text: None
) -> Model:
    """The model `name`, else the one the snapshot names: a folder seen before with these weights, or its id.

    Computes in the snapshot's own precision unless told otherwise.
    """
    if name is None:
        name = _named(meta)
    own = str(DTYPES[meta.layout.dtype]).removeprefix("torch.")
    return load(name, device=device, dtype=dtype or own, tick=tick)


def _named(meta: Meta) -> str:
    name = str(meta.model["id"])
    folder = None if name == DEFAULT else find_by_weights(str(meta.model["weights"]))
    if folder is None and name != DEFAULT and "/" not in name:
        raise MismatchError(f"the snapshot was made with a local model, {name}", fix="say where it is with --model")
    return str(folder or name)


@torch.inference_mode()
def answer(
    model: Model,
    prefix: Prefix,
    ids: Sequence[int],
    sampling: Sampling,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Run the question's ids behind the prefix and generate until the end of the turn; the prefix is left as it was.

    Raises UsageError if nothing is asked, InfeasibleError if the model's context has no room for the answer.
    """
    if not ids:
        raise UsageError("nothing is asked", "the prompt is empty and the chat template adds nothing behind it")
    room = context_length(model.config) - prefix.tokens - len(ids)
    if room < sampling.n:
        what = f"no room for {sampling.n} more tokens: {prefix.tokens:,} are read, {len(ids)} asked"
        raise too_long(model.config, what, "ask for fewer with -n, or ask less")
    begin = time.perf_counter()
    stops = stop_ids(model.net, model.tokenizer, prefix.tail)
    stream = _Stream(model.tokenizer, on_text)
    torch.manual_seed(sampling.seed)
    out = model.net.generate(
        input_ids=torch.tensor([ids], device=model.net.device),
        attention_mask=torch.ones(1, prefix.tokens + len(ids), dtype=torch.long, device=model.net.device),
        **named(model.net, make_cache(model.net, prefix.rows, prefix.tokens)),
        generation_config=sampling.config(stops),
        streamer=stream,
    )
    made = out[0, len(ids) :].tolist()
    text = model.tokenizer.decode(made, skip_special_tokens=True)
    return Answer(text, made, len(ids), stream.first - begin, time.perf_counter() - begin)


@torch.inference_mode()
def logits(model: Model, prefix: Prefix, ids: Sequence[int], keep: int) -> Tensor:  # -> [keep, V]
    """Logits of the last `keep` of these ids, run behind the prefix."""
    cache = named(model.net, make_cache(model.net, prefix.rows, prefix.tokens))
    tokens = torch.tensor([ids], device=model.net.device)
    out: Tensor = model.net(input_ids=tokens, use_cache=True, logits_to_keep=keep, **cache).logits[0]
    return out


def compare(
    model: Model, prefix: Prefix, full: Prefix, ids: Sequence[int], n: int
) -> tuple[Tensor, Tensor]:  # -> [M] KL, [M] bool
    """KL and top-1 agreement of `prefix` with `full` over the full cache's own greedy continuation of `ids`."""
    said = answer(model, full, ids, Sampling(n=n)).ids
    both = [*ids, *said[:-1]]
    reference, other = logits(model, full, both, len(said)), logits(model, prefix, both, len(said))
    return kl(reference, other), top1(reference, other)
