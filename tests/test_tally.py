"""Rows from samples: statistics of resamples, standard errors beside what is known of them, recovery of the anchors."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor

from kvcli.errors import KvError
from kvcli.evaluate import FULL, NONE, Name, Unit
from kvcli.tally import FEW, METRICS, Metric, mean, measured, perplexity, quantile, rows

HIT = Metric("hit")


def stderr(x: Tensor, group: Tensor, metric: Metric) -> float:
    return measured(x, group, metric).stderr


def unit(name: Name, document: str, values: list[dict[str, list[float]]], task: str = "t") -> Unit:
    return Unit((task, document, *name), [{"text": "", "values": each} for each in values], 100, 0.5)


@settings(max_examples=60, deadline=None)
@given(some.lists(some.tuples(some.floats(-9, 9), some.integers(0, 4)), min_size=1, max_size=12))
def test_statistics_are_those_of_the_sample_written_out(pairs: list[tuple[float, int]]) -> None:
    pairs = [*pairs, (0.5, 1)]  # some number occurs
    x = torch.tensor([value for value, _ in pairs], dtype=torch.float64)
    times = torch.tensor([[count for _, count in pairs]], dtype=torch.float64)
    written = x.repeat_interleave(times[0].long())
    expected = [written.mean(), written.mean().exp(), *(written.quantile(q) for q in (0.0, 0.5, 0.95, 1.0))]
    found = [mean(x, times), perplexity(x, times), *(quantile(q)(x, times) for q in (0.0, 0.5, 0.95, 1.0))]
    torch.testing.assert_close(torch.cat(found), torch.stack(expected).double(), rtol=1e-9, atol=1e-9)


def hits(n: int, share: float) -> Tensor:
    return (torch.arange(n) < n * share).double()


@pytest.mark.parametrize(("n", "share"), [(40, 0.5), (120, 0.3), (400, 0.9)])
def test_the_standard_error_of_a_share(n: int, share: float) -> None:
    found = stderr(hits(n, share), torch.zeros(n, dtype=torch.int64), HIT)
    assert found == pytest.approx(math.sqrt(share * (1 - share) / n), rel=0.1)  # 1,000 draws: 2 % of noise
    assert found == stderr(hits(n, share), torch.zeros(n, dtype=torch.int64), HIT)


def test_answers_about_one_document_hang_together() -> None:
    # Within a document all are found or none: 20 documents tell no more than 20 answers.
    x = hits(20, 0.5).repeat_interleave(6)
    group = torch.arange(20).repeat_interleave(6)
    assert stderr(x, group, HIT) == pytest.approx(0.5 / math.sqrt(20), rel=0.1)
    few = group < FEW - 1
    assert stderr(x[:42], group[few], HIT) == stderr(x[:42], torch.zeros(42, dtype=torch.int64), HIT)


def test_memory_is_bounded_and_the_result_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x, group = torch.rand(60, generator=torch.Generator().manual_seed(1)).double(), torch.arange(60)
    wide = stderr(x, group, METRICS["kl_p95"])
    monkeypatch.setattr("kvcli.tally.CHUNK", 6000)
    assert stderr(x, group, METRICS["kl_p95"]) == pytest.approx(wide, rel=1e-9)


def test_one_number_has_no_spread() -> None:
    assert stderr(torch.ones(1).double(), torch.zeros(1, dtype=torch.int64), HIT) == 0


def test_recovery_lies_between_the_anchors() -> None:
    scores = {FULL: [0.9, 0.7], NONE: [0.1, 0.1], ("m", "35%"): [0.5, 0.3]}
    units = [
        unit(name, "d", [{"hit": [x], "kl": [1 - x], "top1": [1.0]} for x in found]) for name, found in scores.items()
    ]
    found = {(row["method"], row["metric"]): row for row in rows(units)}
    assert [found[name, "hit"]["recovery"] for name in ("full", "none", "m")] == pytest.approx([1, 0, 3 / 7])
    assert found["m", "kl"]["recovery"] == pytest.approx(3 / 7)
    assert found["m", "top1"]["recovery"] is None  # the anchors agree
    assert {key: found["m", "hit"][key] for key in ("budget", "task", "value", "n", "bytes", "keep")} == {
        "budget": "35%",
        "task": "t",
        "value": 0.4,
        "n": 2,
        "bytes": 100,
        "keep": 0.5,
    }


def test_a_missing_anchor_leaves_recovery_open() -> None:
    assert [row["recovery"] for row in rows([unit(("m", ""), "d", [{"hit": [1.0]}])]) if row["metric"] == "hit"] == [
        None
    ]


def test_texts_have_perplexity_and_tails() -> None:
    values = {"nll": [1.0, 2.0, 3.0], "kl": [0.0, 0.1, 0.5], "top1": [1.0, 0.0, 1.0]}
    found = {row["metric"]: row["value"] for row in rows([unit(("m", ""), "d", [values])])}
    assert list(found) == ["ppl", "nll", "kl", "kl_median", "kl_p95", "top1"]
    assert found == pytest.approx(
        {"ppl": math.exp(2), "nll": 2, "kl": 0.2, "kl_median": 0.1, "kl_p95": 0.46, "top1": 2 / 3}
    )


def test_errors_have_no_rows_and_tasks_stay_apart() -> None:
    good = [unit(FULL, "d", [{"hit": [1.0]}], task) for task in ("a", "b")]
    found = rows([*good, Unit(("a", "e", *FULL), error=KvError("no"))])
    assert [(row["task"], row["n"]) for row in found if row["metric"] == "hit"] == [("a", 1), ("b", 1)]


def test_recovery_is_over_the_same_documents() -> None:
    scores = {"easy": (1.0, 0.0), "hard": (0.5, 0.0)}
    units = [
        unit(name, document, [{"hit": [value]}] * 3)
        for document, pair in scores.items()
        for name, value in zip((FULL, NONE), pair, strict=True)
    ]
    found = {row["method"]: row for row in rows([*units, unit(("m", "9"), "hard", [{"hit": [0.5]}] * 3)])}
    assert found["m"]["recovery"] == 1 and found["m"]["n"] == 3 and found["full"]["n"] == 6


@pytest.mark.parametrize(("none", "open_"), [([0.0] * 6, False), ([1.0, 0.0, 1.0, 0.0, 1.0, 1.0], True)])
def test_anchors_within_noise_leave_recovery_open(none: list[float], open_: bool) -> None:
    full = [1.0, 1.0, 0.0, 1.0, 1.0, 1.0]
    units = [unit(name, "d", [{"hit": [x]} for x in values]) for name, values in ((FULL, full), (NONE, none))]
    assert [row["recovery"] is None for row in rows(units)] == [open_] * 2
