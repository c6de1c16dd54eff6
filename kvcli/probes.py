"""What queries from all over a document attend to: shared by the methods that ask more than its end."""

from dataclasses import replace

import torch
from torch import Tensor

from .kernels.rope import rotate
from .registry import Ask
from .snapshot import LayerKV, Stats
from .window import last_queries, over_heads, received


def spread_queries(stats: Stats, N: int) -> tuple[Tensor, Tensor]:  # -> [Hq, R, D], [R]
    """The queries of a document of N tokens that were saved, spread ones, if any, then the last; their positions."""
    q, q_pos = last_queries(stats, N)
    if stats.q_probe is None or stats.q_probe_pos is None:
        return q, q_pos
    spread = stats.q_probe_pos < q_pos[0]  # the others would count twice
    return torch.cat([stats.q_probe[:, spread], q], 1), torch.cat([stats.q_probe_pos[spread], q_pos])


def turned_queries(stats: Stats, ask: Ask) -> tuple[Tensor, Tensor]:  # -> [Hq, R, D] float32, [R]
    """The saved queries of the document, turned as if they stood behind it, one after the other, and saw all of it.

    Where the model's rotation is not known, the last queries from where they are.
    """
    if ask.freq is None:
        q, q_pos = last_queries(stats, ask.N)
        return q.float(), q_pos
    q, q_pos = spread_queries(stats, ask.N)
    to = ask.N + torch.arange(len(q_pos), dtype=q_pos.dtype, device=q_pos.device)
    return rotate(q, to - q_pos, ask.freq), to


def probe_mass(kv: LayerKV, stats: Stats, ask: Ask) -> tuple[Tensor, Tensor]:  # -> [N], [N] float32
    """Attention each position gets from the last and the spread queries, and the same by query that can see it.

    Summed over the queries, mean over all query heads; each query looks back from its own place. Needs q_last, q_probe.
    The newest are seen by few queries, their own above all, and look large by query: `recent=` keeps them anyway.
    """
    q, q_pos = spread_queries(stats, ask.N)
    each = received(kv, replace(stats, q_last=q, q_last_pos=q_pos), ask, len(q_pos))
    mass = over_heads(kv, each, ask.N)
    seen = (torch.arange(ask.N, device=q_pos.device) <= q_pos[:, None]).sum(0)
    return mass, mass / seen.clamp(min=1)


def remaining(mass: Tensor) -> Tensor:  # [N] -> [N] float32
    """The share of the mass in the k-th largest and all smaller ones, falling from 1.

    Added up from the smallest, since what is left of 1 would be rounding. No mass at all counts as even.
    """
    rising = torch.where(mass.sum() > 0, mass, 1.0).double().sort().values.cumsum(0)
    return (rising / rising[-1]).flip(0).float()


def needed(rest: Tensor, tau: float) -> int:  # [N]
    """The fewest that hold the share `tau`: as long as more than 1 - tau is left, in float32, one more."""
    return int((rest > 1 - tau).sum())
