"""Small random snapshots for the tests."""

import io
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from xxhash import xxh3_128_hexdigest

from kvcli.layers import NAMES
from kvcli.meta import Json, Layout, Meta, Seq
from kvcli.pipeline import carry_out, make_plans
from kvcli.profiles import save_profile
from kvcli.recipe import Recipe
from kvcli.registry import stages
from kvcli.snapshot import Rows, Snapshot, Stats
from kvcli.storage import Reader, Source, write_snapshot


def make_snapshot(
    layers: int = 2,
    heads: int = 2,
    q_heads: int = 4,
    tokens: int = 13,
    dim: int = 8,
    dtype: torch.dtype = torch.bfloat16,
    ragged: bool = False,
    bias: bool = False,
    stats: bool = True,
    seed: int = 0,
) -> Snapshot:
    """A snapshot as prefill makes it; `ragged` as after eviction by head, `bias` as after merging (bias and span)."""
    rng = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 1000, (tokens,), generator=rng, dtype=torch.int32)
    layout = Layout(layers, heads, q_heads, dim, dim, NAMES[dtype], dim**-0.5, kinds=("full",) * layers)
    seq = Seq(tokens, tokens, xxh3_128_hexdigest(ids.numpy().tobytes()), min(2, tokens), "\n", True)
    model = {"id": "tests/tiny-llama", "revision": "main", "architecture": "llama", "weights": f"{seed:032x}"}
    freq = [10000.0 ** (-2 * i / dim) for i in range(dim // 2)]
    rope = {"rope_type": "default", "rope_theta": 10000.0, "head_dim": dim, "inv_freq": freq}
    rows = [_rows(heads, tokens, dim, dtype, ragged, bias, rng) for _ in range(layers)]
    observed = [_stats(heads, q_heads, tokens, dim, dtype, rng) if stats else Stats() for _ in range(layers)]
    extra = {"stat.final_hidden": torch.randn(q_heads * dim, generator=rng).to(dtype)}
    if stats:
        extra["stat.segments"] = _segments(tokens)
    return Snapshot(Meta(seq, model, "0" * 32, layout, rope), ids, rows, observed, extra)


def _segments(tokens: int) -> torch.Tensor:  # -> [S, 4] int32
    """Paragraphs of 9 tokens behind the template, the last one shorter."""
    begins = torch.arange(min(2, tokens - 1), tokens, 9, dtype=torch.int32)
    ends = torch.cat([begins[1:], torch.tensor([tokens], dtype=torch.int32)])
    kind = torch.zeros_like(begins)
    return torch.stack([begins, ends, kind, torch.arange(len(begins), dtype=torch.int32)], 1)


def _rows(
    heads: int, tokens: int, dim: int, dtype: torch.dtype, ragged: bool, bias: bool, rng: torch.Generator
) -> Rows:
    lens = torch.full((heads,), tokens)
    if ragged:
        lens = torch.randint(1, tokens + 1, (heads,), generator=rng)
        lens[0] = max(1, tokens // 2)
        lens[-1] = tokens if heads > 1 else lens[0]
    pos = [torch.randperm(tokens, generator=rng)[:n].sort().values for n in lens.tolist()]
    total = int(lens.sum())
    k, v = torch.randn(2, total, dim, generator=rng).to(dtype)
    return Rows(
        k=k,
        v=v,
        pos=torch.cat(pos).int(),
        lens=lens,
        bias=torch.rand(total, generator=rng) if bias else None,
        span=torch.randint(1, 4, (total,), generator=rng, dtype=torch.int32) if bias else None,
    )


def _stats(heads: int, q_heads: int, tokens: int, dim: int, dtype: torch.dtype, rng: torch.Generator) -> Stats:
    W = min(4, tokens)
    return Stats(
        q_last=torch.randn(q_heads, W, dim, generator=rng).to(dtype),
        q_last_pos=torch.arange(tokens - W, tokens, dtype=torch.int32),
        q_probe=torch.randn(q_heads, W, dim, generator=rng).to(dtype),
        q_probe_pos=torch.linspace(0, tokens - 1, W).int(),
        attn_mass=torch.rand(heads, tokens, generator=rng),
        value_norm=torch.rand(heads, tokens, generator=rng),
        **_collected(heads, q_heads, tokens, dim, rng),
    )


def _collected(heads: int, q_heads: int, tokens: int, dim: int, rng: torch.Generator) -> dict[str, torch.Tensor]:
    """What prefill records with --collect."""
    spread = torch.randn(q_heads, dim, dim, generator=rng)
    return {
        "mass_sq": torch.rand(heads, tokens, generator=rng),
        "q_mean": torch.randn(q_heads, dim, generator=rng),
        "q_cov": spread @ spread.mT,
        "resid_norm": torch.rand(tokens, generator=rng) + 1,
        "attn_in_norm": torch.rand(tokens, generator=rng) + 1,
        **{name: torch.rand(heads, tokens, generator=rng).half() for name in ("kvzip", "kvzip_rms", "kvzip_plus")},
        "q_repeat": torch.randn(q_heads, min(8, tokens), dim, generator=rng),
        "q_repeat_pos": torch.arange(tokens, tokens + min(8, tokens), dtype=torch.int32),
    }


def make_profiles(snapshot: Snapshot) -> dict[str, Json]:
    """Profiles of the model that made the snapshot, by method, written where `calibrate` puts them."""
    layout, rng = snapshot.meta.layout, torch.Generator().manual_seed(5)
    L, who = layout.layers, {"weights": snapshot.meta.model["weights"]}
    answers = {
        "heads": torch.rand(L, layout.q_heads, generator=rng).tolist(),
        "errors": torch.rand(L, generator=rng).tolist(),
    }
    found = {"answers": answers, "snapshots": {"sigma": torch.rand(L, layout.heads, generator=rng).tolist()}}
    made = {stage.name: {"method": stage.name, **who, **found[stage.profile]} for stage in stages() if stage.profile}
    for profile in made.values():
        save_profile(profile)
    return made


def packed(snapshot: Snapshot) -> bytes:
    """The file as bytes."""
    out = io.BytesIO()
    write_snapshot(snapshot, out)
    return out.getvalue()


def shrunk(snapshot: Snapshot, recipe: str, path: Path, budget: str = "30%", **options: Any) -> Snapshot:
    """The snapshot compressed into a file, which is as large as its plan says; "" is no budget."""
    parsed = Recipe.parse(recipe)
    plans = make_plans(snapshot, parsed, parsed.budgets([budget] if budget else []), **options)
    carry_out(snapshot, plans, [path], force=True)
    assert path.stat().st_size == plans[0].outline.file_bytes
    return opened(path)


def opened(source: Source) -> Snapshot:
    """The snapshot in a file or stream."""
    return Reader(source).snapshot()


def same(a: Any, b: Any) -> None:
    """Two dataclasses of tensors are equal bit for bit."""
    for field in fields(a):
        left, right = getattr(a, field.name), getattr(b, field.name)
        assert (left is None) == (right is None), field.name
        assert left is None or (left.dtype == right.dtype and torch.equal(left, right)), field.name


def same_snapshot(a: Snapshot, b: Snapshot) -> None:
    """Two snapshots are equal but for the features their files required."""
    assert torch.equal(a.ids, b.ids) and replace(a.meta, requires=()) == replace(b.meta, requires=())
    assert len(a.rows) == len(b.rows) and list(a.extra) == list(b.extra)
    assert all(torch.equal(a.extra[name], b.extra[name]) for name in a.extra)
    for i in range(len(a.rows)):
        same(a.rows[i], b.rows[i])
        same(a.stats[i], b.stats[i])
