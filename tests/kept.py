"""make peer: do kvcli and kvpress keep the same entries, on the same tokens with the same protection?

`python tests/kept.py PEER` takes the interpreter of an environment that has kvpress. Both sides read the same ids in
float32: a text with the default model, and random ids with a random one. Rows go to samples/kept.jsonl.
"""

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from beside import theirs
from tiny import tiny_model

import kvcli
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.text import document_ids, opening_ids
from kvcli.recipe import Recipe, collect_of
from kvcli.snapshot import Snapshot
from kvcli.stamp import stamp

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "samples/kept.jsonl"
TOKENS, BUDGETS, WINDOW = 1000, (0.5, 0.35, 0.1), 64
WATCHING = f"window={WINDOW},kernel=5,pool=avg,sink=0,recent={WINDOW}"

SIZES = "the same entries in other numbers: "
TEMPLATE = "of the chat template its softmax has 4 tokens, ours all, as the model's own"


@dataclass(frozen=True)
class Pair:
    """The same method of both sides."""

    recipe: str
    press: str
    options: Callable[[float], dict[str, float]] = lambda keep: {}  # of the press
    why: str = ""  # where the two are not meant to agree
    chat: bool = False  # read behind the chat template, whose tokens the press leaves without a score in any case


PAIRS = (
    Pair("knorm:sink=0,recent=0", "knorm"),
    Pair("keydiff:sink=0,recent=0", "keydiff"),
    Pair("streamingllm:sink=4,recent=0", "streamingllm"),
    Pair(f"snapkv:{WATCHING}", "snapkv"),
    Pair("tova:sink=0,recent=1", "tova"),
    Pair("lagkv:sink=4,recent=0", "lagkv", why="at 10 % the last lag alone is too much; ours is its end"),
    Pair(f"critical:{WATCHING}", "critical+snapkv", why="ours is half without the window, theirs with it"),
    # The same half, so that all else can be compared.
    Pair(f"critical:{WATCHING}", "critical+snapkv", lambda keep: {"first_stage_ratio": half(keep)}),
    Pair(f"snapkv:{WATCHING}+adakv:floor=0", "adakv+snapkv", lambda keep: {"alpha_safeguard": 0.0}),
    Pair(f"snapkv:{WATCHING}+adakv", "adakv+snapkv", why=f"{SIZES}our floor is mixed in as published, theirs reserved"),
    Pair("expected:rope_average=reference,sink=4,recent=0", "expected attention"),
    Pair(
        "expected:rope_average=reference,epsilon=0.01,sink=4,recent=0+adakv:floor=0",
        "adakv+expected",
        lambda keep: {"alpha_safeguard": 0.0},
    ),
    Pair(
        "expected:sink=4,recent=0",
        "expected attention",
        why="ours has all the variance that rotations leave; a mean of rotations has less",
    ),
    Pair("kvzip:sink=4,recent=0", "kvzip", why=TEMPLATE, chat=True),
    Pair("kvzip:sink=4,recent=0,share=layer", "kvzip", lambda keep: {"layerwise": True}, TEMPLATE, chat=True),
    Pair("kvzip:sink=4,recent=0,plus", "kvzip", lambda keep: {"kvzip_plus_normalization": True}, TEMPLATE, chat=True),
    Pair(f"pyramidkv:{WATCHING}", "pyramidkv", why=f"{SIZES}our steps lie beside the window, theirs begin under it"),
)


def half(keep: float) -> float:
    """The share of a budget that kvpress has to take first so that it is half of it and the window."""
    B = round(keep * TOKENS)
    return (min(B // 2, B - WINDOW) + WINDOW) / B


def make_job(model: Model, name: str, ids: list[int], pairs: Sequence[Pair]) -> dict[str, Any]:
    """What `peer.py` reads."""
    presses = [[pair.press, keep, pair.options(keep)] for pair, keep in product(pairs, BUDGETS)]
    head = {"model": str(model.folder), "dtype": "float32", "presses": presses, "kept": True}
    return {**head, "cases": [{"name": name, "ids": ids, "questions": []}]}


def positions(small: Snapshot) -> list[list[set[int]]]:
    """What every head of every layer keeps."""
    return [[{*head.tolist()} for head in rows.pos.split(rows.lens.tolist())] for rows in small.rows]


def shares(ours: list[list[set[int]]], other: list[list[list[int]]]) -> dict[str, Any]:
    """What is common of all entries, and of the smaller set of each head; how many heads differ in size."""
    pairs = [pair for layers in zip(ours, other, strict=True) for pair in zip(*layers, strict=True)]
    both = sum(len(mine & {*its}) for mine, its in pairs)
    most = max(sum(len(mine) for mine, _ in pairs), sum(len(its) for _, its in pairs))
    return {
        "same": both / most,
        "agree": both / sum(min(len(mine), len(its)) for mine, its in pairs),
        "sizes_differ": sum(len(mine) != len(its) for mine, its in pairs) / len(pairs),
        "entries": [sum(len(mine) for mine, _ in pairs), sum(len(its) for _, its in pairs)],
    }


def compared(
    interpreter: str, model: Model, name: str, ids: list[int], pairs: Sequence[Pair] = PAIRS
) -> Iterator[dict[str, Any]]:
    """A row for each method and budget, first of those that read the ids alone, then of those behind the template."""
    for chat in (False, True):
        some = [pair for pair in pairs if pair.chat == chat]
        lead, tail = opening_ids(model.tokenizer, True) if chat else ([], "\n")
        read = [*lead, *ids][:TOKENS]
        config, rows = theirs(interpreter, make_job(model, name, read, some))
        names = collect_of((Recipe.parse(pair.recipe), None) for pair in some)
        full = prefill(model, read, (len(lead), tail, chat), collect=names)
        for (pair, keep), row in zip(product(some, BUDGETS), rows, strict=True):
            small = kvcli.compress(full, pair.recipe, keep)
            about = {"cache": name, "recipe": pair.recipe, "press": pair.press, "why": pair.why, "budget": keep}
            rest = {"options": row["options"], "tokens": len(read), "kvpress": config["kvpress"]}
            yield {**about, **rest, **shares(positions(small), row["kept"])}


def main() -> None:
    about = {"date": date.today().isoformat(), **stamp(torch.device("cpu"))}
    with TemporaryDirectory() as folder:
        sizes = {"num_hidden_layers": 4, "hidden_size": 128, "num_attention_heads": 8, "head_dim": 16}
        tiny = tiny_model(Path(folder) / "tiny", max_position_embeddings=4096, **sizes)
        default, made_up = load(None, device="cpu", dtype="float32"), load(str(tiny), device="cpu", dtype="float32")
        text = (ROOT / "samples/harbour.txt").read_text(encoding="utf-8")
        read = document_ids(default.tokenizer, text, chat=False)[0][:TOKENS]
        drawn = torch.randint(0, 250, (TOKENS,), generator=torch.Generator().manual_seed(0)).tolist()
        rows = [*compared(sys.argv[1], default, "a text", read), *compared(sys.argv[1], made_up, "random", drawn)]
    ROWS.write_text("".join(json.dumps({**row, **about}) + "\n" for row in rows))
    for row in rows:
        shares = f"{row['same']:.2%} {row['agree']:.2%} {row['sizes_differ']:.0%}"
        print(f"{row['cache']:<8} {row['recipe']:<60} {row['budget']:.0%} {shares}")


if __name__ == "__main__":
    main()
