"""Mean and covariance of vectors that come in parts; knows neither models nor layers."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Moments:
    """Those of n vectors a head, in float64; parts are joined about their own means, so that nothing cancels."""

    n: int
    mean: Tensor  # [Hq, D]
    spread: Tensor  # [Hq, D, D] products of the deviations from the mean, summed

    @classmethod
    def of(cls, x: Tensor) -> "Moments":  # [Hq, M, D]
        """Those of vectors that are all there; of none they are 0."""
        x = x.double()
        mean = x.sum(1) / max(x.shape[1], 1)
        off = x - mean[:, None]
        return cls(x.shape[1], mean, off.mT @ off)

    @classmethod
    def again(cls, n: int, mean: Tensor, cov: Tensor) -> "Moments":  # [Hq, D], [Hq, D, D]
        """Those of n vectors whose mean and covariance were saved."""
        return cls(n, mean.double(), cov.double() * n)

    def __add__(self, other: "Moments") -> "Moments":
        """Those of both parts (Chan, Golub and LeVeque 1979)."""
        n = self.n + other.n
        if not (self.n and other.n):
            return self if self.n else other
        apart = other.mean - self.mean
        between = apart[:, :, None] * apart[:, None] * (self.n * other.n / n)
        return Moments(n, self.mean + apart * (other.n / n), self.spread + other.spread + between)

    @property
    def cov(self) -> Tensor:  # [Hq, D, D]
        """The covariance, symmetric to the last bit."""
        cov = self.spread / max(self.n, 1)
        return torch.lerp(cov, cov.mT, 0.5)
