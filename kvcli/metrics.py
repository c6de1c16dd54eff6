"""What compression cost: errors of attention outputs, divergence of next tokens. Tensors in, numbers out."""

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .kernels.banded import banded_attention
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
    full, other = (attend(q, q_pos, kv, scale, softcap, sink_logit) for kv in (before, after))
    return relative_error(other, full, -1)


def relative_error(found: Tensor, wanted: Tensor, dim: int | tuple[int, ...]) -> Tensor:  # float32
    """|found - wanted| / |wanted|, the norms taken over `dim`."""
    found, wanted = found.float(), wanted.float()
    error: Tensor = vector_norm(found - wanted, dim=dim) / vector_norm(wanted, dim=dim).clamp(min=1e-20)
    return error


def attend(
    q: Tensor,  # [Hq, R, D]
    q_pos: Tensor,  # [R]
    kv: LayerKV,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,  # [Hq]
) -> Tensor:  # [Hq, R, Dv] float32
    """Attention outputs of queries at positions `q_pos` over one layer, head by head; zero where nothing is visible."""
    outputs = []
    for head, (rows, count) in enumerate(zip(q.float().chunk(len(kv.pos)), kv.lens.tolist(), strict=True)):
        k, v = (part[head : head + 1, :count].float() for part in (kv.k, kv.v))
        bias = None if kv.bias is None else kv.bias[head : head + 1, :count]
        pos = kv.pos[head, :count]
        out, lse = banded_attention(rows, q_pos, k, v, pos, scale, bias, None, softcap)
        if sink_logit is not None:
            out = out * (lse - sink_logit.chunk(len(kv.pos))[head][:, None]).sigmoid()[..., None]
        outputs.append(out)
    return torch.cat(outputs)


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
