"""ZipVL, the version that keeps every token: the important ones in more bits than the others."""

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from ..codes import loaded, quantised
from ..errors import FormatError
from ..kernels.codes import Codes, pack, unpack
from ..meta import Layout
from ..options import Bits, Share
from ..probes import needed, probe_mass, remaining
from ..registry import Ask, Scored, Shapes, Source, encode, score
from ..snapshot import LayerKV, Stats, top_mask

SOURCE = Source("arXiv:2410.08584", 2024, question=True, checked="worked examples")


@score(name="zipvl-mixed", needs=("q_last", "q_probe"), source=SOURCE, sizes=lambda **_: True)
def mixed_score(kv: LayerKV, stats: Stats, ask: Ask) -> Scored:
    """Attention by query that can see a token, which says how many bits it is worth; every token stays."""
    mass, by_query = probe_mass(kv, stats, ask)
    return Scored(kv.by_entry(by_query), weight=remaining(mass), count=kv.lens)


@encode(name="zipvl-mixed", source=SOURCE, after="zipvl-mixed", lossy=True)
def mixed(
    kv: LayerKV,
    scored: Scored | None,
    ask: Ask,
    *,
    tau: Share = 0.975,
    share: Share | None = None,
    high: Bits = 4,
    low: Bits = 2,
) -> dict[str, Tensor]:
    """Store what holds the share `tau` of a layer's attention in `high` bits, the rest in `low`; `share` sets how many.

    Keys are quantised a channel at a time over each of the two sets, values an entry at a time, their channels levelled
    by the root of the largest. Sets and entries are those of a head, since heads that were cut share no token.
    A `share` is of the document's tokens, rounded, in every layer alike; with `tau` layers differ.
    """
    rows = kv.rows()
    if scored is not None:  # what a padded slot scores means nothing
        scored = replace(scored, score=scored.score.masked_fill(~kv.real, -torch.inf))
    first = split(scored, rows.lens, tau=tau, share=share)
    better = kv.real if scored is None else top_mask(scored.score, first)
    better = better[kv.real]  # [E]
    factor = torch.stack([head.float().abs().amax(0) for head in torch.split(rows.v, rows.lens.tolist())]).sqrt_()
    factor = torch.where(factor == 0, 1, factor)  # [H, Dv]
    level = rows.v.float() / factor.repeat_interleave(rows.lens.to(factor.device), 0)
    found = {"hi": first.int(), "k.class": pack(better[None].to(torch.uint8), 1)[0], "v.factor": factor}
    for name, bits, here, sizes in _sets(better, first, rows.lens, high, low):
        found |= _stored(f"k.{name}", [_by_channel(k, bits) for k in torch.split(rows.k[here], sizes)])
        found |= _stored(f"v.{name}", [quantised(level[here], bits, 1, level.shape[1])])
    return found


@mixed.split
def split(scored: Scored | None, lens: Tensor, *, tau: float, share: float | None, **_: object) -> Tensor:  # [H] -> [H]
    """How many entries of each head are important, those that must stay among them; all of a layer without a score."""
    if scored is None or scored.weight is None:
        return lens
    count = needed(scored.weight, tau) if share is None else round(share * len(scored.weight))
    must = scored.score.isposinf().sum(1).cpu()
    return torch.full_like(lens, count).maximum(must).minimum(lens)


@mixed.shapes
def shapes(lens: list[int], layout: Layout, first: list[int], *, high: int, low: int, **_: object) -> Shapes:
    """Of each set the codes, of keys a scale and zero for each channel of a head, of values for each entry."""
    H, D, Dv = len(lens), layout.head_dim, layout.v_dim
    found: Shapes = {"hi": ("I32", (H,)), "k.class": ("U8", (-(-sum(lens) // 8),)), "v.factor": ("F32", (H, Dv))}
    for name, bits, n in (("hi", high, sum(first)), ("lo", low, sum(lens) - sum(first))):
        for side, width, params in (("k", D, (H, D)), ("v", Dv, (n, 1))):
            found[f"{side}.{name}.q"] = "U8", (n, -(-width * bits // 8))
            found |= {f"{side}.{name}.{part}": ("F16", params) for part in ("scale", "zero")}
    return found


@mixed.decoder
def decode(
    payload: dict[str, Tensor], lens: Tensor, *, high: int, low: int, **_: object
) -> tuple[Tensor, Tensor]:  # [H] -> [E, D], [E, Dv]
    """All entries in float32."""
    E, factor, first = int(lens.sum()), payload["v.factor"], payload["hi"].long().cpu()
    better = unpack(payload["k.class"][None], 1, E)[0].bool()
    if [int(part.sum()) for part in torch.split(better, lens.tolist())] != first.tolist():
        raise FormatError("the snapshot's classes of entries are wrong", "heads have other numbers of them in hi")
    k, v = (torch.empty(E, payload[name].shape[1], device=factor.device) for name in ("k.hi.scale", "v.factor"))
    for name, bits, here, sizes in _sets(better, first, lens, high, low):
        q, scale, zero = (payload[f"k.{name}.{part}"] for part in ("q", "scale", "zero"))
        heads = zip(torch.split(q, sizes), torch.split(scale, 1), torch.split(zero, 1), strict=True)
        k[here] = torch.cat([Codes(*head, bits, max(len(head[0]), 1), 1, k.shape[1]).rows() for head in heads])
        v[here] = loaded(payload, f"v.{name}", bits, 1, v.shape[1], v.shape[1]).rows()
    return k, v * factor.repeat_interleave(lens.to(factor.device), 0)


def _sets(
    better: Tensor, first: Tensor, lens: Tensor, high: int, low: int
) -> Iterator[tuple[str, int, Tensor, list[int]]]:
    """Name, bits, which entries [E] and how many of each head, of both sets."""
    yield "hi", high, better, first.tolist()
    yield "lo", low, ~better, (lens - first).tolist()


def _by_channel(k: Tensor, bits: int) -> Codes:  # [n, D]
    """A set of one head, which may be empty."""
    if len(k):
        return quantised(k, bits, len(k), 1)
    blank = k.new_zeros(1, k.shape[1], dtype=torch.float16)
    return Codes(pack(k.to(torch.uint8), bits), blank, blank, bits, 1, 1, k.shape[1])


def _stored(name: str, codes: list[Codes]) -> dict[str, Tensor]:
    parts = {"q": [one.q for one in codes], "scale": [one.scale for one in codes]}
    parts["zero"] = [one.zero for one in codes if one.zero is not None]
    return {f"{name}.{part}": torch.cat(tensors) for part, tensors in parts.items()}
