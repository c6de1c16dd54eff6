"""Snapshot <-> bytes: tensors and their digests, written and read a layer at a time."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from types import TracebackType
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from xxhash import xxh3_128

from .codes import Coded, Split
from .errors import FormatError
from .header import Entry, Spec, encode_header, entry_shape, expect, layer_name
from .layers import (
    DTYPES,
    PARTS,
    check_globals,
    check_layer,
    check_stats,
    encoder,
    layer_tensors,
    requires_of,
    spec_of,
    stored_shapes,
    with_digest,
)
from .meta import Meta
from .outline import outline_of
from .snapshot import Lazy, Rows, Snapshot, Stats
from .spool import BLOCK, Source, blaming, header_at, open_input, open_output, shown

Tick = Callable[[int, int], None]  # bytes done, bytes in all


class Writer:
    """Writes tensors as they come: `with Writer(target, specs, meta) as out: out.put(name, tensor)`.

    target: a path, where the file appears when it is whole, or a binary stream, which is never sought.
    specs: the tensors in file order; `put` follows them exactly. The digests come last by themselves.
    Raises StorageError; ValueError for a tensor that is not as announced.
    """

    def __init__(self, target: Source, specs: Sequence[Spec], meta: Meta, force: bool = False) -> None:
        every = with_digest(specs)
        self._header = encode_header(every, meta.to_strings())
        self._pending = iter(specs)
        self.size = len(self._header) + sum(spec.nbytes for spec in every)
        self._session = self._open(target, force)

    @contextmanager
    def _open(self, target: Source, force: bool) -> Iterator["Writer"]:
        with open_output(target, self.size, force) as self._write:
            self._write(self._header)
            self._digests = bytearray()
            yield self
            if missing := next(self._pending, None):
                raise ValueError(f"{missing.name} was never put")
            self._write(bytes(self._digests) + xxh3_128(self._header).digest())

    def __enter__(self) -> "Writer":
        return self._session.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session.__exit__(kind, error, trace)

    def put(self, name: str, tensor: Tensor) -> None:
        """Write the next tensor, which may live on any device."""
        expected = next(self._pending, None)
        if expected != (found := spec_of(name, tensor)):
            raise ValueError(f"expected {expected}, got {found}")
        flat = tensor.detach().cpu().contiguous().view(-1)
        data = flat.view(torch.uint8).numpy().data
        digest = xxh3_128()
        for at in range(0, len(data), BLOCK):
            block = data[at : at + BLOCK]
            digest.update(block)
            self._write(block)
        self._digests += digest.digest()


def write_snapshot(snapshot: Snapshot, target: Source, force: bool = False) -> int:
    """Write a whole snapshot as it is, unencoded, and return its size in bytes.

    Positions are left out where they are 0 ... N-1 in every head.
    """
    outline = outline_of(snapshot)
    with Writer(target, outline.specs, outline.meta, force) as out:
        out.put("ids", snapshot.ids)
        for i, rows in enumerate(snapshot.rows):
            shapes = encoder("raw").part("shapes", rows.lens.tolist(), snapshot.meta.layout)
            payload = {name: getattr(rows, name).reshape(shape) for name, (_, shape) in shapes.items()}
            for name, tensor in layer_tensors(i, payload, rows, outline.parts[i], snapshot.stats[i]):
                out.put(name, tensor)
        for name, tensor in snapshot.extra.items():
            out.put(name, tensor)
    return out.size


class Reader:
    """A snapshot in a file or from a pipe; header and metadata are checked, tensors read and verified when asked for.

    Reading is safe from several threads. `digest` identifies the content. Raises StorageError, FormatError.
    """

    def __init__(self, source: Source) -> None:
        self._fd, self._name = open_input(source), shown(source)
        self.close = finalize(self, os.close, self._fd)
        self.header = header_at(self._fd)
        self.meta = self.header.meta
        self._encoder = encoder(self.meta.encode)
        if untold := {*requires_of(self.header.entries, "raw")} - {*self.meta.requires}:
            raise FormatError("the snapshot's metadata is damaged", f"it should require {', '.join(sorted(untold))}")
        self._digests: dict[str, bytes] = {}
        self._verified: set[str] = set()  # tensors whose digest was right
        self._sound: set[int] = set()  # layers whose rows were
        table = self.tensor("digest").numpy()
        self.digest: str = xxh3_128(table.data).hexdigest()
        self._digests = {e.name: row.tobytes() for e, row in zip(self.header.entries, table[:-1], strict=False)}

    def __enter__(self) -> "Reader":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def snapshot(self) -> Snapshot:
        """Ids and tensors of the whole file at once; layers when they are asked for, anew each time."""
        layers = range(self.meta.layout.layers)
        known = {"ids", "digest"}.union(*(self._known(i) for i in layers))
        extra = {e.name: self.tensor(e.name) for e in self.header.entries if e.name not in known}
        ids = check_globals(self.tensor("ids"), extra, self.meta)
        return Snapshot(self.meta, ids, Lazy(layers, self.rows, self.compact), Lazy(layers, self.stats), extra)

    def verify(self, tick: Tick = lambda done, total: None) -> dict[str, Any]:
        """Read what was not read yet and say what the file holds; FormatError names the first damaged tensor."""
        self.snapshot()
        for i in range(self.meta.layout.layers):
            if i not in self._sound:
                self.rows(i)
            self.stats(i)
            tick(sum(self.header.by_name[name].nbytes for name in self._verified), self.header.size)
        scratch = memoryview(bytearray(BLOCK))
        for entry in self.header.entries:
            if entry.name not in self._verified:
                self._read(entry, scratch)
        tick(self.header.size, self.header.size)
        return {"tensors": len(self.header.entries), "bytes": self.header.size, "ok": True}

    def tensor(self, name: str) -> Tensor:
        """One tensor by its name in the file."""
        entry = self.header.by_name[name]
        data = torch.empty(entry.nbytes, dtype=torch.uint8, device="cpu")
        self._read(entry, data.numpy().data)
        return data.view(DTYPES[entry.dtype]).view(entry.shape)

    def rows(self, index: int) -> Rows:
        """A layer, decoded, in memory of its own."""
        payload, lens, entries = self._stored(index)
        k, v = (part.to(DTYPES[self.meta.layout.dtype]) for part in self._encoder.part("decode", payload, lens))
        self._check(index, lens, {**entries, "k": k, "v": v})
        return Rows(k, v, lens=lens, **entries)

    def compact(self, index: int) -> Rows | Coded:
        """A layer as it is resumed from: codes stay codes where attention can read them."""
        if "codes" not in self._encoder.stage.parts:
            return self.rows(index)
        payload, lens, entries = self._stored(index)
        split: Split = self._encoder.part("codes", payload, lens)
        self._check(index, lens, {**entries, **split.numbers})
        return split.layer(entries["pos"], lens, entries["bias"])

    def stats(self, index: int) -> Stats:
        """What prefill observed in a layer, as far as the file has it."""
        found = {field.name: self._part(index, f"stat.{field.name}") for field in fields(Stats)}
        return check_stats(index, Stats(**found), self.meta)

    def _stored(self, index: int) -> tuple[dict[str, Tensor | None], Tensor, dict[str, Any]]:
        """Keys and values as they are encoded, the lengths of heads [H], and the flat `pos`, `bias` and `span`."""
        lens = self._lens(index)
        payload = {name: self._part(index, name) for name in self._payload(index, lens)}
        parts = {name: self._part(index, name) for name in PARTS}
        if parts["pos"] is None:
            parts["pos"] = torch.arange(self.meta.seq.tokens, dtype=torch.int32).repeat(len(lens))
        return payload, lens, {name: part if part is None else part.flatten() for name, part in parts.items()}

    def _check(self, index: int, lens: Tensor, parts: dict[str, Any]) -> None:
        if index not in self._sound:  # the same bytes were: they are verified every time
            check_layer(index, lens, parts, self.meta)
            self._sound.add(index)

    def _part(self, index: int, part: str) -> Tensor | None:
        name = f"{layer_name(index)}.{part}"
        return self.tensor(name) if name in self.header.by_name else None

    def _payload(self, index: int, lens: Tensor) -> list[str]:  # [H]
        """The names of the layer's encoded keys and values, all of them present with the right shape."""
        shapes = stored_shapes(self._encoder, index, lens, self.meta.layout, self._part(index, "hi"))
        for part, (dtype, shape) in shapes.items():
            expect(self.header, f"{layer_name(index)}.{part}", dtype, tuple(shape), needed=True)
        return list(shapes)

    def _known(self, index: int) -> set[str]:
        stats = (f"stat.{field.name}" for field in fields(Stats))
        parts = (*self._payload(index, self._lens(index)), "len", *PARTS, *stats)
        return {f"{layer_name(index)}.{part}" for part in parts}

    def _lens(self, index: int) -> Tensor:  # -> [H] int64
        shape = entry_shape(self.header, self.meta, index)
        if len(shape) == 2:
            return torch.full(shape[:1], shape[1])
        name = f"{layer_name(index)}.len"
        lens = self.tensor(name).long()
        if int(lens.min()) < 1 or int(lens.sum()) != shape[0]:
            raise FormatError(f"the snapshot's tensor {name} is wrong", f"its heads must add up to {shape[0]} entries")
        return lens

    def _read(self, entry: Entry, into: memoryview) -> None:
        """Fill `into` with a tensor's bytes and verify them; a smaller `into` is filled again and again."""
        digest, expected = xxh3_128(), self._digests.get(entry.name)
        for at in range(0, entry.nbytes, BLOCK):
            block = into[at % len(into) :][: min(BLOCK, entry.nbytes - at)]
            self._fill(block, entry.start + at)
            if expected:
                digest.update(block)
        if expected and digest.digest() != expected:
            raise FormatError(f"the snapshot's tensor {entry.name!r:.80} is damaged", "its digest does not match")
        self._verified.add(entry.name)

    def _fill(self, block: memoryview, start: int) -> None:
        if not self.close.alive:
            raise ValueError("the snapshot is closed")
        with blaming("read", self._name):
            while block and (n := os.preadv(self._fd, [block], start)):
                block, start = block[n:], start + n
        if block:
            raise FormatError(f"{self._name} became shorter while it was read")


def verify(source: Source, tick: Tick = lambda done, total: None) -> dict[str, Any]:
    """Check every byte of a file or pipe; see Reader.verify."""
    with Reader(source) as reader:
        return reader.verify(tick)
