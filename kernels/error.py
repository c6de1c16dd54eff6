"""Output error, how far attention over one cache is from attention over another: queries and two caches -> [Hq, R].

|o' - o| / |o| of every query and head, in float32. A query sees the entries of its KV head at 0 <= pos <= its own
position; `softcap` bounds the logits before the bias, `sink_logit` is one more logit in the softmax, without a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.linalg import vector_norm

from .banded import banded_attention_ref, banded_attention_sliced
from .dense import dense_attention_cpu, join
from .flash import flash_fused
from .launch import Kernel, tl, triton
from .op import Fn, Op, random, strained

Entries = tuple[Tensor, Tensor, Tensor, Tensor | None]  # k [H, T, D], v [H, T, Dv], pos [H, T], bias [H, T]


def output_error_ref(
    q: Tensor,  # [Hq, R, D]
    q_pos: Tensor,  # [R]
    before: Entries,  # positions rise in a head; padding comes last and has -1
    after: Entries,  # the same heads, of any lengths
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,  # [Hq] float32
) -> Tensor:  # [Hq, R] float32
    """The definition."""
    full, other = (attend(q, q_pos, entries, scale, softcap, sink_logit) for entries in (before, after))
    return relative_error(other, full, -1)


def output_error_cpu(
    q: Tensor,
    q_pos: Tensor,
    before: Entries,
    after: Entries,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:  # [Hq, R] float32
    """In float32 as well, where flash calls come within a third of what the CPU can multiply; 16 bits are too few."""
    full, other = (attend(q, q_pos, entries, scale, softcap, sink_logit, _quick) for entries in (before, after))
    return relative_error(other, full, -1)


def relative_error(found: Tensor, wanted: Tensor, dim: int | tuple[int, ...]) -> Tensor:  # float32
    """|found - wanted| / |wanted|, the norms taken over `dim`."""
    found, wanted = found.float(), wanted.float()
    error: Tensor = vector_norm(found - wanted, dim=dim) / vector_norm(wanted, dim=dim).clamp(min=1e-20)
    return error


def attend(
    q: Tensor,
    q_pos: Tensor,
    entries: Entries,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
    one: Fn = banded_attention_ref,
) -> Tensor:  # [Hq, R, Dv] float32
    """Attention over padded heads, each by `one`; zero where nothing is visible."""
    k, v, pos, bias = entries
    outs, lses = [], []
    for h, (rows, n) in enumerate(zip(q.float().chunk(len(k)), (pos >= 0).sum(1).tolist(), strict=True)):
        keys, values = (part[h : h + 1, :n].float() for part in (k, v))
        added = None if bias is None else bias[h : h + 1, :n]
        out, lse = one(rows, q_pos, keys, values, pos[h, :n], scale, added, None, softcap)
        outs.append(out)
        lses.append(lse)
    out, lse = torch.cat(outs), torch.cat(lses)
    return out if sink_logit is None else out * (lse - sink_logit[:, None]).sigmoid()[..., None]


def _quick(q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, pos: Tensor, *law: Any) -> tuple[Tensor, Tensor]:
    # most entries are seen by all queries and need no mask, which would be as large as the logits
    scale, bias, window, softcap = law
    n = int((pos <= q_pos.min()).sum()) if softcap is None else 0
    biases = (None, None) if bias is None else (bias[:, :n], bias[:, n:])
    parts = [banded_attention_sliced(q, q_pos, k[:, n:], v[:, n:], pos[n:], scale, biases[1], window, softcap)]
    if n:
        parts.append(dense_attention_cpu(q, k[:, :n], v[:, :n], biases[0], scale))
    return join(parts)


@Kernel
def _relative(  # type: ignore[no-untyped-def]
    full, full_lse, other, other_lse, sink_logit, error, R, DV: tl.constexpr, BV: tl.constexpr
):
    """error [N] of other [N, DV] from full [N, DV], N = Hq * R: one row, which the sink first takes its share of."""
    i_n, o_v = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    row, m_v = i_n * DV + o_v, o_v < DV
    b_full, b_other = tl.load(full + row, mask=m_v, other=0.0), tl.load(other + row, mask=m_v, other=0.0)
    if sink_logit is not None:
        b_sink = tl.load(sink_logit + i_n // R)
        b_full *= tl.sigmoid(tl.load(full_lse + i_n) - b_sink)
        b_other *= tl.sigmoid(tl.load(other_lse + i_n) - b_sink)
    b_away = b_other - b_full
    norm = tl.maximum(tl.sqrt(tl.sum(b_full * b_full, 0)), 1e-20)
    tl.store(error + i_n, tl.sqrt(tl.sum(b_away * b_away, 0)) / norm)


def output_error_fused(
    q: Tensor,
    q_pos: Tensor,
    before: Entries,
    after: Entries,
    scale: float,
    softcap: float | None = None,
    sink_logit: Tensor | None = None,
) -> Tensor:  # [Hq, R] float32
    """Triton's attention twice, with float32 outputs and weights, and a kernel for the error."""
    parts: list[Tensor] = []
    for k, v, pos, bias in (before, after):
        wide = (q, k, v) if q.dtype == k.dtype == v.dtype else (q.float(), k.float(), v.float())
        found = flash_fused(*wide, scale, bias=bias, q_pos=q_pos, pos=pos, softcap=softcap, dtype=torch.float32)
        parts += found
    error, Dv = torch.empty(q.shape[:2], device=q.device), parts[0].shape[-1]
    sink = None if sink_logit is None else sink_logit.float().contiguous()
    options = {"num_warps": 4, "enable_fp_fusion": True}
    _relative[error.numel(),](*parts, sink, error, q.shape[1], DV=Dv, BV=triton.next_power_of_2(Dv), **options)
    return error


def _inputs(case: Mapping[str, Any], dtype: torch.dtype, seed: int) -> tuple[Any, ...]:
    H, G, R, T, D = (case[name] for name in "HGRTD")
    generator = torch.Generator().manual_seed(seed)
    q = random((R, H * G, D), dtype, generator).transpose(0, 1)  # strides as the model gives them
    k, v = (random((H, T, size), dtype, generator) for size in (D, case.get("Dv", D)))
    pos = torch.arange(T, dtype=torch.int32).expand(H, -1)
    bias = random((H, T), torch.float32, generator) if case["bias"] else None
    q, bias = strained(case, q, bias)
    lens = [T - int(case.get("pad", 0.0) * T * h / H) for h in range(H)]
    before = _thinned((k, v, pos, bias), lens, generator)
    after = _thinned(before, [_kept(n) for n in lens], generator)
    sink_logit = random((H * G,), torch.float32, generator) if case.get("sink") else None
    q_pos = torch.arange(R) + max(T - R // 2, 0)
    return q, q_pos, before, after, D**-0.5, case.get("softcap"), sink_logit


def _kept(n: int) -> int:
    return max(1, round(0.3 * n))


def _thinned(entries: Entries, lens: list[int], generator: torch.Generator) -> Entries:
    """So many entries of each head, drawn at random, padded to the longest head."""
    k, v, pos, bias = entries
    order = torch.rand(pos.shape, generator=generator).masked_fill(pos < 0, 2.0).argsort(1)[:, : max(lens)]
    gone = torch.arange(max(lens)) >= torch.tensor(lens)[:, None]
    index = order.masked_fill(gone, pos.shape[1]).sort(1).values.clamp(max=pos.shape[1] - 1)
    k, v = (part.gather(1, index[..., None].expand(-1, -1, part.shape[2])) for part in (k, v))
    return k, v, pos.gather(1, index).masked_fill(gone, -1), None if bias is None else bias.gather(1, index)


def _cost(case: Mapping[str, Any], itemsize: int) -> tuple[int, int]:
    H, G, R, T, D = (case[name] for name in "HGRTD")
    Dv, entries = case.get("Dv", D), H * (T + _kept(T))  # of both caches, padding included
    per_entry = (D + Dv) * itemsize + 4 + (4 if case["bias"] else 0)
    moved = entries * per_entry + H * G * (R * (D * itemsize + 4) + (4 if case.get("sink") else 0)) + 8 * R
    return moved, 2 * entries * G * R * (D + Dv)


output_error = Op(
    name="output_error",
    ref=output_error_ref,
    cpu=output_error_cpu,
    fused=output_error_fused if triton else None,
    inputs=_inputs,
    usual={"H": 8, "G": 4, "R": 64, "T": 32768, "D": 128, "bias": True},
    variants=({}, {"bias": False, "R": 2}, {"softcap": 30.0, "sink": True}),
    cost=_cost,
    cases=(
        {"H": 1, "G": 1, "R": 1, "T": 1, "D": 16, "bias": False},
        {"H": 2, "G": 3, "R": 2, "T": 63, "D": 80, "bias": True, "pad": 0.5},
        {"H": 3, "G": 2, "R": 65, "T": 129, "D": 20, "bias": True, "pad": 0.2},
        {"H": 2, "G": 2, "R": 9, "T": 2003, "D": 64, "bias": True},
        {"H": 2, "G": 2, "R": 3, "T": 65, "D": 24, "Dv": 16, "bias": False, "sink": True},
        {"H": 2, "G": 2, "R": 17, "T": 65, "D": 16, "bias": True, "softcap": 2.0, "sink": True, "pad": 0.5},
        {"H": 2, "G": 2, "R": 2, "T": 63, "D": 64, "bias": True, "far": True, "loud": True},
    ),
)
