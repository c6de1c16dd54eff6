"""What a snapshot says of itself: the metadata of the file, as a value and as strings; knows no torch."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import FormatError

FORMAT = "1.0"
# Features a reader must know; a file that requires another is refused by name.
KNOWN = frozenset({"ragged", "bias", "span", "encode:raw/1", "encode:int8/1", "encode:kivi/1", "encode:zipvl-mixed/1"})

Json = Mapping[str, Any]


@dataclass(frozen=True)
class Layout:
    """The shape of the cache: one sequence, `layers` attention layers of the given `kinds`."""

    layers: int
    heads: int  # H, KV heads
    q_heads: int  # Hq
    head_dim: int  # D
    v_dim: int  # Dv
    dtype: str  # safetensors name of the dtype of k and v: BF16, F16, F32
    scale: float  # attention scale
    softcap: float | None = None
    kinds: tuple[str, ...] = ()  # "full" or "sliding", one a layer


@dataclass(frozen=True)
class Seq:
    """The tokens: how many were read, where the next one goes, and how a question is closed."""

    tokens: int  # N
    next_pos: int
    ids_hash: str
    lead: int  # tokens of the template before the document
    tail: str  # text between a question and its answer
    chat: bool  # whether the chat template was used


@dataclass(frozen=True)
class Meta:
    """All metadata of a snapshot. `history` holds one entry a compression: recipe, budget asked and got, parent."""

    seq: Seq
    model: Json  # id, revision, architecture, weights, config, dtype, weights_dtype, adapters
    tokenizer: str
    layout: Layout
    rope: Json
    history: tuple[Json, ...] = ()
    encode: str = "raw"
    requires: tuple[str, ...] = ()
    unknown: Mapping[str, str] = field(default_factory=dict)  # optional keys of a later 1.x, carried along

    @property
    def held(self) -> tuple[int, ...]:
        """The layers a budget is about: those with full attention."""
        kinds = self.layout.kinds or ("full",) * self.layout.layers
        return tuple(i for i, kind in enumerate(kinds) if kind == "full")

    def to_strings(self) -> dict[str, str]:
        """The metadata block of the file: JSON in strings, keys sorted, no times, paths or names of documents."""
        known = {
            "kvcli.format": FORMAT,
            "kvcli.requires": _dump(self.requires),
            "kvcli.seq": _dump(vars(self.seq)),
            "kvcli.model": _dump(self.model),
            "kvcli.tokenizer": self.tokenizer,
            "kvcli.layout": _dump(vars(self.layout)),
            "kvcli.rope": _dump(self.rope),
            "kvcli.history": _dump(self.history),
            "kvcli.encode": self.encode,
        }
        return dict(sorted({**self.unknown, **known}.items()))

    @classmethod
    def from_strings(cls, text: Mapping[str, str]) -> "Meta":
        """Raises FormatError for a file that is not ours, is newer than this reader, or whose metadata is damaged."""
        check_version(text)
        try:
            meta = cls._parse(text)
            words = (meta.seq.tail, meta.seq.ids_hash, *(meta.model[key] for key in ("id", "architecture", "weights")))
            words += tuple(step[key] for step in meta.history for key in ("recipe", "budget"))
            if not all(isinstance(word, str) for word in words):
                raise TypeError("a name is not a string")
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as cause:
            raise FormatError(
                "the snapshot's metadata is damaged", f"{type(cause).__name__}: {cause!s:.200}"
            ) from cause
        return meta

    @classmethod
    def _parse(cls, text: Mapping[str, str]) -> "Meta":
        layout = json.loads(text["kvcli.layout"])
        layout["kinds"] = tuple(layout.get("kinds", ()))
        return cls(
            seq=Seq(**_known(Seq, json.loads(text["kvcli.seq"]))),
            model=json.loads(text["kvcli.model"]),
            tokenizer=text["kvcli.tokenizer"],
            layout=Layout(**_known(Layout, layout)),
            rope=json.loads(text["kvcli.rope"]),
            history=tuple(json.loads(text["kvcli.history"])),
            encode=text["kvcli.encode"],
            requires=tuple(json.loads(text["kvcli.requires"])),
            unknown={key: value for key, value in text.items() if key not in OURS},
        )


OURS = frozenset(
    f"kvcli.{key}" for key in ("format", "requires", "seq", "model", "tokenizer", "layout", "rope", "history", "encode")
)


def check_version(text: Mapping[str, str]) -> None:
    """Refuse, by name, what is not a kvcli file, a later major version, or a feature this reader does not know."""
    version = text.get("kvcli.format")
    if version is None:
        raise FormatError("a safetensors file, but not a kvcli snapshot", "its metadata has no kvcli.format")
    if version.split(".")[0] != FORMAT.split(".")[0]:
        raise FormatError(
            f"the snapshot has format {version:.40}; this kvcli reads 1.x", fix="install a newer kvcli to read it"
        )
    try:
        requires = json.loads(text.get("kvcli.requires", "[]"))
        strange = sorted(set(requires) - KNOWN)
    except (TypeError, ValueError, RecursionError) as cause:
        raise FormatError("the snapshot's metadata is damaged", "kvcli.requires is not a list of names") from cause
    if strange:
        raise FormatError(
            f"the snapshot requires {', '.join(map(str, strange)):.200}, which this kvcli does not know",
            fix="install a newer kvcli to read it",
        )


def _known(cls: type, facts: Json) -> dict[str, Any]:
    """What a later 1.x adds is optional by definition, so it is left out."""
    return {name: value for name, value in facts.items() if name in cls.__dataclass_fields__}  # type: ignore[attr-defined]


def _dump(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
