"""Attention over codes: any scales and widths, memory while it reads, and resuming without opening the cache."""

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import Any

import pytest
import torch
from compare import DTYPES, EXACT, QUICK, check, results
from test_architectures import build

import kvcli
from kvcli.codes import Coded, quantised
from kvcli.errors import KvError
from kvcli.kernels.codes import Codes
from kvcli.kernels.op import Fn, Op
from kvcli.kernels.packed import packed_attention
from kvcli.model.answer import Sampling, answer
from kvcli.model.batch import answers
from kvcli.model.extend import extend
from kvcli.model.load import Model, load
from kvcli.model.prefix import Prefix, logits


@pytest.fixture(params=["cpu", "fused"])
def twin(request: pytest.FixtureRequest) -> Callable[[Op], Fn]:
    if request.param == "fused":
        pytest.importorskip("triton", reason="no Triton for this system")
        request.getfixturevalue("interpreted")
    return attrgetter(request.param)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("bits_k", "bits_v", "group", "D"),
    [(2, 4, 32, 64), (8, 2, 20, 48), (4, 8, 64, 40), (4, 4, 16, 256), (8, 8, 96, 24)],
)
def test_numbers_as_they_come(
    bits_k: int, bits_v: int, group: int, D: int, dtype: torch.dtype, twin: Callable[[Op], Fn]
) -> None:
    rng = torch.Generator().manual_seed(0)
    lens = [2 * group, 0, group]
    q, k, v = (torch.randn(*shape, generator=rng) * 3 for shape in ((6, 5, D), (3 * group, D), (3 * group, D)))
    bias = torch.randn(3 * group, generator=rng)
    args = (q.to(dtype), quantised(k, bits_k, group, 1), quantised(v, bits_v, 1, group), lens, bias, D**-0.5)
    check(results(twin(packed_attention), args), results(packed_attention.ref, args), {**QUICK, torch.float32: 3e-6})


def test_only_a_block_is_open_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    args = packed_attention.inputs(
        {"lens": [4096, 5000], "G": 2, "M": 1, "D": 16, "bits": 8, "group": 0, "bias": True}, torch.bfloat16, 0
    )
    opened, rows = [0], Codes.rows
    monkeypatch.setattr(Codes, "rows", lambda self, *at: (opened.append(at[1] - at[0]), rows(self, *at))[1])
    found = results(packed_attention.cpu, args)
    assert max(opened) == 2048 and sum(opened) == 2 * 9096
    monkeypatch.undo()
    check(found, results(packed_attention.ref, args), {**EXACT, torch.float32: 2e-5})


TEXT = "The harbour opened at six. " * 9 + "The new ferry is called Kestrel.\n"
RECIPES = {
    "kivi:bits=2": None,
    "int8": None,
    "snapkv+adakv+kivi:bits_k=8,bits_v=4,group=8,residual=16": "60%",
    "kvmerger+adakv+kivi:first=0,residual=0,group=4": "50%",
    "kvmerger+kivi:bits=2,group=8,residual=8": "50%",
    "snapkv+int8": 40,
}


def held(part: Any) -> int:
    """Bytes of all tensors inside."""
    if isinstance(part, torch.Tensor):
        return part.nbytes
    return sum(held(getattr(part, field.name)) for field in fields(part)) if is_dataclass(part) else 0


def both(full: Any, model: Model, recipe: str, budget: Any) -> tuple[Prefix, Prefix]:
    """The same compressed snapshot as codes and as the rows they stand for."""
    small = kvcli.compress(full, recipe, budget)
    return Prefix.read(small, model), Prefix.read(replace(small, rows=list(small.rows)), model)


@pytest.mark.parametrize("recipe", RECIPES)
def test_resuming_reads_codes_as_they_are(recipe: str, model: Model) -> None:
    full = kvcli.prefill(TEXT, model, raw=True, chunk=64)
    codes, rows = both(full, model, recipe, RECIPES[recipe])
    assert all(isinstance(part, Coded) for part in codes.rows) and not any(isinstance(p, Coded) for p in rows.rows)
    for one, other in zip(codes.rows, rows.rows, strict=True):
        assert held(one) < 0.8 * held(other) and torch.equal(one.lens, other.lens)
    for text in ("?", "What is the new ferry called, and when does the harbour open?"):
        ids = model.tokenizer.encode(text)
        torch.testing.assert_close(logits(model, codes, ids, 1), logits(model, rows, ids, 1), atol=2e-5, rtol=1e-4)
        assert answer(model, codes, ids, Sampling(n=5)).ids == answer(model, rows, ids, Sampling(n=5)).ids
    asked = [model.tokenizer.encode(text) for text in ("a", "bc", "")]
    assert answers(model, codes, asked, [4, 4, 4]) == answers(model, rows, asked, [4, 4, 4])


@pytest.mark.parametrize("recipe", ["kivi:bits=4,group=8,residual=8", "int8"])
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss", "qwen2 sliding"])
def test_windows_and_soft_caps_over_codes(family: str, recipe: str, tmp_path: Path) -> None:
    model = load(str(build(family, tmp_path)), dtype="float32")
    full = kvcli.prefill(TEXT[-90:], model, raw=True)
    assert 0 < len(full.meta.held) < 3 or family == "gpt_oss"
    codes, rows = both(full, model, recipe, None)
    ids = model.tokenizer.encode("What is it called?")
    torch.testing.assert_close(logits(model, codes, ids, 3), logits(model, rows, ids, 3), atol=2e-5, rtol=1e-4)


def test_what_is_appended_to_codes_is_as_behind_their_rows(model: Model) -> None:
    small = kvcli.compress(kvcli.prefill(TEXT, model, raw=True), "snapkv+adakv+kivi:group=8", "60%")
    more = [model.tokenizer.encode("It sails at noon.")] * 2
    found, expected = (extend(model, start, ids) for start, ids in zip((small, decoded(small)), more, strict=True))
    assert found.meta.encode == "raw"
    for one, other in zip(found.rows, expected.rows, strict=True):
        assert torch.equal(one.k, other.k) and torch.equal(one.pos, other.pos)


def decoded(snapshot: Any) -> Any:
    return replace(snapshot, rows=list(snapshot.rows))


def test_a_damaged_scale_is_told_when_codes_are_read(model: Model) -> None:
    reader = kvcli.compress(kvcli.prefill(TEXT, model, raw=True), "kivi:group=8").file
    assert reader is not None
    whole = type(reader)._part
    with pytest.MonkeyPatch.context() as patch:
        part = lambda self, i, name: whole(self, i, name) * (torch.nan if name == "v.zero" else 1)  # noqa: E731
        patch.setattr(
            type(reader),
            "_part",
            lambda self, i, name: part(self, i, name) if name[:2] == "v." else whole(self, i, name),
        )
        with pytest.raises(KvError, match=r"layer 1: v\.zero holds NaN"):
            reader.compact(1)
    assert isinstance(reader.compact(1), Coded) and reader.verify()["ok"]
