"""What prefill observes in a layer while it reads: last and spread queries, attention received, norms of values."""

from itertools import product

import torch
from torch import Tensor, nn

from ..kernels.mass import attention_mass
from ..kernels.rope import rotate
from ..snapshot import Rows, Stats, finite
from .attend import Law
from .cache import Layer
from .moments import Moments

WINDOW = 64  # last queries saved
PROBES = 64  # queries saved evenly over the document


class ObservedLayer(Layer):
    """A cache layer with room for `tokens` more behind its prefix that also collects the layer's statistics.

    before: the statistics of the prefix, which are continued; sums over all tokens only where none was dropped.
    A layer whose window is shorter than the document keeps its last window and no statistics: it is never compressed.
    """

    def __init__(
        self,
        tokens: int,
        window: int | None = None,
        prefix: Rows | None = None,
        start: int = 0,
        before: Stats | None = None,
    ) -> None:
        self.end = start + tokens
        self.slides = window is not None and window <= self.end
        super().__init__(prefix, start, 1 if self.slides else tokens, window)
        self.before = before or Stats()
        spread = torch.linspace(0, self.end - 1, min(PROBES, self.end)).round().long()
        self.wanted = {"last": torch.arange(max(0, self.end - WINDOW), self.end), "probe": spread}
        self.queries: dict[str, list[Tensor]] = {name: [] for name in self.wanted}
        self.law = Law(0.0)
        self.finite = True
        self.collect: set[str] = set()  # statistics beyond those of every document
        self.skip = 0  # first position whose query counts in the moments
        self.freq: Tensor | None = None  # [R], how queries turn, where their moments are wanted
        self.norms: dict[str, list[Tensor]] = {}  # a chunk each, [M]

    def attend(self, q: Tensor, law: Law, module: nn.Module) -> Tensor:
        out, lse = self.attend_lse(q, law)
        self.law, self.q_heads = law, q.shape[0]
        here = slice(self.held - q.shape[1], self.held)
        self.finite &= finite(self.keys[:, here]) and finite(self.values[:, here])
        if not self.slides:
            self._observe(q, lse, module)
        return out

    def _observe(self, q: Tensor, lse: Tensor, module: nn.Module) -> None:
        past = self.get_seq_length() - q.shape[1]
        if past == self.start:
            self.mass, self.norm = self._sums("attn_mass"), self._sums("value_norm")
            self.mass_sq = self._sums("mass_sq") if "mass_sq" in self.collect else None
            self.moments = self._earlier(q) if self.freq is not None else None
        if self.mass is not None:
            self._add_mass(self.mass, q, lse)
        if self.mass_sq is not None:
            self._add_mass(self.mass_sq, q, lse, power=2)
        if self.moments is not None:
            self.moments += self._turned_back(q, past)
        weight = output_weight(module)
        if self.norm is not None and weight is not None:
            values = self.values[:, past - self.start : self.length]
            self.norm[:, past : past + q.shape[1]] = value_norm(values, weight, q.shape[0])
        elif weight is None:
            self.norm = None
        self.finite &= all(part is None or finite(part) for part in (self.mass, self.norm, self.mass_sq))
        for name, wanted in self.wanted.items():
            here = wanted[(wanted >= past) & (wanted < past + q.shape[1])] - past
            self.queries[name].append(q[:, here.to(q.device)])

    def _sums(self, name: str) -> Tensor | None:  # -> [H, end] float32
        """What the prefix's tokens have, with room for the others; None where it cannot be continued."""
        found = torch.zeros(self.keys.shape[0], self.end, device=self.keys.device)
        if self.prefix is not None:
            old: Tensor | None = getattr(self.before, name)
            if old is None or not self.whole or old.shape[1] != self.start:
                return None
            found[:, : self.start] = old
        return found

    @property
    def whole(self) -> bool:
        """Whether no entry of the prefix was dropped or merged."""
        return self.prefix is None or (self.prefix.bias is None and {*self.lens} == {self.start})

    def _earlier(self, q: Tensor) -> Moments | None:
        """The moments of the prefix's queries; None where they are not known."""
        n, mean, cov = self.start - self.skip, self.before.q_mean, self.before.q_cov
        if n <= 0 or self.prefix is None:
            return Moments.of(q[:, :0])
        return Moments.again(n, mean, cov) if mean is not None and cov is not None and self.whole else None

    def _turned_back(self, q: Tensor, past: int) -> Moments:
        """The moments of the newest queries without their rotation, from position `skip` on."""
        pos = torch.arange(past, past + q.shape[1], device=q.device)[max(0, self.skip - past) :]
        if self.freq is None:
            raise ValueError("the frequencies are not known")
        return Moments.of(rotate(q[:, q.shape[1] - len(pos) :], pos, self.freq, back=True))

    def hear(self, name: str, hidden: Tensor) -> None:  # [M, d]
        """Note the 2-norms of hidden states that are about to be attended to, the newest tokens'."""
        norm = torch.linalg.vector_norm(hidden.float(), dim=-1)
        self.finite &= finite(norm)
        self.norms.setdefault(name, []).append(norm)

    def _heard(self, name: str) -> Tensor | None:  # [end] float32
        parts, old = self.norms.get(name, []), getattr(self.before, name)
        if self.prefix is not None:
            parts = [old, *parts] if old is not None and self.whole else []
        found = torch.cat(parts) if parts else None
        return found if found is not None and len(found) == self.end else None

    def _add_mass(self, mass: Tensor, q: Tensor, lse: Tensor, power: int = 1) -> None:
        """Add what each entry receives from the newest queries: weights, or with `power` 2 their squares.

        A weight to a power is exp(power * (logit - lse)), and a soft-cap that grows with its logits caps them alike.
        """
        softcap = None if self.law.softcap is None else power * self.law.softcap
        old = self.held - q.shape[1]
        parts = [(self.keys[:, old : self.held], self.start + old, True), (self.keys[:, :old], self.start, False)]
        if self.prefix is not None:
            parts.append((torch.unflatten(self.prefix.k, 0, (len(mass), -1)), 0, False))
        for k, at, causal in parts:
            if k.shape[1]:
                here = attention_mass(q, k, power * lse, power * self.law.scale, causal, softcap)
                mass[:, at : at + k.shape[1]] += here

    def stats(self) -> Stats:
        """What was observed, where the model is; complete when all tokens have been read."""
        if self.slides:
            return Stats()
        (q_last, q_last_pos), (q_probe, q_probe_pos) = self._saved("last"), self._saved("probe")
        sinks, moments = self.law.sink_logit, self.moments if self.moments and self.moments.n else None
        return Stats(
            q_last=q_last,
            q_last_pos=q_last_pos,
            q_probe=q_probe,
            q_probe_pos=q_probe_pos,
            attn_mass=self.mass,
            value_norm=self.norm,
            sink_logit=None if sinks is None else sinks.float(),
            mass_sq=self.mass_sq,
            q_mean=None if moments is None else moments.mean.float(),
            q_cov=None if moments is None else moments.cov.float(),
            resid_norm=self._heard("resid_norm"),
            attn_in_norm=self._heard("attn_in_norm"),
        )

    def _saved(self, name: str) -> tuple[Tensor | None, Tensor | None]:  # [Hq, W, D], [W] int32
        """The wanted queries; of those before the prefix ends, the nearest that were saved then."""
        q = torch.cat(self.queries[name], 1)
        wanted = self.wanted[name].to(q.device)
        pos = wanted[wanted >= self.start].int()
        old, old_pos = getattr(self.before, f"q_{name}"), getattr(self.before, f"q_{name}_pos")
        if old is None or old_pos is None:
            # Queries of the new tokens alone would not be spread over the document.
            return (None, None) if name == "probe" and self.start else (q, pos)
        old_pos = old_pos[old_pos < self.start]  # not those of a question
        before = wanted[wanted < self.start]
        if len(old_pos) and len(before):
            near = (old_pos[:, None] - before).abs().argmin(0).unique()
            q, pos = torch.cat([old[:, near], q.to(old.dtype)], 1), torch.cat([old_pos[near], pos])
        return q, pos

    def rows(self) -> Rows:
        """What later tokens will see of the new ones, where the model is; a whole document is not copied."""
        heads, count = self.keys.shape[0], self.held
        if self.slides and self.window:
            count = max(1, min(self.held, self.window - 1))
        pos = torch.arange(self.end - count, self.end, dtype=torch.int32, device=self.keys.device).repeat(heads)
        k, v = (part[:, self.held - count : self.held].flatten(0, 1) for part in (self.keys, self.values))
        return Rows(k, v, pos, torch.full((heads,), count))


def output_weight(module: nn.Module) -> Tensor | None:  # -> [d_model, Hq * Dv]
    for name in ("o_proj", "out_proj", "dense", "wo"):
        weight = getattr(getattr(module, name, None), "weight", None)
        if isinstance(weight, Tensor) and weight.is_floating_point():
            return weight
    return None


def value_norm(v: Tensor, weight: Tensor, q_heads: int) -> Tensor:  # [H, M, Dv], [d, Hq * Dv] -> [H, M] float32
    """1-norm of each value behind the output projection, mean over the queries' heads of its group."""
    heads = weight.view(-1, len(v), q_heads // len(v), v.shape[-1])  # [d, H, G, Dv]
    norms: Tensor = torch.zeros(v.shape[:2], device=v.device)
    for h, g in product(range(len(v)), range(heads.shape[2])):
        # vector_norm, which does the same, takes four times as long in 16 bit
        norms[h] += (v[h] @ heads[:, h, g].T).abs_().sum(-1, dtype=torch.float32)
    return norms / heads.shape[2]
