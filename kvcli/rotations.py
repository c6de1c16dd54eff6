"""How a model's rotation turns: whether it is known, and means and covariances of vectors under averaged rotations."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .errors import InfeasibleError
from .registry import Ask

# Positions of a mixture, at most. Spread evenly they rank keys as all 512 do (Spearman .997), spread geometrically not
# (.96).
GRID = 32

Average = Literal["matched", "reference", "mixture"]
Moments = tuple[Tensor, Tensor]  # mean [..., D], covariance [..., D, D]


def need_freq(ask: Ask, who: str, instead: str) -> None:
    """Raise InfeasibleError where the snapshot does not say how fast keys turn; `instead` is what does without."""
    if ask.freq is None:
        raise InfeasibleError(
            f"{who} needs the frequencies of the model's rotation ({ask.rope.get('rope_type', 'none')!s:.40})",
            "this snapshot does not hold them: an older kvcli made it, or they depend on the length or the layer",
            f"prefill again, or use {instead}",
        )


@dataclass(frozen=True)
class Turns:
    """The rotations R of a stretch of positions, each as likely as any other, as `kernels.rope.rotate` turns."""

    begin: int
    count: int
    freq: Tensor  # [R]

    def mean(self, x: Tensor) -> Tensor:  # [..., D] -> [..., D] float64
        """The mean of R x."""
        wave = self._wave(self._speed(x))
        return x * wave.real + self._quarter(x) * wave.imag

    def both(self, x: Tensor) -> Tensor:  # [..., D, D] -> [..., D, D] float64
        """The mean of R x R'.

        R is cos + sin Q, with Q a quarter turn. Products of cos and sin are waves of the sums and of the differences.
        """
        speed, right, left = self._speed(x), self._quarter(x), self._quarter(x.mT).mT
        plus, minus = self._wave(speed[:, None] + speed), self._wave(speed[:, None] - speed)
        turned = x * (minus.real + plus.real) + self._quarter(left) * (minus.real - plus.real)
        return (turned + right * (plus.imag - minus.imag) + left * (plus.imag + minus.imag)) / 2

    def _speed(self, x: Tensor) -> Tensor:  # [..., D] -> [D]
        """How fast each channel turns; those behind the pairs do not."""
        freq = self.freq.to(x.device).double()
        return torch.cat([freq, freq, freq.new_zeros(x.shape[-1] - 2 * len(freq))])

    def _wave(self, speed: Tensor) -> Tensor:  # complex
        """The mean of exp(i speed t) over the positions t: a geometric sum, about their middle."""
        length = torch.sinc(self.count * speed / math.tau) / torch.sinc(speed / math.tau)
        return torch.polar(length, speed * (self.begin + (self.count - 1) / 2))

    def _quarter(self, x: Tensor) -> Tensor:
        half = len(self.freq)
        left, right, rest = x.tensor_split((half, 2 * half), -1)
        return torch.cat([-right, left, torch.zeros_like(rest)], -1)


def matched(mean: Tensor, cov: Tensor, turns: Turns) -> Moments:
    """The mean and covariance of all R x together, by the law of total covariance."""
    moved = turns.mean(mean)
    return moved, turns.both(cov + _outer(mean)) - _outer(moved)


def reference(mean: Tensor, cov: Tensor, turns: Turns) -> Moments:
    """The same under the mean of the R, as in the reference code: what turns fast loses its variance."""
    return turns.mean(mean), turns.mean(turns.mean(cov).mT).mT


def ahead(
    average: Average, mean: Tensor, cov: Tensor, begin: int, count: int, freq: Tensor
) -> Iterator[Moments]:  # [..., D], [..., D, D], [R]
    """Normal distributions whose even mixture is that of R x over `count` positions from `begin` on.

    mixture: one at each of up to `GRID` positions, spread evenly; else a single one for all positions.
    """
    mean, cov = mean.double(), cov.double()
    if average == "mixture":
        n = min(GRID, count)
        spread = (begin + (2 * i + 1) * count // (2 * n) for i in range(n))
        yield from (reference(mean, cov, Turns(at, 1, freq)) for at in spread)
    else:
        yield (matched if average == "matched" else reference)(mean, cov, Turns(begin, count, freq))


def _outer(x: Tensor) -> Tensor:  # [..., D] -> [..., D, D]
    return x[..., :, None] * x[..., None, :]
