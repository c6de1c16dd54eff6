"""TOVA: what the last query attends to, the same tokens in all heads of a layer."""

from typing import Literal

from ..options import AtLeast1
from ..registry import Ask, Scored, Source, score
from ..snapshot import LayerKV, Stats
from ..window import over_heads, received

SOURCE = Source("arXiv:2401.06104", 2024, question=True, checked="worked examples, kvpress")


@score(needs=("q_last",), source=SOURCE)
def tova(kv: LayerKV, stats: Stats, ask: Ask, *, rows: AtLeast1 = 1, heads: Literal["layer", "kv"] = "layer") -> Scored:
    """Attention from the last `rows` queries, mean over all `heads` of the layer or over those of each KV head.

    One cut behind the document. While it reads, the paper drops a token at a time, which needs every query.
    """
    each = received(kv, stats, ask, rows)
    return Scored(each if heads == "kv" else kv.by_entry(over_heads(kv, each, ask.N)))
