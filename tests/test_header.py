"""The header: what is written is read back, and nothing malformed gets past it."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from make import make_snapshot

from kvcli.errors import FormatError
from kvcli.header import DTYPE_BYTES, Spec, check_snapshot, encode_header, is_payload, read_header, summary
from kvcli.storage import write_snapshot

shapes = st.lists(st.integers(0, 5), max_size=3).map(tuple)
names = st.text(max_size=5)
announced = st.builds(Spec, names, st.sampled_from(sorted(DTYPE_BYTES)), shapes)


class Trickle(io.BytesIO):
    """A stream that hands out three bytes at a time."""

    def read(self, n: int | None = -1) -> bytes:
        return super().read(min(n, 3) if n and n > 0 else 3)


def raw_header(table: Any) -> bytes:
    text = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(text).to_bytes(8, "little") + text


def tensor(start: int, end: int, dtype: Any = "U8", shape: Any = None) -> dict[str, Any]:
    return {"dtype": dtype, "shape": [end - start] if shape is None else shape, "data_offsets": [start, end]}


@settings(max_examples=30, deadline=None)
@given(st.lists(announced, max_size=4, unique_by=lambda spec: spec.name), st.dictionaries(names, names, max_size=2))
def test_round_trip(tensors: list[Spec], metadata: dict[str, str]) -> None:
    raw = encode_header(tensors, metadata)
    assert len(raw) % 8 == 0 and raw == encode_header(list(tensors), dict(metadata))
    header = read_header(Trickle(raw))
    assert [Spec(e.name, e.dtype, e.shape) for e in header.entries] == tensors
    assert header.metadata == metadata and header.raw == raw
    assert header.size == len(raw) + sum(spec.nbytes for spec in tensors)


def test_a_name_is_announced_once() -> None:
    with pytest.raises(ValueError, match="twice"):
        encode_header([Spec("a", "U8", (1,)), Spec("a", "U8", (1,))], {})


MALFORMED = {
    "empty": (b"", "empty"),
    "short": (b"\x01\x00", "short"),
    "giant length": ((2**60).to_bytes(8, "little") + b"{}", "header would take"),
    "length over the limit": ((100_000_001).to_bytes(8, "little"), "header would take"),
    "cut header": (raw_header({"a": tensor(0, 4)})[:-3], "cut short"),
    "not utf-8": (raw_header(b'{"\xff": 1}'), "not JSON"),
    "not json": (raw_header(b"{"), "not JSON"),
    "byte order mark": (raw_header(b"\xef\xbb\xbf{}"), "not JSON"),
    "a list": (raw_header([]), "not a JSON object"),
    "metadata of numbers": (raw_header({"__metadata__": {"a": 1}}), "metadata"),
    "metadata a list": (raw_header({"__metadata__": []}), "metadata"),
    "same name twice": (raw_header(b'{"a\\n":1,"a\\n":2}'), "'a\\n' twice"),
    "same key twice": (raw_header(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "'dtype' twice"),
    "same metadata twice": (raw_header(b'{"__metadata__":{"x":"1","x":"2"}}'), "'x' twice"),
    "no tensor": (raw_header({"a": 3}), "'a' lacks"),
    "no offsets": (raw_header({"a": {"dtype": "U8", "shape": []}}), "'a' lacks"),
    "more than needed": (raw_header({"a": {**tensor(0, 1), "x": 1}}), "or has more"),
    "unknown dtype": (raw_header({"a": tensor(0, 1, "U7")}), "dtype"),
    "dtype a list": (raw_header({"a": tensor(0, 1, [])}), "dtype"),
    "negative size": (raw_header({"a": tensor(0, 1, shape=[-1])}), "shape"),
    "fractional size": (raw_header({"a": tensor(0, 1, shape=[1.0])}), "shape"),
    "size a bool": (raw_header({"a": tensor(0, 1, shape=[True])}), "shape"),
    "shape a number": (raw_header({"a": tensor(0, 1, shape=1)}), "shape"),
    "too many sizes": (raw_header({"a": tensor(0, 1, shape=[1] * 65)}), "shape"),
    "overflow": (raw_header({"a": tensor(0, 0, shape=[2**32, 2**32])}), "shape"),
    "overflow beside zero": (raw_header({"a": tensor(0, 0, shape=[0, 2**62, 2])}), "shape"),
    "endless number": (raw_header(b'{"a":' + b"9" * 5000 + b"}"), "not JSON"),
    "long number": (raw_header({"a": tensor(0, 1, shape=[10**4000])}), "shape"),
    "long offset": (raw_header({"a": {**tensor(0, 1), "data_offsets": [10**4000, 10**4000]}}), "begins at"),
    "three offsets": (raw_header({"a": {**tensor(0, 1), "data_offsets": [0, 1, 2]}}), "offsets"),
    "negative offset": (raw_header({"a": {**tensor(0, 1), "data_offsets": [-1, 0]}}), "offsets"),
    "wrong bytes": (raw_header({"a": tensor(0, 5, "F32", [1])}), "'a' ends at 5"),
    "hole": (raw_header({"a": tensor(0, 1), "b": tensor(2, 3)}), "'b' begins at 2"),
    "hole at the start": (raw_header({"a": tensor(1, 2)}), "'a' begins at 1"),
    "overlap": (raw_header({"a": tensor(0, 2), "b": tensor(1, 3)}), "'b' begins at 1"),
    "shuffled": (raw_header({"b": tensor(1, 2), "a": tensor(0, 1)}), "'b' begins at 1"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_headers_are_refused(case: str) -> None:
    raw, words = MALFORMED[case]
    for size in (None, len(raw)):
        with pytest.raises(FormatError) as caught:
            read_header(io.BytesIO(raw), size)
        assert words in " ".join(caught.value.lines())
        assert all(line.isprintable() for line in caught.value.lines())


@pytest.mark.parametrize("depth", [10, 300, 900, 980, 1000, 3000, 200_000])
def test_deep_nesting_is_refused(depth: int) -> None:
    nested = b"[" * depth + b"]" * depth
    for raw in (nested, b'{"a":' + nested + b"}", b'{"a":{"dtype":"U8","shape":' + nested + b',"data_offsets":[0,1]}}'):
        with pytest.raises(FormatError):
            read_header(io.BytesIO(raw_header(raw)))


def test_size_of_the_file() -> None:
    raw = raw_header({"a": tensor(0, 4)}) + b"1234"
    assert read_header(io.BytesIO(raw), len(raw)).size == len(raw)
    with pytest.raises(FormatError, match="3 bytes are missing"):
        read_header(io.BytesIO(raw), len(raw) - 3)
    with pytest.raises(FormatError, match="more bytes follow"):
        read_header(io.BytesIO(raw), len(raw) + 1)


def whole(**options: Any) -> tuple[list[Spec], dict[str, str]]:
    """Specs and metadata of a sound snapshot."""
    out = io.BytesIO()
    write_snapshot(make_snapshot(**options), out)
    out.seek(0)
    header = read_header(out, len(out.getvalue()))
    return [Spec(e.name, e.dtype, e.shape) for e in header.entries], dict(header.metadata)


def checked(tensors: list[Spec], metadata: dict[str, str]) -> dict[str, Any]:
    header = read_header(io.BytesIO(encode_header(tensors, metadata)))
    return summary(header, check_snapshot(header))


Change = Callable[[list[Spec]], list[Spec]]


def without(name: str) -> Change:
    return lambda tensors: [spec for spec in tensors if spec.name != name]


def changed(name: str, **facts: Any) -> Change:
    return lambda tensors: [replace(spec, **facts) if spec.name == name else spec for spec in tensors]


def added(name: str, dtype: str = "U8", shape: tuple[int, ...] = (1,)) -> Change:
    return lambda tensors: [*tensors[:-1], Spec(name, dtype, shape), tensors[-1]]


INCONSISTENT: dict[str, tuple[bool, Change, str]] = {
    "no ids": (False, without("ids"), "ids"),
    "ids of another length": (False, changed("ids", shape=(12,)), "ids"),
    "ids of another dtype": (False, changed("ids", dtype="U32"), "ids"),
    "ids not first": (False, lambda tensors: [tensors[1], tensors[0], *tensors[2:]], "ids"),
    "no digest": (False, without("digest"), "digest"),
    "digest of another size": (False, changed("digest", shape=(3, 16)), "digest"),
    "no values": (False, without("L001.v"), "L001.v"),
    "keys of another dtype": (False, changed("L000.k", dtype="F16"), "L000.k"),
    "keys of another size": (False, changed("L000.k", shape=(2, 13, 9)), "L000.k"),
    "flat keys without positions": (False, changed("L000.k", shape=(26, 8)), "L000.k"),
    "lengths out of place": (False, added("L000.len", "I32", (2,)), "L000.len"),
    "fewer entries than tokens, no positions": (False, changed("L000.k", shape=(2, 12, 8)), "L000.k"),
    "no layer": (False, lambda tensors: [spec for spec in tensors if spec.name[:4] != "L001"], "layer 1"),
    "one layer more": (False, added("L002.k"), "L002"),
    "badly padded layer": (False, added("L1.stat.q"), "L1"),
    "report of another shape": (False, added("report", "F32", (4, 2)), "report"),
    "no lengths": (True, without("L000.len"), "L000.len"),
    "lengths of another shape": (True, changed("L000.len", shape=(3,)), "L000.len"),
    "positions without heads": (True, changed("L000.pos", shape=(1,)), "L000.pos"),
    "positions of three axes": (True, changed("L000.pos", shape=(2, 2, 2)), "L000.pos"),
    "positions of no axis": (True, changed("L000.pos", shape=()), "L000.pos"),
    "bias of another shape": (True, changed("L000.bias", shape=(1,)), "L000.bias"),
    "bias in half precision": (True, changed("L001.bias", dtype="F16"), "L001.bias"),
    "span of another shape": (True, changed("L001.span", shape=(2, 1)), "L001.span"),
}


@pytest.mark.parametrize("case", INCONSISTENT)
def test_inconsistent_tensors_are_refused(case: str) -> None:
    ragged, change, words = INCONSISTENT[case]
    tensors, metadata = whole(ragged=ragged, bias=ragged)
    checked(tensors, metadata)
    tensors = change(tensors)
    if "digest" not in case:  # its size is not what this case is about
        tensors[-1] = replace(tensors[-1], shape=(len(tensors), 16))
    with pytest.raises(FormatError, match=words):
        checked(tensors, metadata)


DAMAGED = {
    "layers": ("layout", "layers", 0),
    "heads": ("layout", "heads", True),
    "head_dim": ("layout", "head_dim", 8.0),
    "v_dim": ("layout", "v_dim", -8),
    "q_heads": ("layout", "q_heads", 3),
    "dtype": ("layout", "dtype", "I8"),
    "scale": ("layout", "scale", "1"),
    "kinds": ("layout", "kinds", ["full"]),
    "tokens": ("seq", "tokens", 0),
    "next_pos": ("seq", "next_pos", 12),
    "lead": ("seq", "lead", None),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_impossible_metadata_is_refused(case: str) -> None:
    part, key, value = DAMAGED[case]
    tensors, metadata = whole()
    table = json.loads(metadata[f"kvcli.{part}"])
    metadata[f"kvcli.{part}"] = json.dumps({**table, key: value})
    with pytest.raises(FormatError) as caught:
        checked(tensors, metadata)
    assert key in " ".join(caught.value.lines())


@pytest.mark.parametrize("text", ["", "3", "null", "[[1]]", '"x"', "{", '["a"]', "[" * 100_000])
@pytest.mark.parametrize("key", ["requires", "seq", "model", "layout", "rope", "history"])
def test_strange_metadata_is_refused(key: str, text: str) -> None:
    tensors, metadata = whole()
    with pytest.raises(FormatError):
        checked(tensors, {**metadata, f"kvcli.{key}": text})


def test_foreign_and_newer_files_are_refused_by_name() -> None:
    tensors, metadata = whole()
    with pytest.raises(FormatError, match="not a kvcli snapshot"):
        checked(tensors, {"format": "pt"})
    with pytest.raises(FormatError, match=r"format 2\.0"):
        checked(tensors, {**metadata, "kvcli.format": "2.0"})
    with pytest.raises(FormatError, match="encode:magic/1"):
        checked(tensors, {**metadata, "kvcli.requires": '["encode:magic/1"]'})
    assert checked(tensors, {**metadata, "kvcli.format": "1.7"})["format"] == "1.7"


def test_unknown_optional_tensors_are_allowed() -> None:
    tensors, metadata = whole()
    for name in ("stat.new", "L000.stat.new", "Lx", "something"):
        tensors = added(name)(tensors)
    tensors[-1] = replace(tensors[-1], shape=(len(tensors), 16))
    assert "new" in checked(tensors, metadata)["stats"]


@pytest.mark.parametrize("ragged", [False, True])
def test_summary_counts_what_is_there(ragged: bool) -> None:
    tensors, metadata = whole(ragged=ragged, layers=3)
    facts = json.loads(json.dumps(checked(tensors, metadata)))
    entries = sum(int(rows.lens.sum()) for rows in make_snapshot(ragged=ragged, layers=3).rows)
    assert facts["entries"] == entries == sum(layer["entries"] for layer in facts["layers"])
    assert facts["keep"] == pytest.approx(entries / (3 * 2 * 13))
    assert facts["kv_bytes"] == entries * 2 * 8 * 2
    assert facts["file_bytes"] == len(encode_header(tensors, metadata)) + sum(spec.nbytes for spec in tensors)
    assert [layer["per_head"] for layer in facts["layers"]] == ([None] * 3 if ragged else [13] * 3)
    assert facts["model"]["id"] == "tests/tiny-llama" and facts["layout"]["dtype"] == "BF16"
    assert facts["stats"] == sorted([*make_snapshot().stats[0].present(), "final_hidden", "segments"])


def test_payload_is_keys_and_values() -> None:
    for name in ("L000.k", "L012.v", "L000.k.q", "L1234.v.scale"):
        assert is_payload(name)
    for name in ("ids", "L000.pos", "L000.len", "L000.stat.k", "k", "L000.kind"):
        assert not is_payload(name)
