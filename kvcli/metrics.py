"""What compression cost: errors of attention outputs, divergence of next tokens. Tensors in, numbers out."""

import torch
from torch import Tensor

from .kernels import error as kernels
from .snapshot import LayerKV


def output_error(
    q: Tensor,  # [Hq, R, D]
    q_pos: Tensor,  # [R]
    before: LayerKV,
    after: LayerKV,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,  # [Hq]
) -> Tensor:  # [Hq, R] float32
    """|o' - o| / |o| of every query and head, each attending causally over both caches."""
    error: Tensor = kernels.output_error(q, q_pos, before.entries, after.entries, scale, softcap, sink_logit)
    return error


def kl(logits: Tensor, other: Tensor) -> Tensor:  # [M, V], [M, V] -> [M] float32
    """KL(p || p') in nats between the next-token distributions of two rows of logits."""
    p, p_other = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - p_other)).sum(-1)


def top1(logits: Tensor, other: Tensor) -> Tensor:  # [M, V], [M, V] -> [M] bool
    """Where both would say the same token next."""
    return logits.argmax(-1) == other.argmax(-1)


def nll(logits: Tensor, ids: Tensor) -> Tensor:  # [M, V], [M] -> [M] float32
    """Negative log-likelihood in nats of the tokens that came next."""
    return -logits.float().log_softmax(-1).gather(1, ids[:, None])[:, 0]


def median_p95(error: Tensor) -> tuple[float, float]:
    """Median and 95th percentile of all numbers given."""
    median, tail = torch.quantile(error.flatten().float().cpu(), torch.tensor([0.5, 0.95])).tolist()
    return median, tail
