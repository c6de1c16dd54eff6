"""Attention over codes: any scales and widths, memory while it reads, and resuming without opening the cache."""

from collections.abc import Callable
from operator import attrgetter

import pytest
import torch
from compare import DTYPES, EXACT, QUICK, check, results

from kvcli.codes import quantised
from kvcli.kernels.codes import Codes
from kvcli.kernels.op import Fn, Op
from kvcli.kernels.packed import packed_attention


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
    assert max(opened) == 1024 and sum(opened) == 2 * 9096
    monkeypatch.undo()
    check(found, results(packed_attention.ref, args), {**EXACT, torch.float32: 2e-5})
