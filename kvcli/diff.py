"""Two snapshots of one document side by side: which entries each keeps, and how far their attention differs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import MismatchError
from .meta import Layout, Meta
from .metrics import median_p95, output_error
from .snapshot import LayerKV, Stats, check_finite

QUERIES = ("q_last", "q_probe")


@dataclass(frozen=True)
class Overlap:
    """The entries of one head in A and in B, told apart by their positions."""

    both: int
    changed: int  # of both: those whose key, value or bias is not the same, such as merged ones
    only_a: Tensor  # [n] int32 positions, rising
    only_b: Tensor

    @property
    def share(self) -> float:
        """Entries in both of those in either."""
        return self.both / (self.both + len(self.only_a) + len(self.only_b))


def overlap(a: LayerKV, b: LayerKV) -> list[Overlap]:  # of H heads
    """What each head of two layers has in common."""
    return [_head(_entries(a, h), _entries(b, h)) for h in range(len(a.pos))]


def _entries(kv: LayerKV, head: int) -> dict[str, Tensor]:
    real = kv.pos[head] >= 0
    bias = torch.zeros(kv.pos.shape[1]) if kv.bias is None else kv.bias[head]
    return {"pos": kv.pos[head][real], "k": kv.k[head][real], "v": kv.v[head][real], "bias": bias[real, None]}


def _head(a: dict[str, Tensor], b: dict[str, Tensor]) -> Overlap:
    in_b, in_a = torch.isin(a["pos"], b["pos"]), torch.isin(b["pos"], a["pos"])
    # Positions rise in either, so that what they share comes in the same order.
    differs = [(a[name][in_b] != b[name][in_a]).any(-1) for name in ("k", "v", "bias")]
    changed = torch.stack(differs).any(0)
    return Overlap(int(in_b.sum()), int(changed.sum()), a["pos"][~in_b], b["pos"][~in_a])


def runs(pos: Tensor) -> list[list[int]]:  # [n] -> first and last of each run
    """Rising positions as stretches without a gap."""
    edge = torch.ones(len(pos) + 1, dtype=torch.bool)
    edge[1:-1] = pos[1:] != pos[:-1] + 1
    return torch.stack([pos[edge[:-1]], pos[edge[1:]]], 1).tolist() if len(pos) else []


def errors(index: int, a: LayerKV, b: LayerKV, stats: tuple[Stats, Stats], layout: Layout) -> dict[str, float]:
    """Median and 95th percentile of |b' - a'| / |a'| at the queries saved in A, else in B; empty where none are."""
    found: dict[str, float] = {}
    sink = next((part.sink_logit for part in stats if part.sink_logit is not None), None)
    for name in QUERIES:
        owner = next((part for part in stats if getattr(part, name) is not None), Stats())
        q, q_pos = getattr(owner, name), getattr(owner, f"{name}_pos")
        if q is not None:
            check_finite(index, **{name: q})
            error = output_error(q, q_pos, a, b, layout.scale, layout.softcap, sink)
            found[f"{name}_median"], found[f"{name}_p95"] = median_p95(error)
    return found


def check_same(a: Meta, b: Meta, names: tuple[str, str]) -> None:
    """Raise MismatchError unless both remember the same tokens in a cache of the same model and shape."""
    if a.seq.ids_hash != b.seq.ids_hash:
        raise MismatchError(
            f"{names[1]} is a snapshot of another document than {names[0]}",
            f"{b.seq.tokens:,} and {a.seq.tokens:,} tokens, not the same",
        )
    if a.model["weights"] != b.model["weights"] or a.layout != b.layout:
        why = f"{_made_with(b)}, not {_made_with(a)}"
        raise MismatchError(f"{names[1]} was made with another model or precision than {names[0]}", why)


def _made_with(meta: Meta) -> str:
    return f"{meta.model['id']} ({meta.layout.dtype}, weights {meta.model['weights'][:12]})"
