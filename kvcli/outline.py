"""What a snapshot file will hold, before a byte of it exists: tensors, features, sizes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .header import Spec, encode_header, is_payload
from .layers import layer_specs, requires_of, spec_of, with_digest
from .meta import Meta
from .snapshot import Snapshot, Stats


@dataclass(frozen=True)
class Outline:
    """The file's metadata, its entries a head, and the shapes of all its tensors."""

    meta: Meta
    counts: Sequence[Tensor]  # L x [H] int64
    parts: Sequence[frozenset[str]]  # of pos, bias, span: what is stored of a layer's entries beside k and v
    specs: tuple[Spec, ...]

    @classmethod
    def of(
        cls,
        meta: Meta,
        counts: Sequence[Tensor],
        parts: frozenset[str],
        stats: Sequence[Stats],
        extra: Mapping[str, Tensor],
        first: Sequence[Tensor] = (),
    ) -> "Outline":
        """Lay out ids, then the layers, then the tensors of the whole file; `requires` follows from the content.

        parts: of bias and span, for all layers; positions are stored where some token has no entry of its own.
        first: [H] a layer, where the encoder splits heads.
        """
        specs, N = [Spec("ids", "I32", (meta.seq.tokens,))], meta.seq.tokens
        each = [parts | ({"pos"} if bool((count != N).any()) else set()) for count in counts]
        for i, count in enumerate(counts):
            split = first[i].tolist() if first else None
            specs += layer_specs(i, count.tolist(), meta, each[i], stats[i] if stats else Stats(), split)
        specs += [spec_of(name, tensor) for name, tensor in extra.items()]
        return cls(replace(meta, requires=requires_of(specs, meta.encode)), counts, each, tuple(specs))

    @property
    def entries(self) -> int:
        """Entries of all heads in the layers a budget is about."""
        return sum(int(self.counts[i].sum()) for i in self.meta.held)

    @property
    def total(self) -> int:
        """The same for the full document."""
        return len(self.meta.held) * self.meta.layout.heads * self.meta.seq.tokens

    @property
    def file_bytes(self) -> int:
        """The exact size of the file."""
        specs = with_digest(self.specs)
        return len(encode_header(specs, self.meta.to_strings())) + sum(spec.nbytes for spec in specs)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values as they are encoded."""
        return sum(spec.nbytes for spec in self.specs if is_payload(spec.name))


def hollow(stats: Stats) -> Stats:
    """The same shapes and dtypes without the numbers."""
    return Stats(**{name: part.to("meta") for name, part in stats.present().items()})


def outline_of(snapshot: Snapshot) -> Outline:
    """What a file will hold that has the whole snapshot in it, unencoded."""
    meta, lens = replace(snapshot.meta, encode="raw"), [rows.lens for rows in snapshot.rows]
    parts = frozenset(part for rows in snapshot.rows for part in ("bias", "span") if getattr(rows, part) is not None)
    return Outline.of(meta, lens, parts, snapshot.stats, snapshot.extra)
