"""The model repeats a document it has read: how much each entry is attended to then (KVzip, arXiv:2505.23416)."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from ..errors import InfeasibleError, KvError
from ..kernels.banded import banded_attention
from ..kernels.dense import dense_attention, join
from ..kernels.mass import attention_mass
from ..kernels.peak import attention_peak
from ..snapshot import Rows, Snapshot, finite
from .attend import Law
from .cache import Layer, place, windows
from .collect import SINKS, hearing
from .load import Model
from .observed import output_weight
from .read import read
from .text import context_length, parsed_ids, plain_ids, too_long

ASK = "\n\nRepeat the previous context exactly."
GO_ON = "\n\nRepeat the part of the previous context exactly, starting with"
LAST = 8  # tokens of the part before, which follow
SIZE, LEAST = 2048, 64  # tokens repeated at a time, and how few where the model's context ends
QUERIES = 192  # saved evenly over the document
MOST = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class Part:
    """Tokens `begin` to `end` of the document, repeated behind it: the ids that are read, the last of them its own."""

    begin: int
    end: int
    ids: list[int]

    def holds(self, at: int) -> bool:
        """Whether it repeats the token at this position."""
        return self.begin <= at < self.end

    def tell(self, done: int, _: int, N: int, tick: Callable[[int, int], None]) -> None:
        """Say how far the document of N tokens is repeated when so many of the ids are read."""
        tick(self.begin + max(0, done - self.asked), N)

    @property
    def asked(self) -> int:
        """How many of the ids ask for the repetition."""
        return len(self.ids) - (self.end - self.begin)


class Repeating(Layer):
    """A cache layer behind a whole document that notes what each of its N entries receives.

    The softmax of a query is over the sinks, the part that is repeated, and the repetition so far: of a document in
    one part exactly the model's own. A window that slides while the model repeats is no bound to it: with room for
    all of a repetition, nothing of it is let go.
    """

    def __init__(self, prefix: Rows, N: int, room: int, window: int | None, wanted: Tensor) -> None:  # [R]
        super().__init__(prefix, N, room, window)
        heads = len(prefix.lens)
        self.k, self.v = (torch.unflatten(part, 0, (heads, -1)) for part in (prefix.k, prefix.v))
        self.wanted = wanted  # positions whose queries are saved
        self.queries: list[Tensor] = []  # [Hq, some, D]
        self.peaks: list[Tensor] = []  # [1 or 2, Hq, some]: logs of the most attention, and of that by hidden state
        self.squares: list[Tensor] = []  # [H, some]
        self.count = 0  # queries so far
        self.size: Tensor | None = None  # [M] 2-norms of what the newest queries are made of

    def repeat(self, part: Part, sinks: int) -> None:
        """What is read next repeats this part; the earliest `sinks` entries are seen as well."""
        self.part, self.sinks = part, sinks
        self.peaks.append(torch.tensor(-torch.inf))
        self.squares.append(torch.zeros(len(self.k), part.end - part.begin, device=self.k.device))

    def hear(self, name: str, hidden: Tensor) -> None:  # [M, d]
        """Note the 2-norms of the hidden states that attend next."""
        self.size = torch.linalg.vector_norm(hidden.float(), dim=-1)

    def attend(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:
        out, lse = self._apart(q, law) if self.plain(law) else (self.attend_lse(q, law)[0], self._over_some(q, law))
        self.weight, self.q_heads = output_weight(module), q.shape[0]
        keys = self.k[:, self.part.begin : self.part.end]
        logs = [lse]
        if self.size is not None:  # beside a hidden state that is 0 all would be infinite: its query does not count
            logs.append(lse + self.size.log().masked_fill(self.size == 0, torch.inf))
        peak = attention_peak(q, keys, torch.stack(logs), law.scale, law.softcap)
        self.peaks[-1] = peak.maximum(self.peaks[-1].to(peak.device))
        softcap = None if law.softcap is None else 2 * law.softcap
        self.squares[-1] += attention_mass(q, keys, 2 * lse, 2 * law.scale, False, softcap)
        past, self.count = self.length - q.shape[1], self.count + q.shape[1]
        at = self.wanted - self.part.begin + self.part.asked - past  # where in q the wanted queries are
        mine = (self.wanted >= self.part.begin) & (self.wanted < self.part.end) & (at >= 0) & (at < q.shape[1])
        self.queries.append(q[:, at[mine].to(q.device)])
        return out

    def _apart(self, q: Tensor, law: Law) -> tuple[Tensor, Tensor]:  # -> [Hq, M, Dv], [Hq, M] float32
        """Attention over everything, and the log-sum-exp over the sinks, the part and the repetition alone."""
        near, far = self._some, ((self.sinks, self.part.begin), (self.part.end, self.start))
        some = self.attend_lse(q, law, dense_attention(q, *near, None, law.scale))
        others = [(self.k[:, a:b], self.v[:, a:b]) for a, b in far if a < b]
        return join([some, *(dense_attention(q, *part, None, law.scale) for part in others)])[0], some[1]

    @property
    def _some(self) -> list[Tensor]:  # [H, sinks + part, D], [H, sinks + part, Dv]
        here = slice(self.part.begin, self.part.end)
        return [torch.cat([x[:, : self.sinks], x[:, here]], 1) if self.sinks else x[:, here] for x in (self.k, self.v)]

    def _over_some(self, q: Tensor, law: Law) -> Tensor:  # -> [Hq, M] float32
        """The log-sum-exp over the sinks, the part, and the repetition up to each query."""
        keys, new = torch.cat([self._some[0], self.keys[:, : self.held]], 1), torch.arange(self.length) + self.start
        pos = torch.cat([torch.arange(self.sinks), torch.arange(self.part.begin, self.part.end), new])
        lse: Tensor = banded_attention(q, new[-q.shape[1] :], keys, keys, pos, law.scale, None, None, law.softcap)[1]
        return lse if law.sink_logit is None else lse.logaddexp(law.sink_logit.float()[:, None])

    def stats(self, lead: int, pos: Tensor) -> dict[str, Tensor]:
        """What was noted, where the model is; the `lead` tokens of the template, not repeated, have 0."""

        def whole(part: Tensor) -> Tensor:  # [H, N - lead] -> [H, N]
            return nn.functional.pad(part.clamp(max=MOST), (lead, 0)).half()

        peak = torch.unflatten(torch.cat(self.peaks, -1).exp(), 1, (len(self.k), -1))  # [P, H, G, N - lead]
        rms = (torch.cat(self.squares, -1) / self.count).sqrt()
        found = {"kvzip": whole(peak[0].amax(1)), "kvzip_rms": whole(rms)}
        if len(peak) > 1 and self.weight is not None:
            sizes = value_sizes(self.v[:, lead:], self.weight, self.q_heads).view_as(peak[1])
            found["kvzip_plus"] = whole((peak[1] * sizes).amax(1))
        return {**found, "q_repeat": torch.cat(self.queries, 1), "q_repeat_pos": pos.to(self.k.device)}


@torch.inference_mode()
def replay(
    model: Model,
    snapshot: Snapshot,
    *,
    size: int = SIZE,
    queries: int = QUERIES,
    chunk: int = 1024,
    tick: Callable[[int, int], None] = lambda done, total: None,
) -> Snapshot:
    """The full snapshot with what repeating it shows, `size` tokens at a time; its entries are only read.

    Memory is the cache of one part. Raises InfeasibleError where the model's context has no room for a part.
    """
    if not snapshot.meta.held:  # every layer slides: nothing would be noted
        return snapshot
    N, lead = snapshot.meta.seq.tokens, snapshot.meta.seq.lead
    parts = _parts(model, snapshot, size)
    room = max(len(part.ids) for part in parts)
    wanted = torch.linspace(lead, N - 1, min(queries, N - lead)).round().long()
    pos = torch.tensor([N + part.asked + at - part.begin for part in parts for at in wanted.tolist() if part.holds(at)])
    spans, held = windows(model.config), snapshot.meta.held
    layers: list[Layer] = []
    for i, rows in enumerate(snapshot.rows):
        there = place(rows, model.device, model.net.dtype)
        layers.append(Repeating(there, N, room, spans[i], wanted) if i in held else Layer(there, N, window=spans[i]))
    with hearing(model, layers, held, ["attn_in_norm"], snapshot.ids[-1:]):
        for part in parts:
            for layer in layers:
                layer.reset()
                if isinstance(layer, Repeating):
                    layer.repeat(part, min(max(lead, SINKS), part.begin))
            told = partial(part.tell, N=N, tick=tick)
            read(model, layers, torch.tensor(part.ids), chunk, told)
    noted = {i: layer.stats(lead, pos.int()) for i, layer in enumerate(layers) if isinstance(layer, Repeating)}
    if not all(finite(part) for each in noted.values() for part in each.values()):
        raise KvError("the attention while the document is repeated is NaN or infinite", fix="try --dtype float32")
    stats = [replace(old, **noted.get(i, {})) for i, old in enumerate(snapshot.stats)]
    return replace(snapshot, stats=stats)


def room_to_repeat(model: Model, tokens: int, lead: int, tail: str) -> int:
    """How many of a document's tokens can be repeated at a time behind them all.

    Raises InfeasibleError where the model's context has no room for a part, which names what it has room for.
    """
    if tokens <= lead:
        raise InfeasibleError("there is nothing to repeat", "all of the tokens are the chat template's")
    encode, limit = model.tokenizer, context_length(model.config)
    asks = max(len(plain_ids(encode, ASK)), len(plain_ids(encode, GO_ON)) + LAST) + len(parsed_ids(encode, tail))
    room = limit - tokens - asks
    if room < min(LEAST, tokens - lead):
        most = max(limit - asks - LEAST, (limit - asks + lead) // 2, 0)
        what = f"no room to repeat {tokens:,} tokens behind themselves, which at most {most:,} have"
        raise too_long(
            model.config, what, "shorten the document, or do without --collect kvzip and the methods that need it"
        )
    return room


def _parts(model: Model, snapshot: Snapshot, size: int) -> list[Part]:
    """The document in parts of `size` tokens, or fewer where the model's context ends."""
    seq, ids, encode = snapshot.meta.seq, snapshot.ids.tolist(), model.tokenizer
    step, closing = min(size, room_to_repeat(model, seq.tokens, seq.lead, seq.tail)), parsed_ids(encode, seq.tail)
    found = []
    for begin in range(seq.lead, seq.tokens, step):
        end = min(begin + step, seq.tokens)
        before = ids[max(seq.lead, begin - LAST) : begin]
        ask = [*plain_ids(encode, GO_ON), *before] if before else plain_ids(encode, ASK)
        found.append(Part(begin, end, [*ask, *closing, *ids[begin:end]]))
    return found


def value_sizes(v: Tensor, weight: Tensor, q_heads: int) -> Tensor:  # [H, M, Dv], [d, Hq * Dv] -> [Hq, M] float32
    """2-norm of each value behind the output projection of each query head of its group.

    Of W = QR, R does that as well, Q keeping lengths, and gives vectors of the size of a value instead of a token's.
    """
    heads = weight.float().view(-1, q_heads, v.shape[-1]).transpose(0, 1)  # [Hq, d, Dv]
    group, upper = q_heads // len(v), torch.linalg.qr(heads, mode="r").R
    return torch.stack([torch.linalg.vector_norm(v[h // group].float() @ r.mT, dim=-1) for h, r in enumerate(upper)])
