"""KVMerger: runs of consecutive tokens with similar keys become one entry each."""

from typing import Any, Literal

import torch
from torch import Tensor

from ..errors import InfeasibleError
from ..kernels.adjacent import adjacent_cosine
from ..kernels.limit import fewest_runs, first_fitting, limit_runs, must_start, smallest_limit
from ..kernels.rope import rotate
from ..kernels.runs import merge_runs
from ..options import AtLeast0, Positive
from ..registry import Ask, Scored, Source, reduce, score
from ..rotations import need_freq
from ..snapshot import LayerKV, Rows, Stats, top_mask

SOURCE = Source("arXiv:2407.08454", 2024, question=True, checked="worked examples")


@score(needs=("attn_mass",), source=SOURCE, by_budget=True, sizes=lambda epsilon, **_: epsilon is not None)
def kvmerger_score(
    kv: LayerKV, stats: Stats, ask: Ask, *, epsilon: float | None = None, max_run: AtLeast0 = 64
) -> Scored:
    """How unlike its left neighbour a key is; the highest start runs. `epsilon` is a cosine to merge above, no budget.

    With `epsilon` the heavy and recent tokens that are protected are the paper's shares at 35 %, and runs longer than
    `max_run` raise the count.
    """
    kept = protected(kv, stats.mass_of(kv), ask, ask.B / ask.N if epsilon is None else 0.35, max_run)
    forced, real = must_start(kept), kv.real
    cut = torch.full(kv.pos.shape, torch.inf, device=kv.pos.device)
    cut[:, 1:] = -adjacent_cosine(kv.k).clamp(-1, 1)
    cut.masked_fill_(forced, torch.inf)
    least = fewest_runs(forced, real, max_run)
    if int(least.sum()) > ask.B * len(least):
        raise _too_few(forced, real, torch.full_like(least, ask.B), max_run)
    return Scored(cut, least=least, count=None if epsilon is None else fewest_runs(cut >= -epsilon, real, max_run))


@reduce(
    needs=("attn_mass",),
    source=SOURCE,
    after="kvmerger",
    adds=lambda values, **_: ("span", "bias") if values == "logcount" else ("span",),
)
def kvmerger(
    kv: LayerKV,
    stats: Stats,
    scored: Scored,
    count: Tensor,
    ask: Ask,
    *,
    values: Literal["mean", "count", "logcount"] = "logcount",
    sigma: Literal["mean", "rms", "literal"] | Positive = "mean",
    keys: Literal["rotated", "pivot", "rerotate"] = "rotated",
    max_run: AtLeast0 = 64,
) -> tuple[LayerKV, Tensor]:
    """Merge each run, up to `max_run` long, around its most attended token; `values`, `sigma` and `keys` say how.

    `values` keep a run's weight, `sigma` is the width, `keys` are averaged as they are, or without their rotation, or
    the pivot's own stays. `max_run` counts entries of the input, 0 sets no limit; see `limit_runs`.
    """
    forced, real, mass = scored.score.isposinf(), kv.real, stats.mass_of(kv)
    if bool((count < fewest_runs(forced, real, max_run)).any()):
        raise _too_few(forced, real, count, max_run)
    start = limit_runs(scored.score, top_mask(scored.score, count), real, max_run)
    freq = ask.freq if keys == "rerotate" else None
    source = kv.k if freq is None else rotate(kv.k, kv.pos, freq, back=True)
    k, v, lens, pivot, size = merge_runs(source, kv.v, mass, start, sigma, real)
    at = torch.arange(len(lens), device=k.device).repeat_interleave(lens), pivot
    if freq is not None:
        k = torch.where(size[:, None] > 1, rotate(k, kv.pos[at], freq).to(kv.k.dtype), kv.k[at])
    k = kv.k[at] if keys == "pivot" else k
    weight = size.log() if kv.bias is None else _sums(kv.bias[real].double().exp(), size).log().float()  # [E]
    if values == "count":
        v = (v.float() * size[:, None]).to(v.dtype)
    bias = weight if values == "logcount" else None if kv.bias is None else weight - size.log()
    span = size if kv.span is None else _sums(kv.span[real].double(), size)
    merged = LayerKV.from_rows(Rows(k, v, kv.pos[at], lens, bias, span.int()))
    index = torch.full(merged.pos.shape, -1, device=k.device)
    index[merged.real] = pivot
    return merged, index


@kvmerger.check
def check(ask: Ask, *, keys: str, **_: Any) -> None:
    if keys == "rerotate":
        need_freq(ask, "keys=rerotate", "keys=pivot")


def protected(kv: LayerKV, mass: Tensor, ask: Ask, share: float, max_run: int) -> Tensor:  # [H, T] -> [H, T] bool
    """Sinks, newest and heavy tokens; the last two shrink, heavy first, until the runs they force fit the budget."""
    # The paper's shares at 35 % (.08 recent, .02 heavy) and 50 % (.17, .12), a line through both, clamped [spec 6].
    recent = round(ask.N * min(max(0.08 + 0.60 * (share - 0.35), 0.20 * share), 0.50 * share))
    heavy = round(ask.N * min(max(0.02 + 0.667 * (share - 0.35), 0.05 * share), 0.30 * share))
    must = kv.real & ((kv.pos < ask.sink) | (kv.pos >= ask.N - ask.recent))
    new = kv.real & (kv.pos >= ask.N - recent) & ~must
    rest = kv.real & ~must & ~new
    rank = mass.masked_fill(~rest, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(-1)
    newest = new.flip(1).cumsum(1).flip(1) - 1
    most = new.sum(1) + rest.sum(1).clamp(max=heavy)
    rank = torch.where(new, newest, rank + new.sum(1)[:, None])
    return must | first_fitting(rank, most, must, kv.real, ask.B, max_run)


def _too_few(forced: Tensor, real: Tensor, room: Tensor, max_run: int) -> InfeasibleError:
    limit = smallest_limit(forced, real, room)
    return InfeasibleError(
        f"runs of at most max_run={max_run} entries do not fit a budget of {int(room.min())} entries a head",
        f"with what is protected they take {int(fewest_runs(forced, real, max_run).max())}",
        "raise the budget, or " + (f"write max_run={limit}" if limit else "protect less (sink=, recent=)"),
    )


def _sums(part: Tensor, size: Tensor) -> Tensor:  # [E real entries], [R] -> [R]
    return torch.segment_reduce(part, "sum", lengths=size)
