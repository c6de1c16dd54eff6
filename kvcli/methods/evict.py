"""The default reduction: what is not kept is dropped."""

from torch import Tensor

from ..registry import Ask, Scored, reduce
from ..snapshot import LayerKV, Stats, gather, mask_index, top_mask


@reduce()
def evict(kv: LayerKV, stats: Stats, scored: Scored, count: Tensor, ask: Ask) -> tuple[LayerKV, Tensor]:
    """Keep the highest scores of each head, bit for bit and in order."""
    index = mask_index(top_mask(scored.score, count) & kv.real)
    return gather(kv, index), index
