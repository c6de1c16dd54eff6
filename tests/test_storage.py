"""The file: what goes in comes out bit for bit, and damage never does."""

import io
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from make import make_snapshot, opened, packed, same, same_snapshot
from safetensors.torch import load_file
from torch import Tensor
from xxhash import xxh3_128

from kvcli import registry, storage
from kvcli.errors import FormatError
from kvcli.header import Spec, encode_header, read_header
from kvcli.layers import encoder, layer_specs, layer_tensors, spec_of, with_digest
from kvcli.snapshot import Stats
from kvcli.storage import Reader, Writer, verify, write_snapshot

TINY: dict[str, Any] = {"layers": 1, "heads": 2, "q_heads": 2, "tokens": 3, "dim": 1, "stats": False, "ragged": True}


def rebuilt(raw: bytes, metadata: dict[str, str], **tensors: Tensor) -> bytes:
    """The same file with other tensors or metadata, all its digests right."""
    header = read_header(io.BytesIO(raw))
    data = {entry.name: raw[entry.start : entry.end] for entry in header.entries[:-1]}
    specs = {entry.name: Spec(entry.name, entry.dtype, entry.shape) for entry in header.entries[:-1]}
    for name, tensor in tensors.items():
        specs[name] = spec_of(name, tensor)
        data[name] = tensor.view(-1).view(torch.uint8).numpy().tobytes()
    head = encode_header(with_digest(list(specs.values())), {**header.metadata, **metadata})
    return b"".join([head, *data.values(), *(xxh3_128(part).digest() for part in [*data.values(), head])])


def read_all(source: Any) -> None:
    with Reader(source) as reader:
        snapshot = reader.snapshot()
        assert len(snapshot.rows[:]) == len(snapshot.stats[:])
        reader.verify()


@settings(max_examples=12, deadline=None)
@given(
    st.tuples(st.integers(1, 3), st.integers(1, 3), st.just(6), st.integers(1, 9), st.sampled_from([1, 3, 8])),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
    st.tuples(*[st.booleans()] * 3),
)
def test_round_trip(sizes: tuple[int, ...], dtype: torch.dtype, kind: tuple[bool, ...]) -> None:
    snapshot = make_snapshot(*sizes, dtype, *kind)
    raw = packed(snapshot)
    assert raw == packed(make_snapshot(*sizes, dtype, *kind))
    back = opened(io.BytesIO(raw))
    same_snapshot(snapshot, back)
    assert packed(back) == raw


@pytest.mark.parametrize("block", [1, 7, 64])
def test_tensors_larger_than_a_block(tmp_path: Path, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, path = packed(make_snapshot()), tmp_path / "a"
    monkeypatch.setattr(storage, "BLOCK", block)
    write_snapshot(make_snapshot(), path)
    assert path.read_bytes() == whole
    same_snapshot(opened(path), make_snapshot())
    verify(path)


@pytest.mark.parametrize("ragged", [False, True])
def test_any_safetensors_reader_opens_it(tmp_path: Path, ragged: bool) -> None:
    snapshot = make_snapshot(ragged=ragged, bias=True, dim=5)
    path = tmp_path / "a.kv.safetensors"
    write_snapshot(snapshot, path)
    assert path.read_bytes() == packed(snapshot)
    same_snapshot(snapshot, opened(path))
    tensors = load_file(path)
    for i, rows in enumerate(snapshot.rows):
        assert torch.equal(tensors[f"L00{i}.k"].reshape(rows.k.shape), rows.k)
        assert torch.equal(tensors[f"L00{i}.bias"].flatten(), rows.bias)
        assert (f"L00{i}.len" in tensors) == (not rows.uniform)
    assert verify(path) == {"tensors": len(tensors), "bytes": path.stat().st_size, "ok": True}


def test_positions_and_features_are_stored_only_where_needed() -> None:
    plain = opened(io.BytesIO(packed(make_snapshot()))).meta
    assert plain.requires == ()
    both = opened(io.BytesIO(packed(make_snapshot(ragged=True, bias=True)))).meta
    assert both.requires == ("bias", "ragged", "span")
    assert b"L000.pos" not in packed(make_snapshot()) and b"L000.pos" in packed(make_snapshot(ragged=True))


@pytest.mark.parametrize("part", range(8))
def test_every_flipped_byte_is_noticed(part: int) -> None:
    raw = packed(make_snapshot(**TINY))
    for i in range(part, len(raw), 8):
        damaged = bytearray(raw)
        damaged[i] ^= 1 << (i // 8 % 8)
        with pytest.raises(FormatError):
            read_all(io.BytesIO(damaged))


@pytest.mark.parametrize("part", range(8))
def test_every_truncation_is_noticed(tmp_path: Path, part: int) -> None:
    raw = packed(make_snapshot(**TINY))
    path = tmp_path / "a"
    path.write_bytes(raw)
    for i in reversed(range(part, len(raw), 8)):
        os.truncate(path, i)
        with pytest.raises(FormatError):
            Reader(path)


def test_damage_is_named(tmp_path: Path) -> None:
    path, raw = tmp_path / "a", packed(make_snapshot())
    entry = read_header(io.BytesIO(raw)).by_name["L001.v"]
    damaged = raw[: entry.start] + bytes([raw[entry.start] ^ 1]) + raw[entry.start + 1 :]
    path.write_bytes(damaged)
    snapshot = opened(path)
    _ = snapshot.rows[0]
    for look in (lambda: snapshot.rows[1], lambda: verify(path)):
        with pytest.raises(FormatError, match=r"L001\.v"):
            look()
    for content, words in ((raw + b"x", "more bytes"), (raw[:-5], "5 bytes are missing"), (b"", "empty")):
        path.write_bytes(content)
        for source in (path, io.BytesIO(content)):
            with pytest.raises(FormatError, match=words):
                Reader(source)


def test_a_file_that_shrinks_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_snapshot(make_snapshot(), path)
    snapshot = opened(path)
    os.truncate(path, 2000)
    with pytest.raises(FormatError, match="shorter"):
        _ = snapshot.rows[1]


WRONG = {
    "lengths too many": ("L000.len", [3, 3]),
    "lengths too few": ("L000.len", [1, 2]),
    "a head of none": ("L000.len", [0, 4]),
    "a negative length": ("L000.len", [-1, 5]),
    "positions that fall": ("L000.pos", [1, 0, 2, 1]),
    "a position twice": ("L000.pos", [0, 1, 1, 2]),
    "a position below 0": ("L000.pos", [0, -1, 1, 2]),
    "a position beyond the end": ("L000.pos", [0, 1, 2, 3]),
}


@pytest.mark.parametrize("case", WRONG)
def test_impossible_entries_are_refused(case: str) -> None:
    name, numbers = WRONG[case]
    raw = packed(make_snapshot(**TINY))  # heads of 1 and 3 entries
    read_all(io.BytesIO(rebuilt(raw, {})))
    raw = rebuilt(raw, {}, **{name: torch.tensor(numbers, dtype=torch.int32)})
    looks: list[Callable[[], Any]] = [lambda: verify(io.BytesIO(raw)), lambda: opened(io.BytesIO(raw)).rows[0]]
    for look in looks:
        with pytest.raises(FormatError, match=name):
            look()


def test_newer_files() -> None:
    raw = packed(make_snapshot())
    for metadata in ({"kvcli.format": "2.0"}, {"kvcli.requires": '["magic"]'}, {"kvcli.encode": "magic"}):
        with pytest.raises(FormatError):
            Reader(io.BytesIO(rebuilt(raw, metadata)))
    more = {"something": torch.arange(3.0), "L000.stat.new": torch.ones((), dtype=torch.bool), "stat.x": torch.empty(0)}
    snapshot = opened(io.BytesIO(rebuilt(raw, {"kvcli.format": "1.9", "kvcli.hint": "x", "tool": "y"}, **more)))
    again = opened(io.BytesIO(packed(snapshot)))
    assert again.meta.unknown == {"kvcli.hint": "x", "tool": "y"}
    assert set(again.extra) == {*make_snapshot().extra, *more}
    assert all(torch.equal(again.extra[name], tensor) for name, tensor in more.items())


def test_an_encoded_layer_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {
        "shapes": lambda lens, layout: {f"{s}.q": ("F32", (sum(lens), layout.head_dim)) for s in "kv"},
        "decode": lambda payload, lens: (payload["k.q"], payload["v.q"]),
    }
    stage = registry.Stage("encode", "widened", lambda: None, parts=parts)
    monkeypatch.setitem(registry._table, ("encode", "widened"), stage)
    snapshot = make_snapshot(ragged=True)
    meta, pos = replace(snapshot.meta, encode="widened", requires=("ragged",)), frozenset({"pos"})
    specs, tensors = [spec_of("ids", snapshot.ids)], {"ids": snapshot.ids}
    for i, rows in enumerate(snapshot.rows):
        specs += layer_specs(i, rows.lens.tolist(), meta, pos, Stats())
        tensors |= layer_tensors(i, {"k.q": rows.k.float(), "v.q": rows.v.float()}, rows, pos, Stats())
    out = io.BytesIO()
    with Writer(out, specs, meta) as writer:
        for name, tensor in tensors.items():
            writer.put(name, tensor)
    assert writer.size == len(out.getvalue())
    back = opened(io.BytesIO(out.getvalue()))
    same(back.rows[1], snapshot.rows[1])
    with pytest.raises(FormatError, match=r"L000\.k\.q"):
        opened(io.BytesIO(rebuilt(out.getvalue(), {}, **{"L000.k.q": torch.zeros(3)})))
    encoder.cache_clear()


def test_parts_are_filled_in_but_never_lost() -> None:
    rows = make_snapshot().rows[0]
    found = dict(layer_tensors(0, {}, rows, frozenset({"bias", "span"}), Stats()))
    assert torch.equal(found["L000.bias"], torch.zeros(2, 13)) and (found["L000.span"] == 1).all()
    with pytest.raises(ValueError, match="bias"):
        layer_tensors(0, {}, make_snapshot(bias=True).rows[0], frozenset(), Stats())


def test_reading_is_lazy_and_of_one_copy(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_snapshot(make_snapshot(layers=3), path)
    with Reader(path) as reader:
        snapshot = reader.snapshot()
        with ThreadPoolExecutor(4) as pool:
            for i, rows in enumerate(pool.map(lambda i: snapshot.rows[i % 3], range(24))):
                same(rows, make_snapshot(layers=3).rows[i % 3])
        k = snapshot.rows[-1].k
        assert k.untyped_storage().nbytes() == k.nbytes and k.is_contiguous()
        same(snapshot.rows[1:][0], snapshot.rows[1])
        with pytest.raises(IndexError):
            _ = snapshot.rows[3]
    with pytest.raises(ValueError, match="closed"):
        _ = snapshot.rows[0]


def test_digest_tells_contents_apart() -> None:
    a, b, c = (Reader(io.BytesIO(packed(make_snapshot(seed=seed)))).digest for seed in (0, 0, 1))
    assert a == b != c and len(a) == 32


def test_tensors_must_be_as_announced(tmp_path: Path) -> None:
    ids, meta = make_snapshot().ids, make_snapshot().meta
    specs = [spec_of("ids", ids), spec_of("x", ids)]
    for given_ in ([("x", ids)], [("ids", ids.long())], [("ids", ids[1:])], [("ids", ids)], [("ids", ids)] * 3):
        with pytest.raises(ValueError, match=r"expected|never put"), Writer(tmp_path / "a", specs, meta) as out:
            for name, tensor in given_:
                out.put(name, tensor)
    assert not list(tmp_path.iterdir())


def test_any_strides_are_written(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(12.0).view(3, 4).T, "b": torch.ones(1).expand(5), "c": torch.tensor(3.0)}
    tensors["d"] = torch.zeros(0, 3, requires_grad=True)
    with Writer(tmp_path / "a", [spec_of(*item) for item in tensors.items()], make_snapshot().meta) as out:
        for item in tensors.items():
            out.put(*item)
    back = load_file(tmp_path / "a")
    assert all(torch.equal(back[name], tensor) for name, tensor in tensors.items())
