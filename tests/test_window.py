"""Window scores and their moments: what holds for all windows, and that no twin loses small deviations."""

from collections.abc import Callable

import pytest
import torch
from compare import error
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvcli.kernels import window
from kvcli.kernels.window import window_scores

pytest.importorskip("triton", reason="no Triton for this system")
pytestmark = pytest.mark.usefixtures("interpreted", "fresh_memory_is_nan")

FAST = settings(
    max_examples=12, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
TWINS = [window_scores.ref, window_scores.cpu, window_scores.fused]


@FAST
@given(
    W=st.integers(1, 40),
    G=st.integers(1, 3),
    T=st.integers(1, 70),
    late=st.integers(-40, 40),
    sink=st.booleans(),
)
def test_windows_of_any_length_anywhere(W: int, G: int, T: int, late: int, sink: bool) -> None:
    case = {"H": 2, "G": G, "W": W, "T": T, "D": 20, "bias": True, "sink": sink, "moments": True}
    q, q_pos, *rest = window_scores.inputs(case, torch.float32, seed=W * T)
    q_pos = (q_pos + late).clamp(max=2 * T)[torch.randperm(W, generator=torch.Generator().manual_seed(0))]
    want = window_scores.ref(q, q_pos, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(window, "LOGITS", 1)  # the CPU takes one query head at a time
        for run in TWINS:
            got = run(q, q_pos, *rest)
            assert all(error(one, other) < 1e-5 for one, other in zip(got, want, strict=True))
            assert torch.equal(run(q, q_pos, *rest[:-1]), got[0])
    total, largest, spread = want
    seen = ((rest[1] >= 0) & (rest[1] <= q_pos[:, None, None])).sum(0)  # [H, T]
    assert bool((largest <= 1).all()) and bool((largest * W >= total - 1e-6).all())
    assert not spread[seen < 2].any() and not want[:, seen == 0].any()


@pytest.mark.parametrize("run", TWINS, ids=["ref", "cpu", "fused"])
def test_small_deviations_are_not_lost(run: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    steady, noise = torch.randn(1, 16, generator=generator), torch.randn(2, 40, 16, generator=generator)
    q, k = steady + 1e-3 * noise, torch.randn(1, 5, 16, generator=generator)
    spread = run(q, torch.full((40,), 9), k, torch.arange(5).int()[None], None, 0.25, None, None, True)[2]
    weight = (q.double() @ k[0].double().T / 4).softmax(-1)  # [2, 40, 5]
    want = weight.var(1, correction=0).mul(40).mean(0, keepdim=True)
    assert float((want / weight.mean((0, 1)) ** 2).max()) < 1e-4  # squares that differ would cancel
    assert error(spread, want) < 1e-3


@pytest.mark.parametrize("run", TWINS, ids=["ref", "cpu", "fused"])
def test_a_loud_head_leaves_the_next_its_own_mean(run: Callable[..., Tensor]) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = 0.1 * torch.randn(2, 40, 16, generator=generator), torch.randn(1, 1, 16, generator=generator)
    q[0], sink = 0.0, torch.tensor([-30.0, 20.0])  # weights of exactly 1, and about 1e-9
    args = (q, torch.full((40,), 9), k, torch.zeros(1, 1, dtype=torch.int32), None, 0.25, None, sink, True)
    weight = (q[1].double() @ k[0, 0].double() / 4 - 20).sigmoid()
    assert error(run(*args)[2], weight.var(correction=0).mul(20).view(1, 1)) < 1e-5
