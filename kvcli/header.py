"""The safetensors header of a snapshot, checked before anything is allocated; knows no torch."""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from math import prod
from typing import Any, BinaryIO

from .errors import FormatError
from .meta import Meta

_BY_WIDTH = {1: "BOOL U8 I8 F8_E4M3 F8_E5M2", 2: "U16 I16 F16 BF16", 4: "U32 I32 F32", 8: "U64 I64 F64"}
DTYPE_BYTES = {name: width for width, names in _BY_WIDTH.items() for name in names.split()}
LIMIT = 100_000_000  # bytes of a header, the limit of the safetensors library


@dataclass(frozen=True)
class Spec:
    """A tensor announced: `dtype` is a key of DTYPE_BYTES."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclass(frozen=True)
class Entry(Spec):
    """A tensor in a file; its bytes are start to end, counted from the beginning of the file."""

    start: int

    @property
    def end(self) -> int:
        return self.start + self.nbytes


@dataclass(frozen=True)
class Header:
    """A header that holds together: tensors follow one another without holes, as large as their shapes say."""

    entries: tuple[Entry, ...]  # in file order
    metadata: Mapping[str, str]
    raw: bytes  # length, JSON and padding

    @property
    def size(self) -> int:
        """Bytes of the whole file."""
        return self.entries[-1].end if self.entries else len(self.raw)

    @property
    def meta(self) -> Meta:
        """Raises FormatError for a file that is not ours."""
        return Meta.from_strings(self.metadata)

    @cached_property
    def by_name(self) -> dict[str, Entry]:
        return {entry.name: entry for entry in self.entries}


def encode_header(specs: Iterable[Spec], metadata: Mapping[str, str]) -> bytes:
    """The header of a file with these tensors in this order: equal arguments give equal bytes."""
    table: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for spec in specs:
        if spec.name in table:
            raise ValueError(f"{spec.name} is announced twice")
        start, end = end, end + spec.nbytes
        table[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": (start, end)}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def read_header(f: BinaryIO, size: int | None = None) -> Header:
    """The header of `f`, which stands at its beginning; `size` is that of the file in bytes, None for a pipe.

    Raises FormatError for whatever is wrong with the header, and for a file longer or shorter than it says.
    """
    prefix = _read(f, 8)
    _ensure(len(prefix) == 8, "not a snapshot: " + ("it is too short" if prefix else "it is empty"))
    length = int.from_bytes(prefix, "little")
    room = LIMIT if size is None else min(LIMIT, size - 8)
    text = _read(f, length) if length <= room else b""
    _ensure(len(text) == length, "not a snapshot, or cut short", f"its header would take {length} bytes")
    header = _parse(prefix + text)
    if size is not None:
        _ensure(size >= header.size, f"the snapshot is incomplete: {header.size - size} bytes are missing")
        _ensure(size <= header.size, "more bytes follow the end of the snapshot", f"it has {header.size} bytes")
    return header


def _ensure(right: bool, what: str, why: str = "") -> None:
    if not right:
        raise FormatError(what, why)


def _read(f: BinaryIO, n: int) -> bytes:
    data = bytearray()
    while len(data) < n and (block := f.read(n - len(data))):
        data += block
    return bytes(data)


def _parse(raw: bytes) -> Header:
    try:
        table = json.loads(raw[8:].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as cause:
        raise FormatError("not a snapshot: its header is not JSON", f"{cause!s:.80}") from cause
    _ensure(isinstance(table, dict), "not a snapshot: its header is not a JSON object")
    metadata = table.pop("__metadata__", {})
    strings = isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    _ensure(strings, "the snapshot's metadata is damaged", "it must be an object of strings")
    entries: list[Entry] = []
    for name, info in table.items():
        entries.append(_entry(name, info, len(raw), entries[-1].end if entries else len(raw)))
    return Header(tuple(entries), metadata, raw)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise FormatError(f"the snapshot's header names {name!r:.80} twice")
    return table


def _entry(name: str, info: Any, base: int, start: int) -> Entry:
    who = f"the snapshot's tensor {name!r:.80}"
    keys = {"dtype", "shape", "data_offsets"}
    _ensure(isinstance(info, dict) and info.keys() == keys, f"{who} lacks dtype, shape or offsets, or has more")
    dtype, shape, offsets = info["dtype"], info["shape"], info["data_offsets"]
    _ensure(isinstance(dtype, str) and dtype in DTYPE_BYTES, f"{who} has an unknown dtype", f"{dtype!r:.80}")
    # The largest stride torch would compute must fit 63 bits too, hence no factor 0.
    fits = _counts(shape) and len(shape) <= 64 and prod(max(n, 1) for n in shape) * DTYPE_BYTES[dtype] < 2**63
    _ensure(fits, f"{who} has an impossible shape", f"{shape!r:.80}")
    _ensure(_counts(offsets) and len(offsets) == 2, f"{who} has impossible offsets", f"{offsets!r:.80}")
    entry = Entry(name, dtype, tuple(shape), start)
    begin, end = offsets
    _ensure(base + begin == start, f"{who} begins at {begin!s:.40}, the one before it ends at {start - base}")
    _ensure(base + end == entry.end, f"{who} ends at {end!s:.40}, by its shape it ends at {entry.end - base}")
    return entry


def _counts(values: Any) -> bool:
    return isinstance(values, list) and all(type(value) is int and value >= 0 for value in values)


def layer_name(index: int) -> str:
    """What the names of a layer's tensors begin with."""
    return f"L{index:03d}"


def is_payload(name: str) -> bool:
    """Whether a tensor holds keys or values, plain or encoded."""
    return re.fullmatch(r"L[0-9]+\.[kv](\..+)?", name) is not None


def entry_shape(header: Header, meta: Meta, index: int) -> tuple[int, ...]:
    """How the entries of a layer are laid out: (H, n), or (E,) where heads differ."""
    pos = header.by_name.get(f"{layer_name(index)}.pos")
    return pos.shape if pos else (meta.layout.heads, meta.seq.tokens)


def check_snapshot(header: Header) -> Meta:
    """The metadata of a header that is a kvcli snapshot through and through; FormatError where it is not."""
    meta = header.meta
    _check_meta(meta)
    names = [entry.name for entry in header.entries]
    _ensure(names[:1] == ["ids"] and names[-1] == "digest", "the snapshot's ids are not first or its digest not last")
    expect(header, "ids", "I32", (meta.seq.tokens,))
    expect(header, "report", "F32", (meta.layout.layers, 4))
    expect(header, "digest", "U8", (len(names), 16))
    found = {match[0] for name in names if (match := re.match(r"L[0-9]+(?=\.)", name))}
    for i in range(meta.layout.layers):
        _ensure(layer_name(i) in found, f"the snapshot has no layer {i}", f"it says it has {meta.layout.layers}")
        _check_layer(header, meta, i)
        found.remove(layer_name(i))
    _ensure(not found, f"the snapshot has a layer {min(found, default='')[:80]}, beyond those of its layout")
    return meta


def _check_meta(meta: Meta) -> None:
    seq, layout, cap = meta.seq, meta.layout, 1 if meta.layout.softcap is None else meta.layout.softcap
    counts = {name: getattr(layout, name) for name in ("layers", "heads", "q_heads", "head_dim", "v_dim")}
    for name, value in {**counts, "tokens": seq.tokens, "next_pos": seq.next_pos}.items():
        _ensure(type(value) is int and 0 < value < 2**31, f"the snapshot's {name} cannot be {value!r:.40}")
    sound = {
        "next_pos or lead": type(seq.lead) is int and 0 <= seq.lead <= seq.tokens <= seq.next_pos,
        "q_heads": layout.q_heads % layout.heads == 0,
        "dtype": layout.dtype in ("BF16", "F16", "F32"),
        "scale or softcap": all(type(n) in (int, float) and 0 < n < 2**31 for n in (layout.scale, cap)),
        "kinds": len(layout.kinds) in (0, layout.layers) and all(kind in ("full", "sliding") for kind in layout.kinds),
        "model, rope or history": all(isinstance(part, dict) for part in (meta.model, meta.rope, *meta.history)),
    }
    for name, right in sound.items():
        _ensure(right, "the snapshot's metadata is damaged", f"its {name} cannot be")


def _check_layer(header: Header, meta: Meta, index: int) -> None:
    name, H, dtype = layer_name(index), meta.layout.heads, meta.layout.dtype
    shape = entry_shape(header, meta, index)
    ragged = len(shape) == 1
    right = shape[0] >= H if ragged else len(shape) == 2 and shape[0] == H and shape[1] > 0
    _ensure(right, f"the snapshot's tensor {name}.pos has shape {shape}", f"there are {H} heads")
    lens = f"{name}.len" in header.by_name
    _ensure(lens == ragged, f"the snapshot's tensor {name}.len is {'out of place' if lens else 'missing'}")
    if meta.encode == "raw":
        expect(header, f"{name}.k", dtype, (*shape, meta.layout.head_dim), needed=True)
        expect(header, f"{name}.v", dtype, (*shape, meta.layout.v_dim), needed=True)
    expect(header, f"{name}.len", "I32", (H,))
    expect(header, f"{name}.pos", "I32", shape)
    expect(header, f"{name}.bias", "F32", shape)
    expect(header, f"{name}.span", "I32", shape)


def expect(header: Header, name: str, dtype: str, shape: tuple[int, ...], *, needed: bool = False) -> None:
    """Raise FormatError where a tensor is there but not like this, or is `needed` and not there."""
    entry = header.by_name.get(name)
    _ensure(entry is not None or not needed, f"the snapshot has no tensor {name}")
    if entry and (entry.dtype, entry.shape) != (dtype, shape):
        raise FormatError(f"the snapshot's tensor {name} is {entry.dtype} {entry.shape}, not {dtype} {shape}")


def summary(header: Header, meta: Meta) -> dict[str, Any]:
    """What a snapshot is, for people and as JSON: its metadata, and what the header tells of entries and bytes.

    entries, of, keep: those in layers a budget is about, of how many for the full document, and their share.
    per_head: None for a layer whose heads differ; what each holds is in its data, not in its header.
    """
    shapes = [entry_shape(header, meta, i) for i in range(meta.layout.layers)]
    entries, of = sum(prod(shapes[i]) for i in meta.held), len(meta.held) * meta.layout.heads * meta.seq.tokens
    stats = {match[1] for name in header.by_name if (match := re.match(r"(?:L[0-9]+\.)?stat\.(.*)", name))}
    return {
        "format": header.metadata["kvcli.format"],
        **asdict(meta),
        "entries": entries,
        "of": of,
        "keep": entries / of if of else 1.0,
        "kv_bytes": sum(entry.nbytes for entry in header.entries if is_payload(entry.name)),
        "file_bytes": header.size,
        "stats": sorted(stats),
        "layers": [{"entries": prod(shape), "per_head": (*shape, None)[1]} for shape in shapes],
    }
