"""What no digest can tell: a file whose bytes are as they were written, but whose numbers cannot be a memory."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from make import make_snapshot, opened, packed
from test_storage import rebuilt
from torch import Tensor

from kvcli.errors import FormatError
from kvcli.header import read_header
from kvcli.snapshot import check_finite
from kvcli.storage import Reader, verify


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [1, 5, 64, 1003])
def test_a_number_that_is_none_is_found_wherever_it_stands(dtype: torch.dtype, bad: float, n: int) -> None:
    numbers = torch.randn(n, generator=torch.Generator().manual_seed(n)).to(dtype)
    check_finite(3, k=numbers, v=None, bias=numbers[:0])
    for at in range(0, n, max(1, n // 5)):
        part = numbers.clone()
        part[at] = bad
        with pytest.raises(FormatError, match="layer 3: v "):
            check_finite(3, k=numbers, v=part)


@pytest.mark.parametrize("part", ["k", "v", "bias"])
def test_reading_names_the_layer_that_is_not_finite(part: str) -> None:
    snapshot = make_snapshot(ragged=True, bias=True)
    tensor = getattr(snapshot.rows[1], part).clone()
    tensor.view(-1)[-1] = torch.nan
    raw = packed(replace(snapshot, rows=[snapshot.rows[0], replace(snapshot.rows[1], **{part: tensor})]))
    _ = opened(io.BytesIO(raw)).rows[0]
    for look in (lambda: opened(io.BytesIO(raw)).rows[1], lambda: verify(io.BytesIO(raw))):
        with pytest.raises(FormatError, match=f"layer 1: {part} "):
            look()


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


IMPOSSIBLE: dict[str, tuple[str, Tensor]] = {
    "a span of nothing": ("L001.span", zeros(21, dtype=torch.int32)),
    "ids below 0": ("ids", torch.full((13,), -1, dtype=torch.int32)),
    "other ids": ("ids", torch.arange(13, dtype=torch.int32)),
    "queries in whole numbers": ("L000.stat.q_last", zeros(4, 4, 8, dtype=torch.int16)),
    "queries without positions": ("L000.stat.q_last_pos", zeros(3, dtype=torch.int32)),
    "positions in fractions": ("L000.stat.q_probe_pos", zeros(4)),
    "attention of fewer tokens": ("L001.stat.attn_mass", zeros(2, 12)),
    "a probe of three axes": ("stat.probe_k", zeros(2, 2, 8)),
    "a probe longer than the text": ("stat.probe_k", zeros(2, 2, 14, 8)),
    "a probe of other heads": ("stat.probe_v", zeros(2, 3, 8, 8)),
}


@pytest.mark.parametrize("case", IMPOSSIBLE)
def test_impossible_tensors_are_refused_by_name(case: str) -> None:
    name, tensor = IMPOSSIBLE[case]
    snapshot = make_snapshot(ragged=True, bias=True)
    raw = packed(snapshot)
    tensor = tensor[: len(snapshot.rows[1].pos)] if "span" in name else tensor
    with pytest.raises(FormatError, match=name.removesuffix("_pos")):
        verify(io.BytesIO(rebuilt(raw, {}, **{name: tensor})))


METADATA: list[tuple[str, str, Any]] = [
    ("layout", "scale", 0),
    ("layout", "scale", -1.0),
    ("layout", "scale", float("nan")),
    ("layout", "scale", float("inf")),
    ("layout", "scale", 10**400),
    ("layout", "softcap", 0.0),
    ("layout", "softcap", float("nan")),
    ("layout", "kinds", ["full", "elsewhere"]),
    ("layout", "kinds", [["full"], "full"]),
    ("seq", "lead", -1),
    ("seq", "lead", 14),
]


@pytest.mark.parametrize(("part", "key", "value"), METADATA)
def test_impossible_metadata_is_refused_by_name(part: str, key: str, value: Any) -> None:
    raw = packed(make_snapshot())
    table = json.loads(read_header(io.BytesIO(raw)).metadata[f"kvcli.{part}"])
    with pytest.raises(FormatError) as caught:
        Reader(io.BytesIO(rebuilt(raw, {f"kvcli.{part}": json.dumps({**table, key: value})})))
    assert key in caught.value.why


def test_verifying_reads_every_tensor_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    read: Callable[..., None] = Reader._read
    monkeypatch.setattr(Reader, "_read", lambda self, entry, into: (seen.append(entry.name), read(self, entry, into)))
    progress: list[float] = []
    with Reader(io.BytesIO(packed(make_snapshot(ragged=True, bias=True)))) as reader:
        for _ in range(2):
            reader.verify(lambda done, total: progress.append(done / total))
        assert set(seen) == set(reader.header.by_name)
    big = [name for name in seen if name.endswith((".k", ".v"))]
    assert len(big) == len(set(big))
    assert progress[:3] == sorted(progress[:3]) and progress[-1] == 1


@pytest.mark.parametrize("feature", ["bias", "ragged", "span"])
def test_features_that_are_used_must_be_named(feature: str) -> None:
    raw = packed(make_snapshot(ragged=True, bias=True))
    named = [name for name in ("bias", "ragged", "span") if name != feature]
    with pytest.raises(FormatError) as caught:
        Reader(io.BytesIO(rebuilt(raw, {"kvcli.requires": json.dumps(named)})))
    assert feature in caught.value.why
