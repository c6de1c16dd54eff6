"""KVzip: entries that the model needs to write the document out again, whatever will be asked."""

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from ..errors import InfeasibleError
from ..registry import Ask, Scored, Source, allocate, score
from ..shares import by_rank, by_rank_in_layers, evenly
from ..snapshot import LayerKV, Stats

SOURCE = Source("arXiv:2505.23416", 2025, checked="worked examples, kvpress")


@score(needs=("kvzip", "kvzip_rms"), source=SOURCE)
def kvzip_score(
    kv: LayerKV, stats: Stats, ask: Ask, *, agg: Literal["max", "rms"] = "max", plus: bool = False
) -> Scored:
    """The most attention an entry receives while the model repeats the document; `agg=rms` is the root mean square.

    `plus` weighs it by the size of the value behind the output projection, beside that of the hidden state (KVzip+).
    """
    part = stats.kvzip_plus if plus else stats.kvzip_rms if agg == "rms" else stats.kvzip
    if part is None:
        what = "kvzip:plus needs kvzip_plus, which this snapshot does not have"
        raise InfeasibleError(what, "the model does not show its output projection", "leave plus out")
    return Scored(kv.by_entry(part.float()))


@kvzip_score.check
def check(ask: Ask, *, agg: str, plus: bool) -> None:
    if plus and agg == "rms":
        raise InfeasibleError("kvzip: agg=rms and plus do not go together", "KVzip+ is a maximum", "leave one out")


@allocate(source=SOURCE)
def kvzip(
    scored: Sequence[Scored], n: int, ask: Ask, *, share: Literal["global", "layer", "uniform"] = "global"
) -> list[Tensor]:
    """One ranking over all layers and heads, or over the heads of each layer, or the same number for every head."""
    if share == "global":
        return by_rank(scored, n, 0)
    return evenly(scored, n) if share == "uniform" else by_rank_in_layers(scored, n)
