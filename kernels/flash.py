"""Attention with its log-sum-exp in Triton: the one kernel behind all attention ops, and the one that joins splits.

The rows of a KV head are its G * M pairs of a query head and a token. A program takes BR of them over one of S equal
parts of the entries that some of them see; with S > 1 parts are joined by their LSE, in order. How many splits there
are follows from shapes alone, and nothing here waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .launch import Kernel, helper, target_of, tl, triton

Part = tuple[Tensor, Tensor]  # outputs and their LSE
PROGRAMS = 264  # what fills a card twice over
SPLIT = 256  # entries a split has at least
JOINED = 16  # splits read at once when they are joined


@helper
def _load(x, row, m_row, column, m_column, UPCAST: tl.constexpr):  # type: ignore[no-untyped-def]
    """The block of x at the distances row [R] and column [C] from its start; 0 outside the masks."""
    b = tl.load(x + row[:, None] + column[None, :], mask=m_row[:, None] & m_column[None, :], other=0.0)
    if UPCAST:
        b = b.to(tl.float32)
    return b


@helper
def _count(pos, T, bits, b_at):  # type: ignore[no-untyped-def]
    """How many of T < 2 ** bits rising positions are at most b_at, for each of those; -1 in the end do not count."""
    b_n = (b_at * 0).to(tl.int32)
    for bit in range(bits):
        b_next = b_n + (1 << (bits - 1 - bit))
        b_pos = tl.load(pos + b_next - 1, mask=b_next <= T, other=-1)
        b_n = tl.where((b_pos >= 0) & (b_pos <= b_at), b_next, b_n)
    return b_n


@Kernel
def _flash(  # type: ignore[no-untyped-def]
    q, k, v, bias, offsets, q_pos, pos, out, lse,
    scale, softcap, window, G, M, T, S, bits,
    q_h, q_m, q_d, k_h, k_t, k_d, v_h, v_t, v_d, bias_h, pos_h,
    D: tl.constexpr, DV: tl.constexpr, BR: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    CAUSAL: tl.constexpr, WHOLE: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """out [S, H * G * M, DV], lse [S, H * G * M]: attention of BR rows of head i_h over part i_s of what they see."""
    i_r, i_s, i_h = tl.program_id(0) // S, tl.program_id(0) % S, tl.program_id(1).to(tl.int64)
    o_r, o_d, o_v = i_r * BR + tl.arange(0, BR), tl.arange(0, BD).to(tl.int64), tl.arange(0, BV).to(tl.int64)
    m_r, m_d, m_v = o_r < G * M, o_d < D, o_v < DV
    g, m = i_h * G + o_r // M, o_r % M
    b_q = _load(q, g * q_h + m.to(tl.int64) * q_m, m_r, o_d * q_d, m_d, UPCAST)
    first, b_low, b_high = i_h * 0, tl.zeros([BR], tl.int32), tl.zeros([BR], tl.int32) + T
    if offsets is not None:
        first = tl.load(offsets + i_h)
        b_high = b_low + (tl.load(offsets + i_h + 1) - first).to(tl.int32)
    if CAUSAL:
        b_high = tl.minimum(b_high, m + T - M + 1)
    if pos is not None:
        b_at = tl.load(q_pos + m, mask=m_r, other=0)
        b_high = _count(pos + i_h * pos_h, T, bits, b_at)
        if window is not None:
            b_low = _count(pos + i_h * pos_h, T, bits, b_at - window)
    low, high = tl.min(tl.where(m_r, b_low, T)), tl.max(tl.where(m_r, b_high, 0))
    part = tl.cdiv(tl.cdiv(high - low, BT), S) * BT
    begin = low + i_s * part
    n = tl.minimum(high - begin, part)
    # from here on entries are counted from `begin`, and row r sees b_low <= t < b_low + b_span
    b_low -= begin
    b_span = tl.maximum(tl.minimum(b_high - begin, n) - b_low, 0).to(tl.uint32)
    k, v = k + i_h * k_h + (first + begin) * k_t, v + i_h * v_h + (first + begin) * v_t
    if bias is not None:
        bias += i_h * bias_h + first + begin
    unit = scale if softcap is None else 2 * scale / softcap
    b_max = tl.full([BR], float("-inf"), tl.float32)
    b_sum, b_out = tl.zeros([BR], tl.float32), tl.zeros([BR, BV], tl.float32)
    for t in range(0, n, BT):
        o_t = t + tl.arange(0, BT)
        m_t = o_t < n
        b_k = _load(k, o_d * k_d, m_d, o_t.to(tl.int64) * k_t, m_t, UPCAST)
        b_x = tl.dot(b_q, b_k, input_precision="ieee") * unit  # [BR, BT]
        if softcap is not None:
            b_x = softcap - 2 * softcap / (tl.exp(b_x) + 1)
        if bias is not None:
            # a mask would cost a branch an entry on AMD; what lies past the end is not seen
            b_x += tl.load(bias + tl.minimum(o_t, n - 1))[None, :]
        b_x = tl.where((o_t[None, :] - b_low[:, None]).to(tl.uint32) < b_span[:, None], b_x, float("-inf"))
        b_new = tl.maximum(b_max, tl.max(b_x, 1))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_p, b_fade = tl.exp(b_x - b_base[:, None]), tl.exp(b_max - b_base)
        b_sum = b_sum * b_fade + tl.sum(b_p, 1)
        b_v = _load(v, o_t.to(tl.int64) * v_t, m_t, o_v * v_d, m_v, UPCAST)
        b_w = b_p.to(b_v.dtype)
        b_out = tl.dot(b_w, b_v, b_out * b_fade[:, None], input_precision="ieee")
        if WHOLE:  # what rounding the weights left over
            b_out += tl.dot((b_p - b_w).to(b_v.dtype), b_v, input_precision="ieee")
        b_max = b_new
    row = (i_s.to(tl.int64) * tl.num_programs(1) + i_h) * (G * M) + o_r
    b_out = b_out / tl.where(b_sum > 0, b_sum, 1.0)[:, None]
    tl.store(out + row[:, None] * DV + o_v[None, :], b_out, mask=m_r[:, None] & m_v[None, :])
    tl.store(lse + row, b_max + tl.log(b_sum), mask=m_r)


@Kernel
def _join(  # type: ignore[no-untyped-def]
    part, part_lse, out, lse, N, S, DV: tl.constexpr, BV: tl.constexpr, BS: tl.constexpr
):
    """out [N, DV], lse [N] from part [S, N, DV], part_lse [S, N]: one row of all splits."""
    i_n, o_v = tl.program_id(0).to(tl.int64), tl.arange(0, BV)
    b_max = tl.full([1], float("-inf"), tl.float32)
    b_sum = tl.zeros([1], tl.float32)
    b_out = tl.zeros([BV], tl.float32)
    for s in range(0, S, BS):
        o_s = s + tl.arange(0, BS)
        row, m_s = o_s.to(tl.int64) * N + i_n, o_s < S
        b_lse = tl.load(part_lse + row, mask=m_s, other=float("-inf"))
        b_part = tl.load(part + row[:, None] * DV + o_v[None, :], mask=m_s[:, None] & (o_v < DV)[None, :], other=0.0)
        b_new = tl.maximum(b_max, tl.max(b_lse, 0))
        b_base = tl.where(b_new == float("-inf"), 0.0, b_new)
        b_weight, b_fade = tl.exp(b_lse - b_base), tl.exp(b_max - b_base)
        b_sum = b_sum * b_fade + tl.sum(b_weight, 0)
        b_out = b_out * b_fade + tl.sum(b_weight[:, None] * b_part, 0)
        b_max = b_new
    tl.store(out + i_n * DV + o_v, b_out / tl.where(b_sum > 0, b_sum, 1.0), mask=o_v < DV)
    tl.store(lse + i_n + tl.arange(0, 1), b_max + tl.log(b_sum))


def flash_fused(
    q: Tensor,  # [Hq, M, D]
    k: Tensor,
    v: Tensor,
    scale: float,
    *,
    tail: tuple[Tensor, Tensor] | None = None,  # [H, S, D], [H, S, Dv]: more entries, which every query sees
    dtype: torch.dtype | None = None,  # of the output, by default that of q; float32 keeps 16-bit weights whole
    **options: Any,
) -> Part:  # [Hq, M, Dv], [Hq, M] float32
    """Attention of every query over what it sees of its KV head; 0 and -inf where that is nothing: see `_parts`."""
    parts = [_parts(q, k, v, scale, dtype or q.dtype, **options)]
    if tail is not None and tail[0].shape[1]:
        parts.append(_parts(q, *tail, scale, dtype or q.dtype))
    out, lse = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return join_splits(out, lse, dtype or q.dtype)


def join_splits(out: Tensor, lse: Tensor, dtype: torch.dtype) -> Part:  # [S, Hq, M, Dv], [S, Hq, M] -> the same, one
    """Attention over all splits from that over each."""
    if len(out) == 1:
        return out[0], lse[0]
    joined = out.new_empty(out.shape[1:], dtype=dtype), torch.empty_like(lse[0])
    N, Dv = lse[0].numel(), out.shape[-1]
    options = {"num_warps": 4, "enable_fp_fusion": True}
    _join[N,](out, lse, *joined, N, len(out), DV=Dv, BV=pad(Dv), BS=JOINED, **options)
    return joined


def count_splits(span: int, entries: int, tiles: int) -> int:
    """Into how many to split heads of up to `span` entries, `entries` in all, whose rows take `tiles` programs each."""
    return max(1, int(triton.cdiv(span, max(SPLIT, triton.cdiv(entries * tiles, PROGRAMS)))))


def _parts(
    q: Tensor,
    k: Tensor,  # [H, T, D], or [E, D] head after head
    v: Tensor,  # [H, T, Dv], or [E, Dv]
    scale: float,
    dtype: torch.dtype,
    *,
    bias: Tensor | None = None,  # [H, T] or [E] float32, added to the logits after the soft-cap
    lens: Sequence[int] | None = None,  # [H], of flat rows
    causal: bool = False,  # query m sees the entries j <= m + T - M
    q_pos: Tensor | None = None,  # [M] int
    pos: Tensor | None = None,  # [H, T] int, rising in a head, -1 for padding, which comes last; seen from q_pos
    window: int | None = None,  # of these, pos > q_pos - window
    softcap: float | None = None,
) -> Part:  # [S, Hq, M, Dv], [S, Hq, M] float32
    """Attention over each of S splits; one alone is of the dtype given, several are float32. Any strides."""
    (Hq, M, D), Dv = q.shape, v.shape[-1]
    H, T = (len(k), k.shape[1]) if lens is None else (len(lens), max(lens))
    offsets = None if lens is None else row_offsets(tuple(lens), q.device)
    G, spread = Hq // H, [(0, *part.stride()) if lens else part.stride() for part in (k, v)]
    bias, q_pos, pos = (None if part is None else _rows(part.to(q.device)) for part in (bias, q_pos, pos))
    apart = [0 if part is None or part.dim() < 2 else part.stride(0) for part in (bias, pos)]
    blocks = _blocks(G * M, max(D, Dv), q.element_size(), target_of(q.device))
    tiles, span = triton.cdiv(G * M, blocks["BR"]), T if window is None else min(T, window + M)
    entries = H * span if lens is None else len(k)
    S = count_splits(span, entries, tiles)
    out = q.new_empty(S, Hq, M, Dv, dtype=dtype if S == 1 else torch.float32)
    lse = q.new_empty(S, Hq, M, dtype=torch.float32)
    sizes = (scale, softcap, window, G, M, T, S, T.bit_length())
    strides = (*q.stride(), *spread[0], *spread[1], *apart)
    padded = {"D": D, "DV": Dv, "BD": pad(D), "BV": pad(Dv), "CAUSAL": causal, "WHOLE": dtype != q.dtype}
    _flash[tiles * S, H](q, k, v, bias, offsets, q_pos, pos, out, lse, *sizes, *strides, **padded, **blocks)
    return out, lse


def _rows(part: Tensor) -> Tensor:
    return part if part.stride(-1) == 1 else part.contiguous()


@lru_cache(1024)
def row_offsets(lens: tuple[int, ...], device: torch.device) -> Tensor:  # [H + 1] int64
    """Where the rows of each head begin, and where the last ones end."""
    # kept, so that decoding does not send the lengths of every layer again for every token
    return torch.tensor((0, *lens)).cumsum(0).to(device)


def pad(D: int) -> int:
    """The size of a block that holds D."""
    return max(16, int(triton.next_power_of_2(D)))


def _blocks(rows: int, D: int, itemsize: int, target: str) -> dict[str, Any]:
    # float32 products run in registers, not tensor cores, where larger tiles would spill; these do on no target
    later = target.startswith(("sm_9", "sm_1"))  # Hopper and Blackwell
    if itemsize == 4:
        tile = {"BR": 16, "BT": 16, "num_stages": 1 if D <= 128 else 3 if later else 2}
    elif rows <= 16:
        tile = {"BR": 16, "BT": min(64, 8192 // pad(D))}
    elif D <= 128:
        tile = {"BR": 64, "BT": 4096 // max(64, pad(D))}
    else:
        tile = {"BR": 32, "BT": 32} if later else {"BR": 64, "BT": 16, "num_warps": 8}
    return {"num_stages": 2, "num_warps": 4, "enable_fp_fusion": True, **tile}
