"""Decoding behind 8,000 tokens: a full DynamicCache, the same with most entries masked, and our snapshots."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from kvcli.budget import Budget
from kvcli.model.cache import make_cache, named
from kvcli.model.load import Model
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix
from kvcli.pipeline import carry_out, make_plans
from kvcli.recipe import Recipe
from kvcli.snapshot import Snapshot
from kvcli.storage import Reader

TOKENS, NEW = 8000, 32
RECIPES = {"uniform": "snapkv", "ragged": "snapkv+adakv", "merged": "kvmerger"}


def masked_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **rest: Any
) -> tuple[Tensor, None]:
    """As kvpress does for methods that keep other entries in every head: the cache stays whole, and before each call
    the keys to be ignored are overwritten by one that points away from all queries."""
    queries = query.unflatten(1, (key.shape[1], -1)).mean((2, 3))[0]  # [H, D]
    away = -1e5 * queries / queries.norm(dim=-1, keepdim=True) ** 2
    heads, entries = module.hidden
    key[0, heads, entries] = away[heads].to(key.dtype)
    return sdpa_attention_forward(module, query, key, value, mask, **rest)


AttentionInterface.register("masked", masked_attention)
AttentionMaskInterface.register("masked", sdpa_mask)


@torch.inference_mode()
def decoding(
    model: Model, plain: Model, ids: list[int], folder: Path, versus: Callable[..., dict[str, Any]]
) -> list[dict[str, Any]]:
    """Ratios of the time of NEW greedy tokens."""
    snapshot = prefill(model, (ids * (1 + TOKENS // len(ids)))[:TOKENS], (0, "\n", False))
    what = f"decoding {NEW} tokens behind {TOKENS:,} from {{}} / from keep 35% {{}}"
    whole = "the full DynamicCache"
    rows = []
    for kind, recipe in RECIPES.items():
        carry_out(snapshot, make_plans(snapshot, Recipe.parse(recipe), [Budget.parse("35%")]), [folder / kind])
        with Reader(folder / kind) as reader:
            prefix = Prefix.read(reader.snapshot(), model)

        def ours(prefix: Prefix = prefix) -> None:
            greedy(model, make_cache(model.net, prefix.rows, prefix.tokens))

        theirs = from_full(plain, full_cache(plain, snapshot))
        rows.append(versus(what.format(whole, kind), "at least 1.4", theirs, ours))
        if kind == "ragged":
            hide(plain, prefix)
            plain.net.set_attn_implementation("masked")
            rows.append(versus(what.format(f"{whole} with masked entries", kind), "at least 2", theirs, ours))
            plain.net.set_attn_implementation("sdpa")
    return rows


def full_cache(plain: Model, snapshot: Snapshot) -> DynamicCache:
    cache = DynamicCache(config=plain.net.config)
    for i, rows in enumerate(snapshot.rows):
        k, v = (part.view(1, len(rows.lens), TOKENS, -1) for part in (rows.k, rows.v))
        cache.update(k, v, i)
    return cache


def hide(plain: Model, prefix: Prefix) -> None:
    """What a layer's attention is to ignore: entries that the prefix does not have."""
    for layer, rows in zip(plain.net.model.layers, prefix.rows, strict=True):
        gone = torch.ones(len(rows.lens), TOKENS, dtype=torch.bool)
        for head, pos in zip(gone, rows.pos.split(rows.lens.tolist()), strict=True):
            head[pos.long()] = False
        layer.self_attn.hidden = gone.nonzero(as_tuple=True)


def from_full(plain: Model, cache: DynamicCache) -> Callable[[], None]:
    def run() -> None:
        greedy(plain, cache)
        cache.crop(TOKENS - cache.get_seq_length())  # as it was

    return run


def greedy(model: Model, cache: Any) -> None:
    token = torch.tensor([[5]])
    for _ in range(NEW):
        out = model.net(input_ids=token, use_cache=True, logits_to_keep=1, **named(model.net, cache))
        token = out.logits[:, -1:].argmax(-1)
