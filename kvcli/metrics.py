"""What compression cost: errors of attention outputs, divergence of next tokens. Tensors in, numbers out."""

import torch
from torch import Tensor
from torch.linalg import vector_norm
from torch.nn.functional import scaled_dot_product_attention

from .snapshot import LayerKV


def output_error(
    q: Tensor, q_pos: Tensor, before: LayerKV, after: LayerKV, scale: float
) -> Tensor:  # [Hq, R, D], [R] -> [Hq, R] float32
    """|o' - o| / |o| of every query and head, each attending causally over both caches."""
    full = attend(q, q_pos, before, scale)
    off: Tensor = vector_norm(attend(q, q_pos, after, scale) - full, dim=-1)
    size: Tensor = vector_norm(full, dim=-1)
    return off / size.clamp(min=1e-20)


def attend(q: Tensor, q_pos: Tensor, kv: LayerKV, scale: float) -> Tensor:  # [Hq, R, D], [R] -> [Hq, R, Dv] float32
    """Attention outputs of queries at positions `q_pos` over one layer, head by head; zero where nothing is visible."""
    group = q.shape[0] // len(kv.pos)
    outputs = []
    for head, pos in enumerate(kv.pos):
        seen = (pos >= 0) & (pos <= q_pos[:, None])  # [R, T]
        mask = torch.zeros(seen.shape, device=q.device).masked_fill(~seen, -torch.inf)
        if kv.bias is not None:
            mask += kv.bias[head]
        mine = q[head * group : (head + 1) * group].float()
        k, v = (part[head].float().expand(group, -1, -1) for part in (kv.k, kv.v))
        out = scaled_dot_product_attention(mine[None], k[None], v[None], attn_mask=mask[None, None], scale=scale)[0]
        outputs.append(out.masked_fill(~seen.any(1)[:, None], 0.0))
    return torch.cat(outputs)


def kl(logits: Tensor, other: Tensor) -> Tensor:  # [M, V], [M, V] -> [M] float32
    """KL(p || p') in nats between the next-token distributions of two rows of logits."""
    p, p_other = logits.float().log_softmax(-1), other.float().log_softmax(-1)
    return (p.exp() * (p - p_other)).sum(-1)


def top1(logits: Tensor, other: Tensor) -> Tensor:  # [M, V], [M, V] -> [M] bool
    """Where both would say the same token next."""
    return logits.argmax(-1) == other.argmax(-1)


def median_p95(error: Tensor) -> tuple[float, float]:
    """Median and 95th percentile of all numbers given."""
    median, tail = torch.quantile(error.flatten().float(), torch.tensor([0.5, 0.95])).tolist()
    return median, tail
