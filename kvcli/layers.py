"""Which tensors a file holds, their names, dtypes and order; knows tensors and headers, no bytes."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache

import torch
from torch import Tensor
from xxhash import xxh3_128_hexdigest

from .errors import FormatError, UsageError
from .header import DTYPE_BYTES, Spec, layer_name
from .meta import Layout, Meta
from .recipe import Recipe, Step
from .registry import Shapes
from .snapshot import Rows, Stats, check_finite

_ODD = {"BOOL": torch.bool, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2}
_WORDS = {"F": "float", "I": "int", "U": "uint"}
DTYPES = {name: _ODD.get(name) or getattr(torch, _WORDS[name[0]] + name[1:]) for name in DTYPE_BYTES}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.bfloat16, torch.float16, torch.float32)
PER_TOKEN = ("attn_mass", "value_norm", "mass_sq", "kvzip", "kvzip_rms", "kvzip_plus")  # statistics of each head
PARTS = {"pos": "I32", "bias": "F32", "span": "I32"}  # what a file may hold of an entry beside k and v


def spec_of(name: str, tensor: Tensor) -> Spec:
    """How a file announces this tensor."""
    return Spec(name, NAMES[tensor.dtype], tuple(tensor.shape))


def with_digest(specs: Sequence[Spec]) -> tuple[Spec, ...]:
    """All tensors of a file: those given and, last, the digests of each of them and of the header."""
    return (*specs, Spec("digest", "U8", (len(specs) + 1, 16)))


def requires_of(specs: Iterable[Spec], encode: str) -> tuple[str, ...]:
    """The features a reader of such a file must know."""
    found = {match[1] for spec in specs if (match := re.fullmatch(r"L[0-9]+\.(len|bias|span)", spec.name))}
    features = {"ragged" if part == "len" else part for part in found}
    return tuple(sorted(features | ({f"encode:{encode.split(':')[0]}/1"} - {"encode:raw/1"})))


def layer_specs(
    index: int,
    lens: list[int],
    meta: Meta,
    parts: frozenset[str],
    stats: Stats,
    first: list[int] | None = None,  # [H], where the encoder splits heads
) -> list[Spec]:
    """The tensors of a layer with `lens` entries in its heads, in file order; `parts` of PARTS are stored."""
    entries = (len(lens), lens[0]) if len(set(lens)) == 1 else (sum(lens),)
    split = [] if first is None else [first]
    found = dict(encoder(meta.encode).part("shapes", lens, meta.layout, *split))
    if len(entries) == 1:
        found["len"] = ("I32", (len(lens),))
    found |= {part: (dtype, entries) for part, dtype in PARTS.items() if part in parts}
    found |= {f"stat.{name}": (NAMES[part.dtype], part.shape) for name, part in stats.present().items()}
    return [Spec(f"{layer_name(index)}.{name}", dtype, tuple(shape)) for name, (dtype, shape) in found.items()]


def stored_shapes(step: Step, index: int, lens: Tensor, layout: Layout, hi: Tensor | None) -> Shapes:  # [H], [H]
    """What a layer of this encoding holds; `hi` says how many entries of each head come first, if it splits them.

    Raises FormatError where it does not.
    """
    if "split" not in step.stage.parts:
        return dict(step.part("shapes", lens.tolist(), layout))
    fits = hi is not None and hi.dtype == torch.int32 and hi.shape == lens.shape
    if hi is None or not fits or not bool(((hi >= 0) & (hi <= lens)).all()):
        what = f"the snapshot's tensor {layer_name(index)}.hi is wrong"
        raise FormatError(what, f"it must say how many of the entries {lens.tolist()} come first")
    return dict(step.part("shapes", lens.tolist(), layout, hi.tolist()))


def layer_tensors(
    index: int, payload: Mapping[str, Tensor], rows: Rows, parts: frozenset[str], stats: Stats
) -> Iterator[tuple[str, Tensor]]:
    """The tensors that `layer_specs` announces, by name and in the same order; no bias is 0, no span is 1."""
    found = dict(payload)
    if not rows.uniform:
        found["len"] = rows.lens.int()
    blank = {"pos": rows.pos, "bias": torch.zeros(len(rows.pos)), "span": torch.ones_like(rows.pos)}
    for part in PARTS:
        given: Tensor | None = getattr(rows, part)
        if part in parts:
            given = blank[part] if given is None else given
            found[part] = given.reshape(len(rows.lens), -1) if rows.uniform else given
        elif given is not None and part != "pos":
            raise ValueError(f"layer {index} has a {part} that would be lost")
    found |= {f"stat.{name}": part for name, part in stats.present().items()}
    return ((f"{layer_name(index)}.{name}", tensor) for name, tensor in found.items())


def ids_hash(ids: Tensor) -> str:  # [N] int32
    """What a document is known by."""
    return xxh3_128_hexdigest(ids.numpy().tobytes())


def check_globals(ids: Tensor, extra: Mapping[str, Tensor], meta: Meta) -> Tensor:  # [N] -> [N]
    """The same ids; FormatError where they are not those the metadata names, or a tensor of the file fits no cache."""
    if int(ids.min()) < 0 or ids_hash(ids) != meta.seq.ids_hash:
        raise FormatError("the snapshot's tensor ids is wrong", "its hash is not the one in the metadata")
    layers, heads = meta.layout.layers, meta.layout.heads
    for name, width in (("stat.probe_k", meta.layout.head_dim), ("stat.probe_v", meta.layout.v_dim)):
        shape = tuple(extra[name].shape) if name in extra else (layers, heads, 1, width)
        if len(shape) != 4 or shape != (layers, heads, min(shape[2], len(ids)), width):
            raise FormatError(f"the snapshot's tensor {name} is {shape}", "it does not fit the cache")
    check_segments(extra.get("stat.segments"), len(ids))
    for name, part in extra.items():
        if name.startswith("stat.") and part.dtype in FLOATS and not bool(part.isfinite().all()):
            raise FormatError(f"the snapshot's tensor {name} holds NaN or infinity", fix="prefill the document again")
    return ids


def check_segments(segments: Tensor | None, N: int) -> None:  # [S, 4]
    """FormatError where stretches of the text are not in order, overlap, or lie outside its N tokens."""
    if segments is None:
        return
    fits = segments.dtype == torch.int32 and segments.dim() == 2 and segments.shape[1] == 4
    edges = segments[:, :2].flatten() if fits else segments.new_ones(1)
    if not fits or not bool((edges.diff() >= 0).all()) or not bool(((edges >= 0) & (edges <= N)).all()):
        raise FormatError("the snapshot's tensor stat.segments is wrong", f"stretches must rise within 0 and {N}")


def check_layer(index: int, lens: Tensor, parts: Mapping[str, Tensor | None], meta: Meta) -> None:
    """FormatError where `pos` does not rise within the text, a `span` is below 1, or NaN turns up in another part."""
    pos, span = parts["pos"], parts["span"]
    if pos is None:
        raise ValueError("entries have positions")
    rising, name, end = pos[1:] > pos[:-1], layer_name(index), meta.seq.next_pos
    rising[lens.cumsum(0)[:-1] - 1] = True  # where a head begins
    if int(pos.min()) < 0 or int(pos.max()) >= end or not bool(rising.all()):
        raise FormatError(f"the snapshot's tensor {name}.pos is wrong", f"positions must rise within 0 and {end - 1}")
    if span is not None and int(span.min()) < 1:
        raise FormatError(f"the snapshot's tensor {name}.span is wrong", "an entry stands for at least one token")
    check_finite(index, **{name: part for name, part in parts.items() if name not in ("pos", "span")})


def check_stats(index: int, stats: Stats, meta: Meta) -> Stats:
    """The same statistics; FormatError for one that does not fit the cache by dtype or shape, or that is not finite."""
    Hq, D, per_token = meta.layout.q_heads, meta.layout.head_dim, (meta.layout.heads, meta.seq.tokens)
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(PER_TOKEN, per_token)
    shapes |= dict.fromkeys(("resid_norm", "attn_in_norm"), per_token[1:])
    shapes |= {"sink_logit": (Hq,), "q_mean": (Hq, D), "q_cov": (Hq, D, D)}
    for name in ("q_last", "q_probe", "q_repeat"):
        positions: Tensor | None = getattr(stats, f"{name}_pos")
        count = 0 if positions is None else positions.numel()
        shapes |= {name: (Hq, count, D), f"{name}_pos": (max(count, 1),)}
    for name, part in stats.present().items():
        fits = part.dtype == torch.int32 if name.endswith("_pos") else part.dtype in FLOATS
        if not fits or tuple(part.shape) != shapes[name]:
            what = f"{NAMES[part.dtype]} {tuple(part.shape)}"
            raise FormatError(f"the snapshot's tensor {layer_name(index)}.stat.{name} is {what}")
        if name != "sink_logit":  # where it is -inf there is no sink
            check_finite(index, **{name: part})
    return stats


@cache
def encoder(text: str) -> Step:
    """The encoding a file names; FormatError for one that this kvcli lacks."""
    try:
        return Recipe.parse(f"encode={text}").encode
    except UsageError as cause:
        raise FormatError(f"the snapshot's encoding {text!r:.80} is unknown", cause.what) from cause
