"""Files that nobody wrote: arbitrary headers and arbitrary changes are refused, or mean what they meant."""

import io
import json
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from make import make_snapshot, packed, same_snapshot

from kvcli.errors import FormatError
from kvcli.header import DTYPE_BYTES, Spec, encode_header, read_header
from kvcli.storage import Reader

leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
values = st.recursive(leaves, lambda some: st.lists(some, max_size=3) | st.dictionaries(st.text(max_size=4), some))
sizes = st.integers(-1, 9) | st.integers(2**30, 2**65)
tensors = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(sorted(DTYPE_BYTES)) | values,
        "shape": st.lists(sizes, max_size=3) | values,
        "data_offsets": st.lists(sizes, min_size=2, max_size=2) | values,
    }
)
tables = st.dictionaries(st.text(max_size=4), tensors | values, max_size=3) | values
SNAPSHOT = make_snapshot(layers=1, tokens=5, dim=4, ragged=True, bias=True)
RAW = packed(SNAPSHOT)
HEAD = read_header(io.BytesIO(RAW))


@settings(max_examples=80, deadline=None)
@given(tables)
def test_any_table_is_refused_or_holds_together(table: Any) -> None:
    text = json.dumps(table).encode()
    raw = len(text).to_bytes(8, "little") + text
    try:
        header = read_header(io.BytesIO(raw))
    except FormatError as error:
        assert all(line.isprintable() for line in error.lines())
        return
    specs = [Spec(entry.name, entry.dtype, entry.shape) for entry in header.entries]
    again = read_header(io.BytesIO(encode_header(specs, header.metadata)))
    assert [Spec(entry.name, entry.dtype, entry.shape) for entry in again.entries] == specs
    assert header.size - len(raw) == again.size - len(again.raw) == sum(spec.nbytes for spec in specs)


@settings(max_examples=60, deadline=None)
@given(
    st.dictionaries(st.sampled_from(sorted(HEAD.metadata)), values.map(json.dumps) | st.text(max_size=9), min_size=1)
)
def test_any_metadata_is_refused_or_read_as_it_stands(changed: dict[str, str]) -> None:
    metadata = {**HEAD.metadata, **changed}
    specs = [Spec(entry.name, entry.dtype, entry.shape) for entry in HEAD.entries]
    header = read_header(io.BytesIO(encode_header(specs, metadata)))
    try:
        meta = header.meta
    except FormatError as error:
        assert all(line and len(line) < 300 for line in error.lines())
        return
    assert header.metadata == metadata and meta.tokenizer == metadata["kvcli.tokenizer"]


edits = st.tuples(st.integers(0, len(RAW)), st.integers(0, 9), st.binary(max_size=9))


@settings(max_examples=80, deadline=None)
@given(st.lists(edits, min_size=1, max_size=4))
def test_any_edit_is_refused_or_changes_nothing(changes: list[tuple[int, int, bytes]]) -> None:
    raw = RAW
    for at, gone, put in changes:
        raw = raw[:at] + put + raw[at + gone :]
    try:
        with Reader(io.BytesIO(raw)) as reader:
            snapshot = reader.snapshot()
            reader.verify()
            same_snapshot(snapshot, SNAPSHOT)
    except FormatError as error:
        assert raw != RAW and error.what
        return
    assert raw == RAW
