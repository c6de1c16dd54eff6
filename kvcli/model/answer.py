"""An answer: tokens drawn one after the other, and their text handed out as it is made, until the turn is over."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from ..device import blaming_card
from .load import Model
from .prefix import Prefix, check_room, opening, run
from .text import question_ids, stop_ids

COLDEST = 1e-5  # logits divided by less overflow


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn, and when to stop; a temperature of 0 is greedy."""

    n: int = 128  # most tokens to generate
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0
    stops: tuple[str, ...] = ()  # texts that end an answer
    endless: bool = False  # go on behind the end of the turn: n tokens always, as measuring speed needs

    def drawer(self) -> Callable[[Tensor], int]:
        """A function that draws a token from logits [1, V], through the processors `generate` would use.

        Drawn on the CPU, where a seed means the same whatever device the logits come from.
        """
        if self.temperature < COLDEST:
            return lambda logits: int(logits.argmax())
        warp = LogitsProcessorList([TemperatureLogitsWarper(float(self.temperature))])
        if self.top_k:
            warp.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warp.append(TopPLogitsWarper(self.top_p))
        rng, none = torch.Generator().manual_seed(self.seed), torch.zeros(1, 0, dtype=torch.long)
        return lambda logits: int(torch.multinomial(warp(none, logits.cpu().float()).softmax(-1), 1, generator=rng))


@dataclass(frozen=True)
class Answer:
    """What the model said and how long it took."""

    text: str  # up to a stop text
    ids: list[int]  # all that were generated, with the token that ended the turn
    computed: int  # tokens of the question that were run
    first_seconds: float  # until the first token
    seconds: float
    finish: str  # "end": of the model's turn; "stop": a stop text appeared; "length": as many as were asked for

    @property
    def tokens_per_second(self) -> float:
        """Of decoding, the first token left out; 0 for a single token."""
        spent = self.seconds - self.first_seconds
        return (len(self.ids) - 1) / spent if len(self.ids) > 1 and spent > 0 else 0.0


class Speech:
    """Text of tokens as they come: whole characters, and nothing that may be the start of a stop text."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], on_text: Callable[[str], None]) -> None:
        self.tokenizer, self.stops, self.on_text = tokenizer, stops, on_text
        self.text = ""  # handed out
        self.held = ""
        self.ids: list[int] = []
        self.told = self.read = 0  # ids[told:read] are decoded again with what follows, as context

    def add(self, token: int) -> bool:
        """Take a token; whether a stop text is complete."""
        self.ids.append(token)
        before, now = self._decode(self.told, self.read), self._decode(self.told, None)
        if now.endswith("\ufffd") or len(now) <= len(before):  # in the middle of a character
            return False
        self.told, self.read = self.read, len(self.ids)
        shown, self.held, stopped = cut(self.held + now[len(before) :], self.stops)
        self._hand_out(shown)
        return stopped

    def end(self) -> str:
        """Hand out what was held back, half a character included, and return the whole text."""
        rest = self._decode(self.told, None)[len(self._decode(self.told, self.read)) :]
        shown, held, _ = cut(self.held + rest, self.stops)
        self._hand_out(shown + held)
        return self.text

    def _decode(self, start: int, end: int | None) -> str:
        text: str = self.tokenizer.decode(self.ids[start:end], skip_special_tokens=True)
        return text

    def _hand_out(self, text: str) -> None:
        if text:
            self.text += text
            self.on_text(text)


def cut(text: str, stops: Sequence[str]) -> tuple[str, str, bool]:
    """What can be shown of `text`, what may be the start of a stop text, and whether one is complete.

    Of several the one that ends first counts, whatever pieces the text came in.
    """
    found = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    if found:
        return text[: min(found)[1]], "", True
    starts = (n for stop in stops for n in range(1, len(stop)) if text.endswith(stop[:n]))
    shown = len(text) - max(starts, default=0)
    return text[:shown], text[shown:], False


@torch.inference_mode()
@blaming_card()
def answer(
    model: Model,
    prefix: Prefix,
    ids: Sequence[int],
    sampling: Sampling,
    on_text: Callable[[str], None] = lambda text: None,
) -> Answer:
    """Run the question's ids behind the prefix and generate until the end of the turn; the prefix is left as it was.

    Without ids the document itself goes on. Raises InfeasibleError if the model's context has no room for the answer.
    """
    check_room(model, prefix.tokens, len(ids), sampling.n)
    begin, first, cache = time.perf_counter(), 0.0, prefix.cache(model)
    ends = [] if sampling.endless else stop_ids(model.net, model.tokenizer, prefix.tail)
    draw = sampling.drawer()
    speech, finish = Speech(model.tokenizer, sampling.stops, on_text), "length"
    made: list[int] = []
    logits = next(run(model, cache, ids, 1, chunk=1024)) if ids else opening(model, prefix)
    for _ in range(sampling.n):
        if made:
            logits = next(run(model, cache, made[-1:], 1))
        made.append(draw(logits))
        first = first or time.perf_counter()
        if made[-1] in ends:
            finish = "end"
            break
        if speech.add(made[-1]):
            finish = "stop"
            break
    return Answer(speech.end(), made, len(ids), first - begin, time.perf_counter() - begin, finish)


def kept(tokenizer: Any, said: Answer) -> list[int]:
    """Ids of the answer as far as its text goes: without the token or the stop text that ended it."""
    for n in range(len(said.ids) - (said.finish == "end"), 0, -1):
        text = tokenizer.decode(said.ids[:n], skip_special_tokens=True)
        if said.text.startswith(text):
            return said.ids[:n] + question_ids(tokenizer, said.text[len(text) :], "", "")
    return question_ids(tokenizer, said.text, "", "")
