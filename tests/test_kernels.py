"""Every op against its definition in float64, its twin against its reference, and what is peculiar to one."""

import inspect
import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from operator import attrgetter
from typing import Any

import pytest
import torch
from compare import DTYPES, EXACT, QUICK, Results, check, each, error, results, strided, tolerance
from torch import Tensor
from torch.utils._pytree import tree_leaves

from kvcli.kernels.adjacent import adjacent_cosine
from kvcli.kernels.attention import causal_attention, ragged_attention
from kvcli.kernels.codes import Codes
from kvcli.kernels.dense import count_pieces, dense_attention, join
from kvcli.kernels.mass import attention_mass
from kvcli.kernels.nearest import nearest_key
from kvcli.kernels.op import Fn, Op
from kvcli.kernels.peak import attention_peak
from kvcli.kernels.runs import merge_runs
from kvcli.kernels.table import OPS
from kvcli.kernels.take import take_rows
from kvcli.kernels.window import window_scores

CASES = [pytest.param(op, case, id=f"{op.name}-{i}") for op in OPS for i, case in enumerate(op.cases)]
GROUPED = ("q", "lse", "sink_logit", "tail")  # arguments by head, others may be flat


pytestmark = pytest.mark.usefixtures("fresh_memory_is_nan")


@pytest.fixture(params=["ref", "cpu", "fused"])
def twin(request: pytest.FixtureRequest) -> Callable[[Op], Fn]:
    """One twin of an op, that of a card interpreted."""
    if request.param == "fused":
        pytest.importorskip("triton", reason="no Triton for this system")
        request.getfixturevalue("interpreted")
    return attrgetter(request.param)


def softmax(logit: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return logit.softmax(-1).nan_to_num() @ v, logit.logsumexp(-1)


def naive_adjacent_cosine(k: Tensor) -> Tensor:
    unit = torch.nn.functional.normalize(k, dim=-1)
    return torch.einsum("htd,htd->ht", unit[:, 1:], unit[:, :-1])


def cap(logit: Tensor, softcap: float | None) -> Tensor:
    return logit if softcap is None else softcap * torch.tanh(logit / softcap)


def naive_attention_mass(
    q: Tensor, k: Tensor, lse: Tensor, scale: float, causal: bool, softcap: float | None
) -> Tensor:
    logit = torch.einsum("hgmd,htd->hgmt", q.unflatten(0, (len(k), -1)), k).mul(scale).flatten(0, 1)
    mass = cap(logit, softcap) - lse[..., None]
    mass = mass.exp().tril() if causal else mass.exp()
    return mass.sum(1).unflatten(0, (len(k), -1)).mean(1)


def naive_attention_peak(q: Tensor, k: Tensor, lse: Tensor, scale: float, softcap: float | None) -> Tensor:
    logit = cap(q @ k.repeat_interleave(len(q) // len(k), 0).mT * scale, softcap)
    return torch.stack([(logit - way[..., None]).amax(1) for way in lse])


def naive_banded_attention(
    q: Tensor, q_pos: Tensor, k: Tensor, v: Tensor, pos: Tensor, scale: float, bias: Tensor | None, *rest: Any
) -> Results:
    G, (window, softcap) = len(q) // len(k), rest
    logit = cap(q @ k.repeat_interleave(G, 0).mT * scale, softcap)
    logit = logit if bias is None else logit + bias.repeat_interleave(G, 0)[:, None]
    age = q_pos[:, None] - pos
    seen = (age >= 0) & (age < (window or 10**9))
    return list(softmax(logit.masked_fill(~seen, -math.inf), v.repeat_interleave(G, 0)))


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


def naive_output_error(
    q: Tensor, q_pos: Tensor, before: Any, after: Any, scale: float, softcap: float | None, sink: Tensor | None
) -> Tensor:
    outputs = []
    for k, v, pos, bias in (before, after):
        head = torch.arange(len(q)) // (len(q) // len(k))
        logit = cap(q @ k[head].mT * scale, softcap) + (0 if bias is None else bias[head, None])
        seen = (pos[head, None] >= 0) & (pos[head, None] <= q_pos[:, None])
        logit, values = logit.masked_fill(~seen, -math.inf), v[head]
        if sink is not None:
            logit = torch.cat([logit, sink[:, None, None].expand(-1, len(q_pos), 1)], 2)
            values = torch.nn.functional.pad(values, (0, 0, 0, 1))
        outputs.append(softmax(logit, values)[0])
    full, other = outputs
    return (other - full).norm(dim=-1) / full.norm(dim=-1)


def opened(codes: Codes) -> Tensor:
    e, d = torch.arange(len(codes.q))[:, None], torch.arange(codes.D)
    code, block = codes.q.int()[:, d * codes.bits // 8], (e // codes.gt, d // codes.gc)
    if codes.bits < 8:
        code = code // 2 ** (d * codes.bits % 8) % 2**codes.bits
    return code * codes.scale[block] + (0 if codes.zero is None else codes.zero[block])


def naive_packed_attention(q: Tensor, k: Codes, v: Codes, *rest: Any) -> Results:
    return naive_ragged_attention(q, opened(k), opened(v), *rest, None)


def naive_ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, lens: list[int], bias: Tensor | None, scale: float, tail: Any
) -> Results:
    head = torch.arange(len(lens)).repeat_interleave(torch.tensor(lens))
    if tail is not None:
        k, v = (torch.cat([part, more.flatten(0, 1)]) for part, more in zip((k, v), tail, strict=True))
        head = torch.cat([head, torch.arange(len(lens)).repeat_interleave(tail[0].shape[1])])
        bias = None if bias is None else torch.cat([bias, bias.new_zeros(len(k) - len(bias))])
    group = torch.arange(len(q)) // (len(q) // len(lens))
    logit = q @ k.T * scale + (0 if bias is None else bias)
    return list(softmax(logit.masked_fill((head != group[:, None])[:, None], -math.inf), v))


def naive_window_scores(
    q: Tensor, q_pos: Tensor, k: Tensor, pos: Tensor, bias: Tensor | None, scale: float, *rest: Any
) -> Tensor:
    head, (softcap, sink, moments) = torch.arange(len(q)) // (len(q) // len(k)), rest
    logit = cap(q @ k[head].mT * scale, softcap)
    logit = logit if bias is None else logit + bias[head, None]
    seen = (pos[head, None] >= 0) & (pos[head, None] <= q_pos[:, None])
    logit = logit.masked_fill(~seen, -math.inf)
    if sink is not None:
        logit = torch.cat([logit, sink[:, None, None].expand(-1, logit.shape[1], 1)], 2)
    received = softmax(logit, torch.eye(logit.shape[2]).double())[0][..., : k.shape[1]]  # [Hq, W, T]
    total = received.sum(1).unflatten(0, (len(k), -1)).mean(1)
    if not moments:
        return total
    spread = torch.zeros_like(received[:, 0])
    for j, t in seen.any(1).nonzero().tolist():
        weight = received[j, seen[j, :, t], t]
        spread[j, t] = weight.var(correction=0) * len(weight)
    groups = (part.unflatten(0, (len(k), -1)) for part in (received.amax(1), spread))
    return torch.stack([total, next(groups).amax(1), next(groups).mean(1)])


def naive_take_rows(k: Tensor, v: Tensor, index: Tensor) -> Results:
    every = [(torch.zeros(1, part.shape[-1]), part.reshape(-1, part.shape[-1])) for part in (k, v)]
    return [torch.cat(part)[index + 1] for part in every]


def naive_width(dist: Tensor, norm: float, sigma: str | float) -> float:
    if sigma == "mean":
        return max(float(dist.sum()) / max(len(dist) - 1, 1), 1e-6 * norm)
    if sigma == "rms":
        return math.sqrt(float((dist**2).sum()) / max(len(dist) - 1, 1))
    if not isinstance(sigma, str):
        return sigma
    width = math.sqrt(0.5)
    for _ in range(64):
        width = float(torch.exp(-(dist**2) / (2 * width**2)).sum()) / (math.sqrt(2) * len(dist))
    return width


def naive_merge_runs(
    k: Tensor, v: Tensor, mass: Tensor, start: Tensor, sigma: str | float, real: Tensor | None
) -> Results:
    rows = []
    for h in range(len(k)):
        end = k.shape[1] if real is None else int(real[h].sum())
        for i, j in pairwise([*start[h, :end].nonzero().flatten().tolist(), end]):
            p = max(range(i, j), key=lambda t: (float(mass[h, t]), -t))
            dist = (k[h, i:j] - k[h, p]).norm(dim=-1)
            width = naive_width(dist, float(k[h, p].norm()), sigma)
            weight = torch.exp(-(dist**2) / (2 * width**2)) if width else torch.ones_like(dist)
            weight /= weight.sum()
            rows.append((weight @ k[h, i:j], weight @ v[h, i:j], torch.tensor(p), torch.tensor(j - i)))
    new_k, new_v, pivot, size = (torch.stack(part) for part in zip(*rows, strict=True))
    return [new_k, new_v, start.sum(1), pivot, size]


def naive_nearest_key(k: Tensor, dropped: Tensor, kept: Tensor) -> Results:
    at, cosine = torch.full_like(dropped, -1), torch.zeros(dropped.shape).double()
    for h in range(len(k)):
        units = torch.nn.functional.normalize(k[h, kept[h][kept[h] >= 0]], dim=-1)
        for m, e in enumerate(dropped[h].tolist()):
            if e >= 0 and len(units):
                found = units @ torch.nn.functional.normalize(k[h, e], dim=0)
                at[h, m], cosine[h, m] = found.argmax(), found.max()
    return [at, cosine]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_reference_is_the_definition(op: Op, case: Mapping[str, Any], dtype: torch.dtype) -> None:
    args = op.inputs(case, dtype, seed=1)
    wide = each(lambda arg: arg.double() if arg.is_floating_point() else arg, args)
    naive = globals()[f"naive_{op.name}"]
    check(results(op.ref, args), results(naive, wide), tolerance(case, EXACT))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_twin_is_the_reference(op: Op, case: Mapping[str, Any], dtype: torch.dtype) -> None:
    args = op.inputs(case, dtype, seed=2)
    once, want = results(op, args), results(op.ref, args)
    assert [part.dtype for part in once] == [part.dtype for part in want]
    check(once, want, tolerance(case, EXACT if dtype is torch.float32 else QUICK))
    assert all(map(torch.equal, once, results(op, args)))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize(("op", "case"), CASES)
def test_the_cost_is_every_byte_once(op: Op, case: Mapping[str, Any], dtype: torch.dtype) -> None:
    args = op.inputs(case, dtype, seed=7)
    parts = [*tree_leaves(args), *results(op.ref, args)]
    if op is take_rows:  # it reads the rows that are named, some of them twice
        k, v, index = args
        parts[:2] = (part.flatten(0, -2)[index[index >= 0]] for part in (k, v))
    whole = sum(part.numel() * part.element_size() for part in parts if isinstance(part, Tensor))
    assert op.cost(case, dtype.itemsize)[0] == whole


@pytest.mark.parametrize("op", OPS, ids=lambda op: op.name)
def test_strides_do_not_matter(op: Op) -> None:
    args = op.inputs(op.cases[2], torch.float32, seed=3)
    check(results(op, each(strided, args)), results(op, each(Tensor.contiguous, args)), EXACT)


# The rows that take_rows is given are counted through all heads, and the ways of attention_peak come before the heads.
@pytest.mark.parametrize("op", [op for op in OPS if op not in (take_rows, attention_peak)], ids=lambda op: op.name)
def test_permuting_kv_heads_permutes_the_results(op: Op) -> None:
    case = next(case for case in reversed(op.cases) if case.get("H", len(case.get("lens", ""))) > 1)
    args = dict(zip(inspect.signature(op.ref).parameters, op.inputs(case, torch.float32, seed=4), strict=False))
    H = len(args["lens"]) if "lens" in args else case["H"]
    order, lens = torch.arange(H).roll(1), args.get("lens")

    def permute(part: Tensor, flat: list[int] | None) -> Tensor:
        if flat is not None:  # rows, or blocks of as many rows each
            own = [n * len(part) // sum(flat) for n in flat]
            return torch.cat([torch.split(part, own)[h] for h in order])
        return part.unflatten(0, (H, -1))[order].flatten(0, 1)

    moved = dict(args)
    for name, arg in args.items():
        if name not in ("q_pos", "lens") and not (name == "pos" and arg.dim() == 1):
            flat = None if name in GROUPED else lens
            moved[name] = each(lambda part, flat=flat: permute(part, flat), arg)
    if lens:
        moved["lens"] = [lens[h] for h in order]
    got, want = results(op, tuple(moved.values())), results(op, tuple(args.values()))
    flat = want[2].tolist() if op is merge_runs else None
    check(got, [permute(part, None if len(part) in (H, len(args.get("q", ""))) else flat) for part in want], EXACT)


def test_mass_of_two_chunks_is_the_mass_of_the_whole() -> None:
    q, k, _, scale, *_ = attention_mass.inputs({"H": 2, "G": 3, "T": 129, "D": 64}, torch.bfloat16, seed=0)
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
    q, k, _, scale, *_ = attention_mass.inputs({"H": 1, "G": 2, "T": 65, "D": 64}, dtype, seed=0)
    q, k = q * 16, k * 16
    _, lse = causal_attention(q.float(), k.float(), k.float(), scale)
    assert lse.max() > 400
    args = (q, k, lse, scale, True)
    assert error(attention_mass(*args), attention_mass.ref(*args)) < tolerance


@pytest.mark.parametrize("causal", [False, True])
def test_mass_ignores_queries_that_see_nothing(twin: Callable[[Op], Fn], causal: bool) -> None:
    run = twin(attention_mass)
    q, k, lse, scale, *_ = attention_mass.inputs({"H": 2, "G": 2, "T": 9, "D": 16}, torch.float32, seed=0)
    lse[:, [1, 5]] = -math.inf
    blind = lse.clone()
    blind[:, [1, 5]] = math.inf
    assert error(run(q, k, lse, scale, causal), run(q, k, blind, scale, causal)) < 1e-6
    assert not run(q, k, torch.full_like(lse, -math.inf), scale, causal).any()
    assert not run(q[:, :0], k, lse[:, :0], scale, False).any()
    assert run(q, k[:, :0], lse, scale, False).shape == (2, 0)


def test_permuting_heads_permutes_peaks(twin: Callable[[Op], Fn]) -> None:
    run = twin(attention_peak)
    q, k, lse, *rest = attention_peak.inputs(
        {"H": 3, "G": 2, "M": 65, "T": 33, "D": 20, "P": 2, "softcap": 2.0}, torch.bfloat16, seed=0
    )
    heads, kv_heads = [5, 4, 0, 1, 3, 2], [2, 0, 1]
    assert torch.equal(run(q[heads], k[kv_heads], lse[:, heads], *rest), run(q, k, lse, *rest)[:, heads])


@pytest.mark.parametrize("loud", [False, True])
@pytest.mark.parametrize("softcap", [None, 30.0])
def test_peaks_are_as_exact_as_float32(twin: Callable[[Op], Fn], softcap: float | None, loud: bool) -> None:
    case = {"H": 2, "G": 2, "M": 129, "T": 65, "D": 64, "P": 2, "softcap": softcap, "loud": loud}
    q, k, lse, *rest = attention_peak.inputs(case, torch.bfloat16, seed=0)
    off = twin(attention_peak)(q, k, lse, *rest) - naive_attention_peak(q.double(), k.double(), lse.double(), *rest)
    assert off.abs().max() < (5e-3 if loud and not softcap else 1e-5)  # a logit of 1e4 has steps of 1e-3


def test_a_query_that_does_not_count_is_no_peak(twin: Callable[[Op], Fn]) -> None:
    run = twin(attention_peak)
    q, k, lse, *rest = attention_peak.inputs({"H": 2, "G": 2, "M": 9, "T": 5, "D": 16, "P": 2}, torch.float32, seed=0)
    q[:, [1, 5]] *= 100  # they would be
    one = lse.clone()
    one[0, :, [1, 5]] = math.inf
    mine = [0, 2, 3, 4, 6, 7, 8]
    peak = run(q, k, one, *rest)
    check([peak[:1]], [run(q[:, mine], k, lse[:1, :, mine], *rest)], EXACT)
    check([peak[1:]], [run(q, k, lse[1:], *rest)], EXACT)
    nothing = torch.full((2, 4, 5), -math.inf)
    assert torch.equal(run(q, k, torch.full_like(lse, math.inf), *rest), nothing)
    assert torch.equal(run(q[:, :0], k, lse[..., :0], *rest), nothing)
    assert run(q, k[:, :0], lse, *rest).shape == (2, 4, 0)


def test_a_query_of_weight_w_counts_w_times(twin: Callable[[Op], Fn]) -> None:
    case = {"H": 1, "G": 2, "M": 33, "T": 17, "D": 32}
    q, k, lse, scale, _ = attention_peak.inputs(case, torch.float32, seed=0)
    weight = torch.rand(33, generator=torch.Generator().manual_seed(0)) + 0.1
    shares = (q @ k.mT * scale - lse[0, ..., None]).exp()
    peak = twin(attention_peak)(q, k, torch.cat([lse, lse - weight.log()]), scale)
    torch.testing.assert_close(peak.exp(), torch.stack([shares.amax(1), (shares * weight[:, None]).amax(1)]))


@pytest.mark.parametrize("G", [1, 3, 300])
def test_peaks_over_many_tiles(G: int) -> None:
    case = {"H": 1, "G": G, "M": 5 if G == 300 else 517, "T": 1031, "D": 8, "P": 2}
    args = attention_peak.inputs(case, torch.bfloat16, seed=0)
    check([attention_peak.cpu(*args)], [attention_peak.ref(*args)], EXACT)  # type: ignore[misc]


def test_cosine_of_equal_opposite_and_zero_keys(twin: Callable[[Op], Fn]) -> None:
    key = torch.randn(1, 1, 77, generator=torch.Generator().manual_seed(0)).bfloat16()
    cosine = twin(adjacent_cosine)(torch.cat([key, key, 4 * key, -key, 0 * key, 0 * key, key], 1))
    assert cosine.tolist() == [[1, 1, -1, 0, 0, 0]]


def test_of_equally_near_keys_the_first_kept_is_taken(twin: Callable[[Op], Fn]) -> None:
    run = twin(nearest_key)
    k = torch.tensor([[[3.0, 0], [0, 2], [6, 0], [0, 0], [5, 0], [-5, 0], [0, 0], [math.nan, 0]]])
    at, cosine = run(k, torch.tensor([[4, 5, 6, -1]]), torch.tensor([[3, 1, 2, 0, -1]]))
    assert at.tolist() == [[2, 0, 0, -1]] and cosine.tolist() == [[1, 0, 0, 0]]
    many = torch.full((1, 1301, 4), 0.5)
    many[0, :600] *= -1
    at, cosine = run(many, torch.arange(1300, 1301)[None], torch.arange(1300)[None])
    assert at.tolist() == [[600]] and cosine.tolist() == [[1]]
    at, cosine = run(k[..., :2], torch.tensor([[0, 2]]), torch.tensor([[-1]]))
    assert at.tolist() == [[-1, -1]] and not cosine.any()
    assert [part.shape for part in run(k, torch.empty(1, 2).long(), torch.empty(1, 0).long())] == [(1, 2), (1, 2)]


def test_window_scores_count_the_queries_that_see(twin: Callable[[Op], Fn]) -> None:
    run = twin(window_scores)
    q, _, k, pos, bias, scale, *_ = window_scores.inputs(
        {"H": 2, "G": 3, "W": 4, "T": 9, "D": 16, "bias": True}, torch.float32, seed=0
    )
    pos[0, 2:], k[0, 2:] = -1, math.nan  # padding is not read
    score = run(q, torch.tensor([0, 1, 2, 17]), k, pos, bias, scale)  # the first query sees nothing
    assert error(score.sum(1), torch.tensor([3.0, 3.0])) < 1e-6
    assert not score[pos < 0].any()
    assert not run(q[:, :0], torch.tensor([]), k, pos, bias, scale).any()


@pytest.mark.parametrize("lens", [[5, 5], [7, 3], torch.tensor([7, 3])], ids=["uniform", "ragged", "tensor"])
def test_attention_stands_extreme_biases_and_logits(lens: Any) -> None:
    q, k, v, _, bias, scale, _ = ragged_attention.inputs(
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
    q, k, v, lens, bias, scale, _ = ragged_attention.inputs(
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


@pytest.mark.parametrize("P", [1, 2, 3, 7])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("op", [ragged_attention, dense_attention], ids=lambda op: op.name)
def test_pieces_for_threads_are_the_whole(op: Op, dtype: torch.dtype, P: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # as on a machine with many cores, and for heads too short for it
    monkeypatch.setattr("kvcli.kernels.dense.count_pieces", lambda H, R, T: min(P, T))
    monkeypatch.setattr("kvcli.kernels.attention.count_pieces", lambda H, R, T: min(P, T))
    for case in op.cases:
        args = op.inputs(case, dtype, seed=6)
        check(results(op.cpu, args), results(op.ref, args), EXACT if dtype is torch.float32 else QUICK)


def test_one_thread_needs_no_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = {1: (1, 1, 1), 2: (2, 2, 1), 4: (4, 4, 1), 6: (2, 6, 3)}
    for threads, expected in counts.items():
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert tuple(count_pieces(H, 4, 8192) for H in (3, 1, 8)) == expected
        assert count_pieces(1, 4, 100) == count_pieces(1, 1000, 8192) == 1
