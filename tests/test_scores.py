"""Scores of one line against the worked examples of their specifications: knorm, keydiff, h2o."""

import pytest
import torch
from torch import Tensor

from kvcli.methods.h2o import h2o
from kvcli.methods.keydiff import keydiff
from kvcli.methods.knorm import knorm
from kvcli.pipeline import protect
from kvcli.registry import Ask, Scored
from kvcli.snapshot import LayerKV, Stats, mask_index, top_mask

ROWS = [[1.0], [0.6, 0.4], [0.5, 0.1, 0.4], [0.3, 0.1, 0.3, 0.3], [0.2, 0.1, 0.4, 0.1, 0.2]]
MASS = torch.stack([torch.nn.functional.pad(torch.tensor(row), (0, 5 - len(row))) for row in ROWS]).sum(0)


def layer(k: Tensor) -> LayerKV:
    return LayerKV(k, k, torch.arange(k.shape[1], dtype=torch.int32).repeat(len(k), 1))


def ask(B: int, N: int, sink: int = 0, recent: int = 0) -> Ask:
    return Ask(0, 1, B, B, N, sink, recent, 0, 1.0)


def kept(scored: Scored, n: int) -> list[int]:
    return mask_index(top_mask(scored.score, torch.tensor([n])))[0].tolist()


def test_knorm_keeps_the_shortest_keys() -> None:
    scored = knorm(layer(torch.tensor([[[3.0, 4], [0, 1], [-1, 0], [6, 8]]])), Stats(), ask(2, 4))
    assert scored.score.tolist() == [[-5, -1, -1, -10]]
    assert kept(scored, 2) == [1, 2]


def test_knorm_tells_apart_what_ties_in_half_precision() -> None:
    k = torch.full((1, 2, 64), 1.0, dtype=torch.bfloat16)
    k[0, 1, :3] = 1.0078125
    scored = knorm(layer(k), Stats(), ask(1, 2))
    assert scored.score.dtype == torch.float32 and scored.score[0, 0] > scored.score[0, 1]


def test_keydiff_keeps_keys_unlike_the_mean_direction() -> None:
    scored = keydiff(layer(torch.tensor([[[3.0, 4], [0, 1], [-1, 0], [6, 8]]])), Stats(), ask(1, 4))
    expected = torch.tensor([[-0.84366, -0.99705, 0.07670, -0.84366]])
    torch.testing.assert_close(scored.score, expected, atol=1e-5, rtol=0)
    louder = keydiff(layer(torch.tensor([[[0.3, 0.4], [0, 9], [-1, 0], [6, 8]]])), Stats(), ask(1, 4))
    torch.testing.assert_close(louder.score, scored.score)


@pytest.mark.parametrize(
    ("B", "heavy", "norm", "expected"),
    [
        (3, 0.67, "sum", [0, 2, 4]),
        (3, 0.67, "mean", [0, 2, 4]),
        (4, 0.75, "sum", [0, 1, 2, 4]),
        (4, 0.75, "mean", [0, 2, 3, 4]),
        (4, 0.0, "sum", [1, 2, 3, 4]),
        (4, 1.0, "sum", [0, 1, 2, 3]),
        (3, 0.5, "sum", [0, 3, 4]),  # half, the newest get the odd one
    ],
)
def test_h2o_keeps_heavy_hitters_and_the_newest(B: int, heavy: float, norm: str, expected: list[int]) -> None:
    stats = Stats(attn_mass=MASS[None])
    scored = h2o(layer(torch.zeros(1, 5, 2)), stats, ask(B, 5), heavy=heavy, norm=norm)
    assert kept(scored, B) == expected
    more = h2o(layer(torch.zeros(1, 5, 2)), Stats(attn_mass=MASS[None] + 3), ask(B, 5), heavy=heavy, norm="sum")
    assert norm == "mean" or kept(more, B) == expected


@pytest.mark.parametrize("heavy", [0.0, 0.3, 1.0])
@pytest.mark.parametrize(("sink", "recent"), [(0, 0), (3, 2), (2, 6), (8, 0), (0, 8)])
def test_h2o_fits_whatever_is_protected_besides(heavy: float, sink: int, recent: int) -> None:
    kv, asked = layer(torch.zeros(1, 30, 2)), ask(8, 30, sink, recent)
    scored = protect(h2o(kv, Stats(attn_mass=torch.rand(1, 30)), asked, heavy=heavy), kv, asked)
    must = scored.score[0].isposinf()
    assert int(must.sum()) <= 8 and bool(must[:sink].all()) and bool(must[30 - recent :].all())
