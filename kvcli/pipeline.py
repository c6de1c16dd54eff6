"""Compression in two passes: score, protect, allocate; then reduce, encode, measure, write. One layer at a time."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

from .budget import Budget
from .collect import COLLECT, collect_for
from .device import CPU, ahead, blaming_card
from .errors import InfeasibleError, KvError
from .layers import layer_tensors
from .metrics import median_p95, output_error
from .outline import hollow
from .plan import Plan, check_encoding, find_sliding, make_ask, make_outline
from .recipe import Recipe, evicting
from .registry import Ask, Scored
from .snapshot import LayerKV, Snapshot, Stats, check_finite, finite
from .storage import Writer

Tick = Callable[[int, int], None]


@blaming_card()
def make_plans(
    snapshot: Snapshot,
    recipe: Recipe,
    budgets: Sequence[Budget | None],
    *,
    seed: int = 0,
    parent: str = "",
    keep_stats: bool = False,
    device: torch.device = CPU,
    tick: Tick = lambda done, total: None,
) -> list[Plan]:
    """The first pass: read and score every layer once and decide what each budget keeps; one plan a budget.

    `budgets` are those of `recipe.budgets`: None where no budget says what stays. `parent` is the input's digest.
    Raises InfeasibleError for a missing statistic, a budget that cannot be met or nothing to compress, KvError for
    layers that are not finite.
    """
    check_encoding(snapshot, recipe)
    stats = [hollow(part) for part in snapshot.stats] if keep_stats else []
    entries = [
        {"recipe": str(recipe), "budget": budget.text if budget else "", "seed": seed, "parent": parent}
        for budget in budgets
    ]
    sliding = find_sliding(snapshot)
    asks = [make_ask(snapshot, recipe, each, stats, sliding, e) for each, e in zip(budgets, entries, strict=True)]
    lens, scored = list[Tensor](), [list[Scored | None]() for _ in asks]
    with ahead(snapshot, device) as layers:
        for i, rows, part in layers:
            lens.append(rows.lens)
            check_finite(i, k=rows.k, v=rows.v, bias=rows.bias)
            kv = LayerKV.from_rows(rows)
            del rows
            for mine, each in zip(scored, _score_layer(snapshot, recipe, i, kv, part, asks), strict=True):
                mine.append(each)
            del kv, part
            tick(i + 1, len(snapshot.rows))
    plans = []
    for ask, mine, entry in zip(asks, scored, entries, strict=True):
        counts, used = _allocate(recipe, mine, lens, ask)
        outline = make_outline(snapshot, used, counts, stats, entry, mine)
        plans.append(Plan(used, ask, mine, outline, keep_stats, device))
    return plans


@blaming_card()
def carry_out(
    snapshot: Snapshot,
    plans: Sequence[Plan],
    targets: Sequence[Path | BinaryIO],
    *,
    force: bool = False,
    tick: Tick = lambda done, total: None,
) -> list[Tensor]:
    """The second pass: read every layer once and write it to all targets; returns a report [L, 4] for each.

    The report holds the output error of `q_last` (median, 95th percentile) and of `q_probe`; NaN without queries.
    """
    reports = [torch.full((len(snapshot.rows), 4), torch.nan) for _ in plans]
    with ExitStack() as stack:
        outs = []
        for plan, target in zip(plans, targets, strict=True):
            outs.append(stack.enter_context(Writer(target, plan.outline.specs, plan.outline.meta, force=force)))
            outs[-1].put("ids", snapshot.ids)
        for i, rows, stats in stack.enter_context(ahead(snapshot, plans[0].device)):
            kv = LayerKV.from_rows(rows)
            del rows
            for plan, out, report in zip(plans, outs, reports, strict=True):
                report[i] = _write_layer(plan, i, kv, stats, out)
            del kv, stats
            tick(i + 1, len(snapshot.rows))
        for out, report in zip(outs, reports, strict=True):
            for name, tensor in {**snapshot.lasting, "report": report}.items():
                out.put(name, tensor)
    return reports


def protect(scored: Scored, kv: LayerKV, ask: Ask) -> Scored:
    """Sinks and newest entries must stay (+inf); padding never does (-inf)."""
    kept = (kv.pos < ask.sink) | (kv.pos >= ask.N - ask.recent)
    return replace(scored, score=scored.score.masked_fill(kept, torch.inf).masked_fill(~kv.real, -torch.inf))


def _score_layer(
    snapshot: Snapshot, recipe: Recipe, i: int, kv: LayerKV, stats: Stats, asks: Sequence[Ask]
) -> list[Scored | None]:
    if recipe.score is None or i not in snapshot.meta.held:
        return [None] * len(asks)
    _check_stats(recipe, stats, i, bool(snapshot.meta.history))
    raw: Scored | None = None
    result: list[Scored | None] = []
    for ask in asks:
        if raw is None or recipe.score.stage.by_budget:
            raw = recipe.score(kv, stats, replace(ask, layer=i))
        if bool(raw.score[kv.real].isnan().any()):
            raise KvError(f"layer {i}: the score of {recipe} is not a number", "its numbers are too large")
        result.append(protect(raw, kv, ask))
    return result


def _check_stats(recipe: Recipe, stats: Stats, layer: int, compressed: bool) -> None:
    missing = [need for need in recipe.needs if need not in stats.present()]
    if missing:
        again = "; compress the full snapshot, or make this one again with kvcli compress --keep-stats"
        asked = f" --collect {','.join(names)}" if (names := collect_for(missing)) else ""
        later = {part for parts in COLLECT.values() for part in parts}.issuperset(missing)
        how = f"kvcli score SNAPSHOT{asked} adds" if later else f"kvcli prefill DOC{asked} records"
        raise InfeasibleError(
            f"{recipe} needs {', '.join(missing)}, which layer {layer} of this snapshot does not have",
            "compressed files drop their statistics unless made with --keep-stats" if compressed else "",
            f"{how} {', '.join(missing)}" + (again if compressed else ""),
        )
    check_finite(layer, **{need: getattr(stats, need) for need in recipe.needs})


def _allocate(
    recipe: Recipe, scored: Sequence[Scored | None], lens: list[Tensor], ask: Ask
) -> tuple[list[Tensor], Recipe]:
    parts = {i: part for i, part in enumerate(scored) if part is not None}
    if recipe.score and recipe.score.sizes_itself:
        shared = [part.count.clamp(part.low, part.high) for part in parts.values() if part.count is not None]
    elif ask.n < sum(int(lens[i].sum()) for i in parts):
        shared = recipe.allocate(list(parts.values()), ask.n, ask)
        if sum(int(count.sum()) for count in shared) != ask.n:
            raise ValueError(f"{recipe.allocate.stage.name} did not share out exactly {ask.n} entries")
    else:
        return lens, evicting(recipe)
    counts = list(lens)
    for i, count in zip(parts, shared, strict=True):
        counts[i] = count.cpu()
    return counts, evicting(recipe) if all(map(torch.equal, counts, lens)) else recipe


def _write_layer(plan: Plan, i: int, kv: LayerKV, stats: Stats, out: Writer) -> Tensor:  # -> [4]
    scored, recipe, ask = plan.scored[i], plan.recipe, replace(plan.ask, layer=i)
    small, kept = kv, scored
    if scored is not None:
        small, pivot = recipe.reduce(kv, stats, scored, plan.outline.counts[i].to(kv.pos.device), ask)
        kept = replace(scored, score=scored.score.gather(1, pivot.clamp(min=0)))
        if not torch.equal(small.lens.cpu(), plan.outline.counts[i]):
            raise ValueError(f"{recipe.reduce.stage.name} did not return the asked number of entries")
    rows = small.rows()
    if not all(part is None or finite(part) for part in (rows.k, rows.v, rows.bias)):
        what = f"layer {i}: {recipe} makes numbers that {str(rows.v.dtype).removeprefix('torch.')} does not hold"
        raise KvError(what, "entries that go are added to those that stay", "prefill with --dtype float32")
    payload = recipe.encode(small, kept, ask)
    for name, tensor in layer_tensors(i, payload, rows, plan.outline.parts[i], stats if plan.keep_stats else Stats()):
        out.put(name, tensor)
    k, v = recipe.encode.part("decode", payload, rows.lens)
    return _measure(stats, kv, LayerKV.from_rows(replace(rows, k=k.to(kv.k.dtype), v=v.to(kv.v.dtype))), ask)


def _measure(stats: Stats, before: LayerKV, after: LayerKV, ask: Ask) -> Tensor:  # -> [4]
    numbers: list[float] = []
    for q, q_pos in ((stats.q_last, stats.q_last_pos), (stats.q_probe, stats.q_probe_pos)):
        if q is None or q_pos is None:
            numbers += [torch.nan, torch.nan]
        else:
            numbers += median_p95(output_error(q, q_pos, before, after, ask.scale, ask.softcap, stats.sink_logit))
    return torch.tensor(numbers)
