"""The plan of a file: what is asked of the stages, and what the file will hold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .budget import Budget, protection
from .errors import InfeasibleError, UsageError
from .header import Spec
from .layers import encoder
from .meta import Json
from .outline import Outline
from .profiles import load_profile
from .recipe import Recipe, evicting
from .registry import Ask, Scored
from .snapshot import Snapshot, Stats


@dataclass(frozen=True)
class Plan:
    """One file to be written: what stays in which head, as the first pass decided."""

    recipe: Recipe
    ask: Ask
    scored: Sequence[Scored | None]  # one a layer; None where the layer stays as it is
    outline: Outline
    keep_stats: bool
    device: torch.device  # where both passes work; how many entries stay is decided on the CPU

    @property
    def notes(self) -> list[str]:
        """What the score says of layers, once where several say the same."""
        found: dict[str, list[int]] = {}
        for i, part in enumerate(self.scored):
            if part is not None and part.note:
                found.setdefault(part.note, []).append(i)
        return [f"layer{'s' * (len(at) > 1)} {_ranges(at)}: {note}" for note, at in found.items()]


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3, 5 as `1-3, 5`."""
    starts = [n for n in numbers if n - 1 not in numbers]
    ends = [n for n in numbers if n + 1 not in numbers]
    return ", ".join(f"{a}" if a == b else f"{a}-{b}" for a, b in zip(starts, ends, strict=True))


def find_sliding(snapshot: Snapshot) -> dict[int, Tensor]:
    """Entries a head of the layers that stay as they are."""
    if not snapshot.meta.held:
        raise InfeasibleError(
            "there is nothing to compress: every layer of the model slides over a window shorter than the document",
            "sliding layers are kept as they are",
        )
    return {i: snapshot.rows[i].lens for i in range(len(snapshot.rows)) if i not in snapshot.meta.held}


def check_encoding(snapshot: Snapshot, recipe: Recipe) -> None:
    """Raise InfeasibleError where codes would be made of codes, UsageError where an encoder lacks its score."""
    if recipe.score is None and (score := recipe.encode.stage.after):
        what = f"recipe {str(recipe)!r} names no score"
        raise UsageError(
            what, f"encode {recipe.encode.stage.name} goes by the score of {score}", f"write {score} alone"
        )
    there = encoder(snapshot.meta.encode)
    if there.stage.lossy and recipe.encode.stage.lossy:
        what = f"the snapshot is encoded already, with {there.stage.name}"
        why = f"{recipe.encode.stage.name} would add its own error to that"
        raise InfeasibleError(what, why, "compress the full snapshot, or leave the encoder out of the recipe")


def make_ask(
    snapshot: Snapshot,
    recipe: Recipe,
    budget: Budget | None,
    stats: Sequence[Stats],
    sliding: dict[int, Tensor],
    entry: Json,
) -> Ask:
    """What a budget asks of the stages; `entry` is what the history will say.

    Raises InfeasibleError for a budget that cannot be met, or a profile that is not there.
    """
    if (budget is not None) != recipe.takes_budget:
        raise ValueError(f"budgets are those of recipe.budgets, not {budget} for {recipe}")
    meta, layout = snapshot.meta, snapshot.meta.layout
    N, H, L, lead = meta.seq.tokens, layout.heads, len(meta.held), meta.seq.lead

    def size_of(B: int) -> int:
        return _bytes(snapshot, recipe, B, stats, sliding, entry)

    B = budget.per_head(N, L * H, size_of) if budget else N
    pairs = zip((recipe.sink, recipe.recent), protection(B, lead), strict=True)
    sink, recent = (usual if given is None else given for given, usual in pairs)
    if sink + recent > B and B < N:
        what = f"sink={sink} and recent={recent} do not fit a budget of {B} {'entry' if B == 1 else 'entries'} a head"
        raise InfeasibleError(what, fix=f"keep at least {sink + recent} entries a head, or protect less")
    profiles = {name: load_profile(name, meta.model["weights"]) for name in recipe.profiles}
    rest: dict[str, Any] = {"softcap": layout.softcap, "rope": meta.rope, "profiles": profiles, "held": meta.held}
    segments = snapshot.extra.get("stat.segments")
    ask = Ask(-1, L, L * H * B, B, N, sink, recent, lead, layout.scale, entry["seed"], segments=segments, **rest)
    for step in recipe.steps:
        if "check" in step.stage.parts:
            step.part("check", ask)
    return ask


def _bytes(
    snapshot: Snapshot, recipe: Recipe, B: int, stats: Sequence[Stats], sliding: dict[int, Tensor], entry: Json
) -> int:
    """The most that the file takes for B entries a head, in whatever heads they lie.

    All of a full document is laid out as it is; what is left of a compressed one may lie anyhow.
    """
    meta, layout = snapshot.meta, snapshot.meta.layout
    N, H = meta.seq.tokens, layout.heads
    whole = B == N and not meta.history
    # Heads that differ, so that their lengths and the positions are counted too.
    uneven = [B + 1, *[B] * (H - 2), B - 1] if H > 1 < B else [B + (B == N)] * H
    lens = torch.tensor([N] * H if whole else uneven)
    counts = [sliding.get(i, lens) for i in range(layout.layers)]
    outline = make_outline(snapshot, recipe if B < N else evicting(recipe), counts, stats, entry)
    return outline.file_bytes + (0 if whole else _more(recipe, B, lens, outline))


def _more(recipe: Recipe, B: int, lens: Tensor, outline: Outline) -> int:
    """How many bytes more than laid out with these lengths the file may take with others of the same mean B."""
    more, layout = 8 * len(outline.specs), outline.meta.layout  # offsets may be longer
    if "bound" in recipe.encode.stage.parts:
        found = recipe.encode.part("shapes", lens.tolist(), layout).values()
        most = math.ceil(layout.heads * recipe.encode.part("bound", B, layout))
        more += len(outline.meta.held) * (most - sum(Spec("", dtype, shape).nbytes for dtype, shape in found))
    return more


def make_outline(
    snapshot: Snapshot,
    recipe: Recipe,
    counts: Sequence[Tensor],
    stats: Sequence[Stats],
    entry: Json,
    scored: Sequence[Scored | None] = (),
) -> Outline:
    """What the file will hold: `counts` entries in the heads of each layer."""
    parts = {*recipe.reduce.stage.adds(**recipe.reduce.options), *({"bias", "span"} & {*snapshot.meta.requires})}
    held = snapshot.meta.held
    of = snapshot.meta.seq.tokens * snapshot.meta.layout.heads * len(held)
    entry = {**entry, "entries": sum(int(counts[i].sum()) for i in held), "of": of}
    meta = replace(snapshot.meta, history=(*snapshot.meta.history, entry), encode=recipe.encode.text)
    extra = {**snapshot.lasting, "report": torch.empty(len(counts), 4)}
    first: list[Tensor] = []
    if "split" in recipe.encode.stage.parts:
        pairs = zip(scored or [None] * len(counts), counts, strict=True)
        first = [recipe.encode.part("split", part, count) for part, count in pairs]
    return Outline.of(meta, counts, frozenset(parts), stats, extra, first)
