"""Every op against its definition in float64, its twin against its reference, and what is peculiar to one."""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvcli.kernels import runs
from kvcli.kernels.adjacent import adjacent_cosine
from kvcli.kernels.attention import causal_attention, join, ragged_attention
from kvcli.kernels.mass import attention_mass
from kvcli.kernels.op import Op
from kvcli.kernels.runs import merge_runs
from kvcli.kernels.table import OPS
from kvcli.kernels.window import window_scores

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Relative RMS error by the dtype of a result: half a unit in its last place.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.int64: 0.0}
# With 16-bit inputs the flash call takes a quick exponential, and its LSE is float32 all the same.
QUICK = {**EXACT, torch.float32: 2e-5}
CASES = [pytest.param(op, case, id=f"{op.name}-{i}") for op in OPS for i, case in enumerate(op.cases)]
GROUPED = ("q", "lse")  # arguments by query head
Results = list[Tensor]


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


def results(fn: Callable[..., Any], args: tuple[Any, ...]) -> Results:
    out = fn(*args)
    return [out] if isinstance(out, Tensor) else list(out)


def error(got: Tensor, want: Tensor) -> float:
    """Relative RMS difference; infinite where infinities or shapes differ."""
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if got.shape != want.shape or not torch.equal(got[~finite], want[~finite]):
        return math.inf
    return float((got - want)[finite].norm() / want[finite].norm().clamp(min=1e-30))


def check(got: Results, want: Results, tolerance: Mapping[torch.dtype, float]) -> None:
    assert len(got) == len(want)
    for one, other in zip(got, want, strict=True):
        assert error(one, other) <= tolerance[one.dtype]


def softmax(logit: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return logit.softmax(-1).nan_to_num() @ v, logit.logsumexp(-1)


def naive_adjacent_cosine(k: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(k, dim=-1)
    return torch.einsum("htd,htd->ht", unit[:, 1:], unit[:, :-1])


def naive_attention_mass(q: Tensor, k: Tensor, lse: Tensor, scale: float, causal: bool) -> Tensor:
    mass = torch.einsum("hgmd,htd->hgmt", q.unflatten(0, (len(k), -1)), k).mul(scale).flatten(0, 1) - lse[..., None]
    mass = mass.exp().tril() if causal else mass.exp()
    return mass.sum(1).unflatten(0, (len(k), -1)).mean(1)


def naive_causal_attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    G = len(q) // len(k)
    logit = q @ k.repeat_interleave(G, 0).mT * scale
    future = torch.ones_like(logit, dtype=torch.bool).triu(1)
    return softmax(logit.masked_fill(future, -math.inf), v.repeat_interleave(G, 0))


def naive_dense_attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    G = len(q) // len(k)
    logit = q @ k.repeat_interleave(G, 0).mT * scale
    logit = logit if bias is None else logit + bias.repeat_interleave(G, 0)[:, None]
    return softmax(logit, v.repeat_interleave(G, 0))


def naive_ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, lens: list[int], bias: Tensor | None, scale: float
) -> Results:
    head = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    group = torch.arange(len(q)) // (len(q) // len(lens))
    logit = q @ k.T * scale + (0 if bias is None else bias)
    return list(softmax(logit.masked_fill((head != group[:, None])[:, None], -math.inf), v))


def naive_window_scores(q: Tensor, q_pos: Tensor, k: Tensor, pos: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    head = torch.arange(len(q)) // (len(q) // len(k))
    logit = q @ k[head].mT * scale
    logit = logit if bias is None else logit + bias[head, None]
    seen = (pos[head, None] >= 0) & (pos[head, None] <= q_pos[:, None])
    received = softmax(logit.masked_fill(~seen, -math.inf), torch.eye(k.shape[1]).double())[0].sum(1)
    return received.unflatten(0, (len(k), -1)).mean(1)


def naive_merge_runs(k: Tensor, v: Tensor, mass: Tensor, start: Tensor) -> Results:
    rows = []
    for h in range(len(k)):
        for i, j in pairwise([*start[h].nonzero().flatten().tolist(), k.shape[1]]):
            p = max(range(i, j), key=lambda t: (float(mass[h, t]), -t))
            dist = (k[h, i:j] - k[h, p]).norm(dim=-1)
            sigma = max(float(dist.sum()) / max(j - i - 1, 1), 1e-6 * float(k[h, p].norm()))
            weight = torch.exp(-(dist**2) / (2 * sigma**2))
            weight /= weight.sum()
            rows.append((weight @ k[h, i:j], weight @ v[h, i:j], torch.tensor(p), torch.tensor(j - i)))
    new_k, new_v, pivot, size = (torch.stack(part) for part in zip(*rows, strict=True))
    return [new_k, new_v, start.sum(1), pivot, size]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_reference_is_the_definition(op: Op, case: Mapping[str, Any], dtype: torch.dtype) -> None:
    args = op.inputs(case, dtype, seed=1)
    wide = tuple(arg.double() if isinstance(arg, Tensor) and arg.is_floating_point() else arg for arg in args)
    naive = globals()[f"naive_{op.name}"]
    check(results(op.ref, args), results(naive, wide), EXACT)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_twin_is_the_reference(op: Op, case: Mapping[str, Any], dtype: torch.dtype) -> None:
    args = op.inputs(case, dtype, seed=2)
    once, want = results(op, args), results(op.ref, args)
    assert [part.dtype for part in once] == [part.dtype for part in want]
    check(once, want, EXACT if dtype is torch.float32 else QUICK)
    assert all(map(torch.equal, once, results(op, args)))


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_strides_do_not_matter(op: Op) -> None:
    args = op.inputs(op.cases[2], torch.float32, seed=3)
    sparse = [torch.stack([arg, arg.roll(1, 0)], -1)[..., 0] if isinstance(arg, Tensor) else arg for arg in args]
    dense = [arg.contiguous() if isinstance(arg, Tensor) else arg for arg in args]
    check(results(op, tuple(sparse)), results(op, tuple(dense)), EXACT)


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_permuting_kv_heads_permutes_the_results(op: Op) -> None:
    case = next(case for case in reversed(op.cases) if case.get("H", len(case.get("lens", ""))) > 1)
    args = dict(zip(inspect.signature(op.ref).parameters, op.inputs(case, torch.float32, seed=4), strict=False))
    H = len(args["lens"]) if "lens" in args else len(args["k"])
    order, lens = torch.arange(H).roll(1), args.get("lens")

    def permute(part: Tensor, flat: list[int] | None) -> Tensor:
        if flat is not None:
            return torch.cat([torch.split(part, flat)[h] for h in order])
        return part.unflatten(0, (H, -1))[order].flatten(0, 1)

    moved = dict(args)
    for name, arg in args.items():
        if isinstance(arg, Tensor) and name != "q_pos":
            moved[name] = permute(arg, None if name in GROUPED else lens)
    if lens:
        moved["lens"] = [lens[h] for h in order]
    got, want = results(op, tuple(moved.values())), results(op, tuple(args.values()))
    flat = want[2].tolist() if op is merge_runs else None
    check(got, [permute(part, None if len(part) in (H, len(args.get("q", ""))) else flat) for part in want], EXACT)


def test_mass_of_two_chunks_is_the_mass_of_the_whole() -> None:
    q, k, _, scale, _ = attention_mass.inputs({"H": 2, "G": 3, "T": 129, "D": 64}, torch.bfloat16, seed=0)
    _, lse = causal_attention(q, k, k, scale)
    whole = attention_mass(q, k, lse, scale, True)
    chunks = torch.zeros_like(whole)
    for a, b in ((0, 65), (65, 129)):
        chunks[:, a:b] += attention_mass(q[:, a:b], k[:, a:b], lse[:, a:b], scale, True)
        chunks[:, :a] += attention_mass(q[:, a:b], k[:, :a], lse[:, a:b], scale, False)
    assert error(chunks, whole) < 2e-5
    assert error(whole.sum(1), torch.full((2,), 129.0)) < 2e-5


@pytest.mark.parametrize(("dtype", "tolerance"), list(zip(DTYPES, (1e-4, 1e-3, 1e-3), strict=True)), ids=str)
def test_mass_survives_large_logits(dtype: torch.dtype, tolerance: float) -> None:
    q, k, _, scale, _ = attention_mass.inputs({"H": 1, "G": 2, "T": 65, "D": 64}, dtype, seed=0)
    q, k = q * 16, k * 16
    _, lse = causal_attention(q.float(), k.float(), k.float(), scale)
    assert lse.max() > 400
    args = (q, k, lse, scale, True)
    assert error(attention_mass(*args), attention_mass.ref(*args)) < tolerance


@pytest.mark.parametrize("run", [attention_mass.ref, attention_mass], ids=["ref", "cpu"])
@pytest.mark.parametrize("causal", [False, True])
def test_mass_ignores_queries_that_see_nothing(run: Callable[..., Tensor], causal: bool) -> None:
    q, k, lse, scale, _ = attention_mass.inputs({"H": 2, "G": 2, "T": 9, "D": 16}, torch.float32, seed=0)
    lse[:, [1, 5]] = -math.inf
    blind = lse.clone()
    blind[:, [1, 5]] = math.inf
    assert error(run(q, k, lse, scale, causal), run(q, k, blind, scale, causal)) < 1e-6
    assert not run(q, k, torch.full_like(lse, -math.inf), scale, causal).any()
    assert not run(q[:, :0], k, lse[:, :0], scale, False).any()
    assert run(q, k[:, :0], lse, scale, False).shape == (2, 0)


@pytest.mark.parametrize("run", [adjacent_cosine.ref, adjacent_cosine], ids=["ref", "cpu"])
def test_cosine_of_equal_opposite_and_zero_keys(run: Callable[..., Tensor]) -> None:
    key = torch.randn(1, 1, 77, generator=torch.Generator().manual_seed(0)).bfloat16()
    cosine = run(torch.cat([key, key, 4 * key, -key, 0 * key, 0 * key, key], 1))
    assert cosine.tolist() == [[1, 1, -1, 0, 0, 0]]


@pytest.mark.parametrize("run", [window_scores.ref, window_scores], ids=["ref", "cpu"])
def test_window_scores_count_the_queries_that_see(run: Callable[..., Tensor]) -> None:
    q, _, k, pos, bias, scale = window_scores.inputs(
        {"H": 2, "G": 3, "W": 4, "T": 9, "D": 16, "bias": True}, torch.float32, seed=0
    )
    pos[0, 2:], k[0, 2:] = -1, math.nan  # padding is not read
    score = run(q, torch.tensor([0, 1, 2, 17]), k, pos, bias, scale)  # the first query sees nothing
    assert error(score.sum(1), torch.tensor([3.0, 3.0])) < 1e-6
    assert not score[pos < 0].any()
    assert not run(q[:, :0], torch.tensor([]), k, pos, bias, scale).any()


RUNS = [pytest.param(merge_runs.ref, id="ref"), pytest.param(merge_runs, id="cpu")]


def merge_one(run: Callable[..., Any], k: Tensor, v: Tensor, pivot: int = 0, **options: Any) -> tuple[Tensor, Tensor]:
    """The key and value of a single run."""
    mass, start = torch.zeros(1, len(k)), torch.zeros(1, len(k), dtype=torch.bool)
    mass[0, pivot], start[0, 0] = 1.0, True
    new_k, new_v, *_ = run(k[None], v[None], mass, start, **options)
    return new_k[0], new_v[0]


def weights(run: Callable[..., Any], keys: list[float], sigma: str | float = "mean") -> Tensor:
    return merge_one(run, torch.tensor(keys)[:, None], torch.eye(len(keys)), sigma=sigma)[1]


def close(got: Tensor, want: list[float], places: float = 1e-5) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=torch.float32), atol=places, rtol=0)


@pytest.mark.parametrize("run", RUNS)
def test_runs_of_the_worked_example(run: Callable[..., Any]) -> None:
    angle = torch.tensor([0.0, 10, 12, 80, 85, 90, 95, 170]).deg2rad()
    k, v = torch.stack([angle.cos(), angle.sin()], -1)[None], torch.arange(8.0)[None, :, None]
    mass = torch.tensor([[3, 0.2, 0.5, 0.1, 0.4, 0.3, 0.1, 0.6]])
    start = torch.tensor([[1, 1, 0, 1, 1, 0, 0, 1]]).bool()
    new_k, new_v, lens, pivot, size = run(k, v, mass, start)
    assert (lens.tolist(), pivot.tolist(), size.tolist()) == ([5], [0, 2, 3, 4, 7], [1, 2, 1, 3, 1])
    close(new_k[1], [0.98066, 0.19498])
    close(new_k[3], [0.02320, 0.99757])
    close(new_v[:, 0], [0, 1.62246, 3, 4.73386, 7])


@pytest.mark.parametrize("run", RUNS)
def test_weights_of_every_rule(run: Callable[..., Any]) -> None:
    keys = [0.0, 3.0, 4.0]
    close(weights(run, keys, 5), [0.39041, 0.32610, 0.28349])
    close(weights(run, keys, 3.5), [0.45187, 0.31295, 0.23518])
    close(weights(run, keys, "mean"), [0.45187, 0.31295, 0.23518])
    close(weights(run, keys, "rms"), weights(run, keys, math.sqrt(12.5)).tolist())
    close(weights(run, keys, "literal"), [1, 0, 0])
    close(weights(run, [0.0, 0.5, 0.5], "literal"), [0.4322, 0.2839, 0.2839], 5e-5)
    close(weights(run, [7.0] * 3, "literal"), [1 / 3] * 3)
    close(weights(run, keys, 1e-3), [1, 0, 0])
    close(weights(run, keys, 1e6), [1 / 3] * 3)
    close(weights(run, [1.5, -8.0]), [0.62246, 0.37754])  # two members: whatever their distance
    with pytest.raises(ValueError, match="sigma=median"):
        weights(run, keys, "median")


@pytest.mark.parametrize("sigma", ["mean", "rms", "literal", 5.0, 0.0])
@pytest.mark.parametrize("run", RUNS)
def test_equal_keys_merge_to_themselves(run: Callable[..., Any], sigma: str | float) -> None:
    for key in (0.0, -3.25):
        new_k, new_v = merge_one(run, torch.full((7, 5), key), torch.arange(7.0)[:, None], 3, sigma=sigma)
        close(new_k, [key] * 5)
        close(new_v, [3.0])


@pytest.mark.parametrize("sigma", ["mean", "rms"])
@pytest.mark.parametrize("run", RUNS)
def test_weights_ignore_the_scale_of_keys(run: Callable[..., Any], sigma: str) -> None:
    keys = torch.randn(9, 64, generator=torch.Generator().manual_seed(0))
    _, small = merge_one(run, keys * 2**-20, torch.eye(9), 4, sigma=sigma)
    _, large = merge_one(run, keys, torch.eye(9), 4, sigma=sigma)
    assert torch.equal(small, large)
    assert small.argmax() == 4
    close(small.sum(0, True), [1.0], 1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", RUNS)
def test_single_entries_are_copied_and_padding_is_not_read(run: Callable[..., Any], dtype: torch.dtype) -> None:
    k, v, mass, start = merge_runs.inputs({"H": 4, "T": 33, "D": 8, "Dv": 8, "share": 0.6}, dtype, seed=0)
    k[:, ::3] = -0.0
    v[0, 0, 0] = math.inf
    real = torch.arange(33) < torch.tensor([[33], [20], [0], [1]])
    start[0, 1] = True
    want = merge_runs.ref(k, v, mass, start & real, real=real)
    padding = (k, v, mass)
    for part in padding:
        part[~real] = math.nan
    start |= ~real
    new_k, new_v, lens, pivot, size = run(k, v, mass, start, real=real)
    assert lens.tolist() == (start & real).sum(1).tolist()
    check([new_k, new_v, lens, pivot, size], list(want), EXACT)
    head, bits = torch.arange(4).repeat_interleave(lens), torch.int32 if dtype is torch.float32 else torch.int16
    for old, new in ((k, new_k), (v, new_v)):
        assert torch.equal(old[head, pivot][size == 1].view(bits), new[size == 1].view(bits))


def test_blocks_of_runs_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    args = merge_runs.inputs({"H": 3, "T": 129, "D": 16, "Dv": 8, "share": 0.2}, torch.float32, seed=0)
    whole = results(merge_runs, args)
    monkeypatch.setattr(runs, "BLOCK", 10)
    assert all(map(torch.equal, whole, results(merge_runs, args)))


@pytest.mark.parametrize("lens", [[5, 5], [7, 3], torch.tensor([7, 3])], ids=["uniform", "ragged", "tensor"])
def test_attention_stands_extreme_biases_and_logits(lens: Any) -> None:
    q, k, v, _, bias, scale = ragged_attention.inputs(
        {"lens": [5, 5], "G": 2, "M": 1, "D": 16, "bias": True}, torch.float32, seed=0
    )
    bias[1:] = -1e9
    k = k * (k @ q[0, 0]).sign()[:, None] * 1e4
    got, want = (run(q, k, v, lens, bias, scale) for run in (ragged_attention, ragged_attention.ref))
    assert want[1].max() > 1e4
    check(list(got), list(want), EXACT)
    assert error(got[0][:2], v[0].expand(2, 1, 16)) < 1e-6


@pytest.mark.parametrize(("dtype", "tolerance"), list(zip(DTYPES, (1e-6, 1e-2, 2e-3), strict=True)), ids=str)
def test_joined_parts_are_the_whole(dtype: torch.dtype, tolerance: float) -> None:
    q, k, v, lens, bias, scale = ragged_attention.inputs(
        {"lens": [130], "G": 3, "M": 2, "D": 64, "bias": True}, dtype, seed=0
    )
    cuts = pairwise([0, 0, 1, 64, 130, 130])
    parts = [ragged_attention(q, k[a:b], v[a:b], [b - a], bias[a:b], scale) for a, b in cuts]
    whole, joined = ragged_attention(q, k, v, lens, bias, scale), join(parts)
    assert joined[0].dtype == dtype
    assert error(joined[0], whole[0]) < tolerance
    assert error(joined[1], whole[1]) < QUICK[torch.float32]
    nothing = join([parts[0], parts[4]])
    assert not nothing[0].any()
    assert bool((nothing[1] == -math.inf).all())
