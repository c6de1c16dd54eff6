"""Samples -> rows: what each method reaches in each metric, its standard error, and how much it keeps of the full."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .evaluate import FULL, NONE, Name, Unit

DRAWS, CHUNK = 1000, 2**22  # resamples of the bootstrap, and numbers of them held at a time
FEW = 8  # documents, from which on it is they that are drawn, since the answers about one document hang together


def mean(x: Tensor, times: Tensor) -> Tensor:  # [n], [R, n] -> [R] float64
    """Of every resample, in which x_i occurs `times` often."""
    return (times @ x) / times.sum(1)


def quantile(q: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The same for a quantile, interpolated between neighbours."""

    def of(x: Tensor, times: Tensor) -> Tensor:
        order = x.argsort()
        ends = times[:, order].cumsum(1)
        at = q * (ends[:, -1] - 1)
        low, high = (
            x[order][torch.searchsorted(ends, each[:, None], right=True)[:, 0]] for each in (at.floor(), at.ceil())
        )
        return low.lerp(high, at - at.floor())

    return of


def perplexity(x: Tensor, times: Tensor) -> Tensor:
    return mean(x, times).exp()


@dataclass(frozen=True)
class Metric:
    """A number of many samples: which of their values it is made of, and how."""

    source: str
    statistic: Callable[[Tensor, Tensor], Tensor] = mean
    rises: bool = True  # higher is better


# Of questions there are, beside these, all that `tasks.scores` knows.
METRICS = {
    "kl": Metric("kl", rises=False),
    "top1": Metric("top1"),
    "nll": Metric("nll", rises=False),
    "ppl": Metric("nll", perplexity, rises=False),
    "kl_median": Metric("kl", quantile(0.5), rises=False),
    "kl_p95": Metric("kl", quantile(0.95), rises=False),
}

OF_TEXTS, OF_ANSWERS = ("ppl", "nll", "kl", "kl_median", "kl_p95", "top1"), ("kl", "top1")


def metrics_of(values: Iterable[str]) -> dict[str, Metric]:
    """By name, the metrics that samples with these values have; medians and tails only where there is one a token."""
    names = list(values)
    scores = {name: Metric(name) for name in names if name not in METRICS}
    parts = OF_TEXTS if "nll" in names else OF_ANSWERS
    return scores | {name: METRICS[name] for name in parts if METRICS[name].source in names}


@dataclass(frozen=True)
class Found:
    """A metric of some samples, and what it is in each resample of them."""

    value: float
    draws: Tensor  # [R] float64
    n: int

    @property
    def stderr(self) -> float:
        return float(self.draws.std(correction=0))


def measured(x: Tensor, group: Tensor, metric: Metric, draws: int = DRAWS) -> Found:  # [n], [n] int64
    """A metric with its bootstrap, seeded: whole groups are drawn where there are at least FEW, else single numbers."""
    groups = int(group.max()) + 1
    of = group if groups >= FEW else torch.arange(len(x))
    size = int(of.max()) + 1
    rng = torch.Generator().manual_seed(0)
    found = []
    for start in range(0, draws, step := max(1, CHUNK // len(x))):
        drawn = torch.randint(size, (min(step, draws - start), size), generator=rng)
        times = torch.zeros(drawn.shape, dtype=torch.float64).scatter_add_(1, drawn, torch.ones_like(drawn).double())
        found.append(metric.statistic(x, times[:, of]))
    value = metric.statistic(x, torch.ones(1, len(x), dtype=torch.float64))
    return Found(float(value), torch.cat(found), len(x))


def rows(units: Iterable[Unit]) -> list[dict[str, Any]]:
    """A row for every task, method, budget and metric, in the order the units first name them.

    recovery: (value - none) / (full - none), the anchors over the same documents; None where one is missing, and where
    they are within two standard errors of one another.
    """
    tasks: dict[str, dict[Name, list[Unit]]] = {}
    for unit in units:
        if unit.error is None:
            task, _, method, budget = unit.key
            tasks.setdefault(task, {}).setdefault((method, budget), []).append(unit)
    return [row for task, named in tasks.items() for row in _task(task, named)]


def _task(task: str, named: Mapping[Name, Sequence[Unit]]) -> list[dict[str, Any]]:
    known: dict[tuple[Name, frozenset[str]], dict[str, Found]] = {}

    def of(name: Name, documents: frozenset[str]) -> dict[str, Found]:
        if (name, documents) not in known:
            known[name, documents] = _metrics([unit for unit in named.get(name, ()) if unit.key[1] in documents])
        return known[name, documents]

    found = []
    for name, units in named.items():
        documents = frozenset(unit.key[1] for unit in units)
        full, none = of(FULL, documents), of(NONE, documents)
        size = {"bytes": round(_mean(unit.bytes for unit in units)), "keep": _mean(unit.keep for unit in units)}
        for metric, mine in of(name, documents).items():
            about: dict[str, Any] = {"method": name[0], "budget": name[1] or None, "task": task, "metric": metric}
            numbers = {"value": mine.value, "stderr": mine.stderr, "n": mine.n, **size}
            found.append({**about, **numbers, "recovery": recovery(mine, full.get(metric), none.get(metric))})
    return found


def recovery(mine: Found, full: Found | None, none: Found | None) -> float | None:
    """How much of the way from no document to the full cache is left; the anchors are drawn alike, so pair by pair."""
    if full is None or none is None:
        return None
    way, spread = full.value - none.value, float((full.draws - none.draws).std(correction=0))
    return (mine.value - none.value) / way + 0.0 if abs(way) > 2 * spread else None  # no -0


def _metrics(units: Sequence[Unit]) -> dict[str, Found]:
    samples = [(i, sample["values"]) for i, unit in enumerate(units) for sample in unit.samples]
    found = {}
    for metric, how in metrics_of(dict.fromkeys(value for _, values in samples for value in values)).items():
        pairs = [(i, x) for i, values in samples for x in values.get(how.source, ())]
        of = {i: place for place, i in enumerate(dict.fromkeys(i for i, _ in pairs))}
        x, group = torch.tensor([x for _, x in pairs], dtype=torch.float64), torch.tensor([of[i] for i, _ in pairs])
        found[metric] = measured(x, group, how)
    return found


def _mean(numbers: Iterable[float]) -> float:
    every = list(numbers)
    return sum(every) / len(every)
