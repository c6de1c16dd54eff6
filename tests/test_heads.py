"""DefensiveKV and Task-KV on the worked examples of their specifications: attention written down, heads that differ."""

import math
from dataclasses import replace

import pytest
import torch
from make import make_snapshot
from torch import Tensor

from kvcli.budget import Budget
from kvcli.methods.defensivekv import defensivekv, defensivekv_score, layer_defensivekv
from kvcli.methods.taskkv import choose, distance, pick, taskkv, taskkv_score, whole_heads
from kvcli.pipeline import make_plans, protect
from kvcli.recipe import Recipe
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV, Stats, top_mask
from kvcli.window import smooth

ROWS = [[0.30, 0.05, 0.05, 0.20, 0.10, 0.02, 0.02, 0.06], [0.10, 0.10, 0.30, 0.10, 0.05, 0.05, 0.05, 0.05]]
NU = [1.0, 2, 1, 1, 4, 1, 1, 1]
SECOND = [
    [ROWS, [[0.05] * 7 + [0.45], [0.60, 0.05, 0.05] + [0.02] * 5]],
    [[[0.20, 0.20] + [0.02] * 5 + [0.10]] * 2, [[0.70] + [0.02] * 7, [0.72] + [0.02] * 7]],
]
NU_SECOND = [NU, [1.0] * 7 + [3]]


def attending(weight: Tensor, v: Tensor | None = None) -> tuple[LayerKV, Stats]:  # [H, G, W, N] the window comes last
    """A layer of scale 1 whose last W queries have just these attention weights."""
    H, G, W, N = weight.shape
    k = weight.flatten(1, 2).log().clamp(min=-200).mT.contiguous()  # [H, N, G W], a channel for each query
    q = torch.eye(G * W).view(1, G, W, G * W).expand(H, -1, -1, -1).reshape(H * G, W, G * W)
    pos = torch.arange(N, dtype=torch.int32)
    return LayerKV(k, k if v is None else v, pos.expand(H, N)), Stats(q_last=q, q_last_pos=pos[-W:])


def before_a_window(rows: list[list[list[list[float]]]], nu: list[list[float]]) -> tuple[LayerKV, Stats]:
    """Attention to the tokens before the window, the rest on what is seen of the window itself."""
    prefix = torch.tensor(rows)  # [H, G, W, p]
    seen = torch.ones(prefix.shape[2], prefix.shape[2]).tril()
    rest = (1 - prefix.sum(-1, keepdim=True)) * seen / seen.sum(1, keepdim=True)
    kv, stats = attending(torch.cat([prefix, rest], -1))
    return kv, replace(stats, value_norm=torch.tensor([[*each, 1.0, 1.0] for each in nu]))


def asking(N: int, B: int, H: int = 1, recent: int = 2) -> Ask:
    return Ask(0, 1, H * B, B, N, 0, recent, 0, 1.0)


def kept(scored: list[Scored], counts: list[Tensor]) -> list[list[list[int]]]:
    masks = [top_mask(part.score, count) for part, count in zip(scored, counts, strict=True)]
    return [[head.nonzero()[:, 0].tolist() for head in mask] for mask in masks]


def defend(
    rows: list[list[list[list[float]]]], nu: list[list[float]], B: int, **options: str
) -> tuple[Scored, list[list[int]]]:
    kv, stats = before_a_window(rows, nu)
    ask = asking(10, B, len(rows))
    scored = protect(defensivekv_score(kv, stats, ask, window=2, **options), kv, ask)
    return scored, kept([scored], defensivekv([scored], ask.n, ask))[0]


def test_defensivekv_of_one_head() -> None:
    scored, stays = defend([[ROWS]], [[1.0] * 8], 6)
    usual = 0.109894
    risk = [math.inf, 0.149533, math.inf, 0.135211, 0.123944, usual, usual, usual, math.inf, math.inf]
    assert scored.score[0].tolist() == pytest.approx(risk, abs=1e-6)
    assert stays == [[0, 1, 2, 3, 8, 9]]
    # Without room for the first stage its two entries have scores like the others.
    assert defend([[ROWS]], [NU], 3)[0].score[0, [0, 2]].tolist() == pytest.approx([0.112676, 0.174455], abs=1e-6)


def test_defensivekv_as_the_paper_has_it() -> None:
    scored, stays = defend([[ROWS]], [NU], 6, variant="paper")
    risk = torch.tensor([0.10, 0.24, 0.14, 0.12, 0.44, 0.0925, 0.0925, 0.0925])
    assert (scored.score[0, :8] * 14).tolist() == pytest.approx(risk.tolist(), abs=1e-6)  # NU and the window add up
    assert stays == [[1, 2, 3, 4, 8, 9]]
    assert defend(SECOND, NU_SECOND, 5, variant="paper")[1] == [[1, 4, 8, 9], [0, 1, 2, 7, 8, 9]]


def test_defensivekv_of_two_groups() -> None:
    scored, stays = defend(SECOND, NU_SECOND, 5)
    first = [math.inf, 0.142751, 0.110037, 0.087380, 0.139809, 0.089655, 0.087380, math.inf]
    second = [math.inf, 0.080432, 0.123741, 0.060250, 0.024100, 0.060250, 0.060250, 0.090374]
    assert scored.score[0, :8].tolist() == pytest.approx(first, abs=1e-6)
    assert scored.score[1, :8].tolist() == pytest.approx(second, abs=1e-6)
    assert stays == [[0, 1, 4, 7, 8, 9], [0, 2, 8, 9]]


@pytest.mark.parametrize("B", [1, 2, 3])
def test_defensivekv_lifts_nothing_where_nothing_fits(B: int) -> None:
    kv, stats = before_a_window([[ROWS]], [NU])
    assert not bool(defensivekv_score(kv, stats, asking(10, B, recent=0), window=2).score.isinf().any())


def test_layer_defensivekv_keeps_the_window_of_a_quiet_layer() -> None:
    loud, quiet = [[ROWS]], [[[[0.05 * x for x in row] for row in ROWS]]]
    ask = replace(asking(10, 3), L=2, n=6)
    scored = []
    for rows in (loud, quiet):
        kv, stats = before_a_window(rows, [[1.0] * 8])
        scored.append(protect(defensivekv_score(kv, stats, ask, window=2), kv, ask))
    assert kept(scored, layer_defensivekv(scored, 6, ask)) == [[[1, 2, 8, 9]], [[8, 9]]]
    assert kept(scored, defensivekv(scored, 6, ask)) == [[[2, 8, 9]], [[2, 8, 9]]]


def test_defensivekv_takes_1600_of_8000_entries() -> None:
    B = Budget.parse("0.2").per_head(1000, 8, lambda n: n)
    scored = Scored(torch.rand(8, 1000, generator=torch.Generator().manual_seed(0)))
    for share in (defensivekv, layer_defensivekv):
        assert int(share([scored], 8 * B, asking(1000, B, 8))[0].sum()) == 1600


def test_defensivekv_does_not_see_the_unit_of_values() -> None:
    kv, stats = before_a_window(SECOND, NU_SECOND)
    assert stats.value_norm is not None
    for variant in ("reference", "paper"):
        one, other = (
            defensivekv_score(kv, replace(stats, value_norm=norm), asking(10, 5, 2), window=2, variant=variant).score
            for norm in (stats.value_norm, 1000 * stats.value_norm)
        )
        torch.testing.assert_close(one, other)


def test_value_norms_are_found_by_position() -> None:
    kv, stats = before_a_window(SECOND, NU_SECOND)
    whole = defensivekv_score(kv, stats, asking(10, 5, 2), window=2).score
    order = torch.tensor([[0, 2, 4, 5, 6, 7, 8, 9], [0, 1, 2, 3, 7, 8, 9, 0]])
    parts = (part.gather(1, order[..., None].expand(-1, -1, 4)) for part in (kv.k, kv.v))
    pos = order.int()
    pos[1, 7] = -1
    small = LayerKV(*parts, pos)
    norm = stats.value_norm
    assert norm is not None
    flat = defensivekv_score(small, replace(stats, value_norm=torch.ones(2, 10)), asking(10, 5, 2), window=2).score
    found = defensivekv_score(small, stats, asking(10, 5, 2), window=2).score
    share = 2 * (norm / norm.sum(0)).gather(1, order)
    real = small.real & flat.isfinite() & found.isfinite()
    torch.testing.assert_close(found[real], (flat * share)[real])
    assert int(real.sum()) > 8 and bool(whole.isposinf().any())


C = [[0.5, 0.1, 0.1, 0.1, 0.2, 0.0], [0.3, 0.1, 0.2, 0.1, 0.2, 0.1]]
V = torch.tensor([[1.0, 0], [0, 1], [1, 1], [2, 0], [0, 2], [1, -1]])


@pytest.mark.parametrize(("top", "mean"), [(3, (0.55, 0.55)), (256, (0.80, 0.60))])
def test_taskkv_summary_of_a_head(top: int, mean: tuple[float, float]) -> None:
    # The second head's values are 0: its summary is 0, and so the centre is half of the first head's.
    kv, stats = attending(torch.tensor([[C]] * 2), torch.stack([V, torch.zeros_like(V)]))
    seen = torch.tensor([[0.40, 0.10, 0.15, 0.10, 0.20, 0.05]] * 2)
    scored = taskkv_score(kv, stats, asking(6, 3), window=2, kernel=1, first=0, last=0, top=top)
    torch.testing.assert_close(scored.score, torch.where(torch.arange(6) >= 4, math.inf, seen))  # recent=2 counts
    assert distance(kv, seen, top).tolist() == pytest.approx([math.hypot(*mean) / 2] * 2, abs=1e-6)


def test_taskkv_picks_the_farthest_and_the_nearest() -> None:
    means = torch.tensor([[1.0, 0], [1.2, 0], [0.8, 0.1], [-1, 2], [1, -0.6]])
    far = torch.linalg.vector_norm(means - means.mean(0), dim=1)
    assert far.tolist() == pytest.approx([0.5, 0.6708, 0.2828, 2.3345, 0.9849], abs=1e-4)
    for count, center, expected in (
        (3, "inside", [2, 3, 4]),
        (3, "extra", [1, 2, 3, 4]),
        (3, "off", [1, 3, 4]),
        (1, "inside", [3]),
        (0, "extra", []),
    ):
        assert pick(far, count, center).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize(
    ("N", "share", "planned", "used", "middle", "remainder"),
    [
        (4096, 0.40, 2, 2, 547, 1),
        (4096, 0.40, 1, 1, 1015, 2),
        (4096, 0.35, 2, 2, 274, 0),
        (4096, 0.35, 1, 1, 781, 1),
        (4096, 0.25, 2, 1, 313, 1),
        (1024, 0.40, 2, 1, 49, 5),
    ],
)
def test_taskkv_counts(N: int, share: float, planned: int, used: int, middle: int, remainder: int) -> None:
    total = int(share * N * 8)
    full, note = choose(torch.arange(8.0), torch.full((8,), N), planned, "off", 272, total // 8)
    assert int(full.sum()) == used
    assert note == ("" if used == planned else "whole heads: 2 planned, 1 fit")
    score = torch.rand(8, N, generator=torch.Generator().manual_seed(0))
    score[:, :272] = math.inf
    count = taskkv([Scored(score, weight=full)], total, asking(N, total // 8, 8))[0]
    rest = [272 + middle + (h < remainder) for h in range(8 - used)]
    assert count.tolist() == rest + [N] * used and int(count.sum()) == total


@pytest.mark.parametrize(("used", "middle", "remainder"), [(8, 1366, 9), (4, 2302, 17)])
def test_taskkv_counts_of_32_heads(used: int, middle: int, remainder: int) -> None:
    full = torch.arange(32) >= 32 - used
    score = torch.zeros(32, 8192)
    score[:, :272] = math.inf
    count = taskkv([Scored(score, weight=full)], 104857, asking(8192, 3276, 32))[0].tolist()
    assert count == [272 + middle + (h < remainder) for h in range(32 - used)] + [8192] * used


def test_taskkv_whole_heads_by_layer() -> None:
    many = [whole_heads(32, r, 32, 0.25, 4) for r in range(32)]
    assert many == [8] * 4 + [7] * 8 + [6] * 8 + [5] * 8 + [4] * 4
    assert [whole_heads(32, r, 32) for r in range(32)] == many
    assert [whole_heads(8, r, 32) for r in range(32)] == [2] * 20 + [1] * 12
    assert whole_heads(8, 0, 1, 0.5, 0) == 4 and whole_heads(3, 0, 5) == 1 and whole_heads(4, 3, 4, 0.3, 9) == 4
    pooled = smooth(torch.tensor([[0.0, 0, 0, 9, 0, 0, 0, 0, 3, 0]]), 7, "avg")[0]
    assert pooled.tolist() == pytest.approx([1.2857] * 5 + [1.7143] * 2 + [0.4286] * 3, abs=1e-4)


def test_taskkv_whole_heads_stay_whole_and_fallbacks_are_told() -> None:
    full = make_snapshot(layers=3, heads=4, q_heads=8, tokens=200, dim=16)

    def plan(text: str, budget: str) -> tuple[list[list[int]], list[str]]:
        made = make_plans(full, Recipe.parse(text), [Budget.parse(budget)])[0]
        return [count.tolist() for count in made.outline.counts], made.notes

    counts, notes = plan("taskkv:beta=0.5,m=1,first=4,last=20", "60%")
    assert [sorted(layer)[::-1] for layer in counts] == [[200, 200, 40, 40], [200, 200, 40, 40], [200, 94, 93, 93]]
    assert notes == []
    counts, notes = plan("taskkv:beta=0.5,m=1,first=4,last=20", "40%")
    assert [sorted(layer)[::-1] for layer in counts] == [[200, 40, 40, 40]] * 3
    assert notes == ["layers 0-1: whole heads: 2 planned, 1 fit"]
    counts, notes = plan("taskkv", "20%")
    assert counts == [[40] * 4] * 3
    told = "whole heads: 1 planned, 0 fit; the first 8 and last 32 tokens fill the budget"
    assert notes == [f"layers 0-2: {told}"]


@pytest.mark.parametrize("heads", [1, 2])
def test_taskkv_cannot_tell_two_heads_apart(heads: int) -> None:
    full = make_snapshot(heads=heads, q_heads=2, tokens=60)
    made = make_plans(full, Recipe.parse("taskkv:first=2,last=6"), [Budget.parse("50%")])[0]
    assert [count.tolist() for count in made.outline.counts] == [[30] * heads] * 2
    where = "layer 1" if heads == 1 else "layers 0-1"  # 0.3 heads in the first layer are none
    assert made.notes == [f"{where}: no head is whole: one or two are equally far from their centre"]


def test_taskkv_counts_layers_without_those_that_slide() -> None:
    full = make_snapshot(layers=4, heads=4, q_heads=8, tokens=200, dim=16)
    layout = replace(full.meta.layout, kinds=("sliding", "full", "sliding", "full"))
    full = replace(full, meta=replace(full.meta, layout=layout))
    made = make_plans(full, Recipe.parse("taskkv:beta=0.5,m=1,first=4,last=20"), [Budget.parse("60%")])[0]
    whole = [int((count == 200).sum()) for count in made.outline.counts]
    assert whole == [4, 2, 4, 1]
