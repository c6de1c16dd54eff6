"""A few entries made to act like all of a head for some queries: their log-mass and values. Tensors, a head at a time.

Least squares are ridges, drawn to what the entries are anyway; float64, so that squares of small weights count.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

RHOS = (1e-3, 1e-2, 1e-1, 1.0)
STEPS = 8  # of descent within the limits of the mass


@dataclass(frozen=True)
class Sight:
    """What n queries see of the t entries that stay, and what they saw in all."""

    log: Tensor  # [n, t] float64, log of the share that each entry has of full attention
    sink: Tensor  # [n] float64, log of the share that no entry receives
    out: Tensor  # [n, Dv] float64, output of full attention

    @classmethod
    def of(cls, logit: Tensor, v: Tensor, kept: Tensor, sink: Tensor) -> "Sight":  # [n, T], [T, Dv], [t], [n]
        """From the logits of all entries, -inf for what is not seen, and one that no entry receives."""
        lse = torch.logaddexp(logit.logsumexp(1), sink)
        out = (logit - lse[:, None]).exp_() @ v.to(logit.dtype)
        log = logit[:, kept].double().sub_(lse[:, None].double())
        return cls(log, (sink - lse).double(), out.double())

    def at(self, rows: Tensor) -> "Sight":  # [n] bool
        """What some of the queries see."""
        if bool(rows.all()):
            return self
        return Sight(**{field.name: getattr(self, field.name)[rows] for field in fields(self)})

    def weights(self, beta: Tensor) -> Tensor:  # [t] -> [n, t]
        """Attention to what stays, with this log-mass added."""
        return self._beside(beta, self.sink).softmax(1)[:, :-1]

    def off(self, beta: Tensor) -> float:  # [t]
        """Mean distance of the log of the mass from that of full attention."""
        return float(self._beside(beta, self.sink).logsumexp(1).abs().mean().nan_to_num(math.inf))

    def error(self, beta: Tensor, v: Tensor) -> float:  # [t], [t, Dv]
        """Mean distance from the output of full attention, both beside new tokens of as much mass as all entries had.

        Without them the sum of the mass that stays would not show.
        """
        rival = torch.logaddexp(self.sink, torch.zeros_like(self.sink))
        off = self._beside(beta, rival).softmax(1)[:, :-1] @ v.double() - self.out / 2
        return float(off.norm(dim=1).mean().nan_to_num(math.inf))

    def _beside(self, beta: Tensor, other: Tensor) -> Tensor:  # [t], [n] -> [n, t + 1]
        beside = torch.cat([self.log, other[:, None]], 1)
        beside[:, :-1] += beta
        return beside


def match(
    sight: Sight, held: Tensor, v: Tensor, rhos: Sequence[float] = RHOS, clip: float = 3.0
) -> tuple[Tensor, Tensor]:  # [n] bool, [t, Dv] -> [t] float64, [t, Dv]
    """Log-mass to add to each entry, and new values in the dtype of `v`; 0 and `v` itself where nothing is gained.

    First the mass, then the values are fitted with each of `rhos`, how strongly they are drawn to what they were, to
    queries not in `held`. What is nearest to the truth for those in `held` is fitted again to all; if that brings their
    output no nearer than plain eviction, nothing is gained. Queries that see nothing of what stays are left out.
    """
    seen, none = sight.log.amax(1) > -torch.inf, v.new_zeros(len(v), dtype=torch.float64)
    fit, test, sight = sight.at(seen & ~held), sight.at(seen & held), sight.at(seen)
    if not len(fit.out) or not len(test.out):
        return none, v
    betas = [none, *masses(fit, rhos, clip)]
    m = _least([test.off(beta) for beta in betas])
    u = _least([test.error(betas[m], new) for new in (v, *values(fit, betas[m], v, rhos))])
    del fit  # of the queries and entries of a head there are few copies at a time
    beta = next(masses(sight, rhos[m - 1 : m], clip)) if m else none
    new = next(values(sight, beta, v, rhos[u - 1 : u])) if u else v
    return (beta, new) if test.error(beta, new) < test.error(none, v) else (none, v)


def _least(errors: list[float]) -> int:
    return errors.index(min(errors))


def masses(sight: Sight, rhos: Sequence[float], clip: float) -> Iterator[Tensor]:  # -> [t] each
    """Log-mass within +-clip with which the sum of what stays comes closest to that of all entries, relative to it."""
    share = sight.log.exp()
    missing = 1 - sight.sink.exp() - share.sum(1)
    for rho, more in zip(rhos, ridges(share, missing[:, None], rhos), strict=True):
        yield _within(share, missing, penalty(share, rho), more[:, 0], clip).log1p()


def values(sight: Sight, beta: Tensor, v: Tensor, rhos: Sequence[float]) -> Iterator[Tensor]:  # [t], [t, Dv] -> [t, Dv]
    """Values with which the output comes closest to that of full attention."""
    weight, old = sight.weights(beta), v.double()
    for more in ridges(weight, sight.out - weight @ old, rhos):
        yield (old + more).to(v.dtype)


def penalty(x: Tensor, rho: float) -> float:  # [n, t]
    """What a ridge adds to the diagonal: `rho` of its mean, and never too little for Cholesky."""
    return max(rho / x.shape[1], 1e-13) * max(float(x.square().sum()), 1e-200)


def ridges(x: Tensor, y: Tensor, rhos: Sequence[float]) -> Iterator[Tensor]:  # [n, t], [n, D] -> [t, D] each
    """argmin |x d - y|^2 + penalty |d|^2, by the smaller Gram matrix."""
    dual = len(x) < x.shape[1]
    gram, right = (x @ x.mT, y) if dual else (x.mT @ x, x.mT @ y)
    for rho in rhos:
        square = gram.clone()
        square.diagonal().add_(penalty(x, rho))
        found = torch.cholesky_solve(right, torch.linalg.cholesky(square))
        yield x.mT @ found if dual else found


def _within(x: Tensor, y: Tensor, penalty: float, more: Tensor, clip: float) -> Tensor:  # [n, t], [n], [t] -> [t]
    """A solution of the ridge brought within e^-clip <= 1 + more <= e^clip, by a few steps of projected descent."""
    low, high = math.expm1(-clip), math.expm1(clip)
    inside = more.clamp(low, high)
    if torch.equal(inside, more):
        return more
    step = 1 / (_top(x) + penalty)
    for _ in range(STEPS):
        slope = x.mT @ (x @ inside - y) + penalty * inside
        inside = (inside - step * slope).clamp(low, high)
    return inside


def _top(x: Tensor) -> float:  # [n, t]
    """No less than the largest eigenvalue of x x', which is of no negative numbers (Collatz and Wielandt)."""
    row = x.new_ones(len(x))
    for _ in range(3):
        old, row = row, (x @ (x.mT @ row)).clamp(min=1e-200)
    return float((row / old).max())
