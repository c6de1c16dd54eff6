"""Attention over heads of one length, every query seeing every entry of its KV head, with the log-sum-exp.

q [Hq, M, D] in groups of G heads, one for each KV head; k [H, T, D], v [H, T, Dv], bias [H, T]; any strides.
"""

from collections.abc import Iterable, Iterator, Mapping
from math import gcd
from typing import Any

import torch
from torch import Tensor

from .flash import Part, flash_fused
from .launch import triton
from .op import Op, random, strained

BLOCK = 64  # queries at once in the reference
FEW = 32  # queries that a flash call takes as one block
SHORT = 512  # entries that are not worth another piece
MOST = 8  # pieces that are worth their joining

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default


def flash(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:  # [1, Hq, M, D], [1, Hq, M]
    """torch's flash attention on the CPU, with its LSE. By itself it takes any last stride for 1, silently wrong."""
    out, lse = _flash(*(part if part.stride(-1) == 1 else part.contiguous() for part in (q, k, v)), **options)
    return out, lse


def dense_attention_ref(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv] in the dtype of q, [Hq, M] float32
    """The definition, a block of queries at a time."""
    groups = q.reshape(len(k), -1, *q.shape[1:]).float()  # [H, G, M, D]
    blocks = []
    for start in range(0, q.shape[1], BLOCK):
        rows = groups[:, :, start : start + BLOCK]
        logit = rows @ k[:, None].float().mT * scale
        logit = logit if bias is None else logit + bias[:, None, None]
        lse = logit.logsumexp(-1)
        blocks.append(((logit - lse[..., None]).exp() @ v[:, None].float(), lse))
    out, lse = (torch.cat(part, 2).flatten(0, 1) for part in zip(*blocks, strict=True))
    return out.to(q.dtype), lse


def dense_attention_cpu(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv], [Hq, M] float32
    """Flash calls; the G * M queries of a KV head are its rows, which for few queries is 7 times as fast."""
    if k.shape[-1] != v.shape[-1] or not q.numel() or not k.numel():
        return dense_attention_ref(q, k, v, bias, scale)
    rows = q.reshape(len(k), 1, -1, q.shape[-1])
    out, lse = join(unbound(pieces(rows, k, v, bias, scale, count_pieces(len(k), rows.shape[2], k.shape[1]))))
    return out.reshape(q.shape), lse.reshape(q.shape[:2])


def dense_attention_fused(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:  # [Hq, M, Dv], [Hq, M] float32
    """The same in Triton."""
    return flash_fused(q, k, v, scale, bias=bias)


def pieces(
    rows: Tensor,  # [H, 1, R, D]
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    scale: float,
    P: int,
) -> Part:  # [H, P, R, Dv], [H, P, R] float32
    """Attention over each of P pieces of the entries."""
    over = k.shape[1] % P
    if P > 1:
        k, v = _overlapping(k, P), _overlapping(v, P)
        bias = _once(k, bias if bias is None else _overlapping(bias[..., None], P)[..., 0], over)
    else:
        k, v, bias = k[:, None], v[:, None], bias if bias is None else bias[:, None]
    return flash(rows.expand(-1, P, -1, -1), k, v, attn_mask=bias if bias is None else bias[:, :, None], scale=scale)


def count_pieces(H: int, R: int, T: int) -> int:
    """Into how many pieces to cut heads of T entries, H in a flash call, so that R rows a head keep all threads busy.

    The call shares out heads and blocks of rows alone: one head with few queries would keep one thread busy.
    """
    threads = torch.get_num_threads()
    return max(1, min(threads // gcd(H, threads), T // SHORT, MOST)) if R <= FEW else 1


def _overlapping(part: Tensor, P: int) -> Tensor:  # [H, T, D] -> [H, P, T // P + T % P, D]
    """Pieces of one length: each but the last reaches T % P entries into the next."""
    (H, T, D), (h, t, d) = part.shape, part.stride()
    return part.as_strided((H, P, T // P + T % P, D), (h, T // P * t, t, d), part.storage_offset())


def _once(k: Tensor, bias: Tensor | None, over: int) -> Tensor | None:  # [H, P, C, D], [H, P, C] -> [H or 1, P, C]
    """The bias with which no entry counts twice where pieces overlap by `over` entries."""
    if not over:
        return bias
    bias = k.new_zeros(1, *k.shape[1:3], dtype=torch.float32) if bias is None else bias.clone()
    bias[:, :-1, -over:] = -torch.inf
    return bias


def join(parts: Iterable[Part]) -> Part:  # [(out [.., Dv], lse [..])] -> the same
    """Attention over several sets of entries from the attention over each; a part with lse -inf counts for nothing."""
    (first, lse), *rest = parts
    out = first.float() if rest else first
    for other, its_lse in rest:
        share = torch.sigmoid(its_lse - lse).nan_to_num_()  # nan: neither part saw anything
        out = torch.lerp(out, other.float(), share.unsqueeze_(-1))
        lse = torch.logaddexp(lse, its_lse)
    return out.to(first.dtype), lse


def unbound(part: Part) -> Iterator[Part]:  # [H, P, R, D], [H, P, R] -> P x ([H, R, D], [H, R])
    """The pieces apart, for `join`."""
    return zip(part[0].unbind(1), part[1].unbind(1), strict=True)


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, M, T, D = (case[name] for name in ("H", "G", "M", "T", "D"))
    generator = torch.Generator().manual_seed(seed)
    q = random((M, H * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    k, v = (random((H, 2 * T, size), dtype, generator)[:, :T] for size in (D, case.get("Dv", D)))  # a growing buffer
    bias = random((H, T), torch.float32, generator) if case["bias"] else None
    q, bias = strained(case, q, bias)
    return q, k, v, bias, D**-0.5


def attention_cost(
    case: Mapping[str, Any], itemsize: int, entries: int, pairs: int
) -> tuple[int, int]:  # entries of all heads, and how many pairs of a query and an entry meet
    """Bytes and flops of attention: queries, outputs and LSE; keys, values and biases."""
    D, Dv = case["D"], case.get("Dv", case["D"])
    queries = case["G"] * case["M"] * (case.get("H") or len(case["lens"]))
    moved = queries * ((D + Dv) * itemsize + 4) + entries * ((D + Dv) * itemsize + (4 if case.get("bias") else 0))
    return moved, 2 * pairs * (D + Dv)


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    entries = case["H"] * case["T"]
    return attention_cost(case, itemsize, entries, entries * case["G"] * case["M"])


dense_attention = Op(
    name="dense_attention",
    ref=dense_attention_ref,
    cpu=dense_attention_cpu,
    fused=dense_attention_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "M": 1024, "T": 32768, "D": 128, "bias": False},
    variants=({}, {"bias": True}, {"M": 1}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "M": 1, "T": 1, "D": 16, "bias": False},
        {"H": 3, "G": 3, "M": 1, "T": 129, "D": 64, "bias": True},
        {"H": 2, "G": 2, "M": 65, "T": 517, "D": 64, "bias": False},
        {"H": 2, "G": 2, "M": 9, "T": 2003, "D": 16, "bias": True},
        {"H": 2, "G": 4, "M": 5, "T": 63, "D": 80, "bias": True},
        {"H": 2, "G": 2, "M": 3, "T": 65, "D": 24, "Dv": 16, "bias": True, "far": True},
        {"H": 2, "G": 1, "M": 2, "T": 65, "D": 64, "bias": False, "loud": True},
    ),
)
