"""Speed as ratios, both sides measured in turn in one run: medians, with the 20th and 80th percentile of each."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from big import make_big
from decoding import decoding
from transformers import DynamicCache

from kvcli.budget import Budget
from kvcli.header import summary
from kvcli.kernels.attention import causal_attention
from kvcli.kernels.mass import attention_mass
from kvcli.meta import Layout
from kvcli.model.answer import Sampling, answer
from kvcli.model.attend import Law
from kvcli.model.cache import Layer, make_cache, named
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix
from kvcli.model.text import document_ids, question_ids
from kvcli.pipeline import carry_out, make_plans
from kvcli.recipe import Recipe
from kvcli.storage import Reader, write_snapshot

ROOT = Path(__file__).parent.parent


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def versus(
    what: str, aim: str, ours: Callable[[], object], theirs: Callable[[], object], runs: int = 5
) -> dict[str, Any]:
    """A row with the ratio of median times, ours over theirs, after one run of each that is not counted."""
    pairs = [(timed(ours), timed(theirs)) for _ in range(runs + 1)][1:]
    return row(what, aim, [a for a, _ in pairs], [b for _, b in pairs])


def row(what: str, aim: str, ours: list[float], theirs: list[float]) -> dict[str, Any]:
    spread = [torch.tensor(side).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist() for side in (ours, theirs)]
    ratio = spread[0][1] / spread[1][1]
    return {"kind": "ratio", "what": what, "ratio": ratio, "aim": aim, "first_s": spread[0], "second_s": spread[1]}


def ratios(model: Model) -> list[dict[str, Any]]:
    plain = load(None, dtype="bfloat16", attention="sdpa")
    rows = [prefilling(model, plain), *massing()]
    with TemporaryDirectory() as folder:
        rows += from_file(model, plain, Path(folder))
        rows += decoding(model, plain, document(model)[0], Path(folder), versus)
        rows.append(starting())
        rows += compressing(Path(folder))
    return rows


@torch.inference_mode()
def prefilling(model: Model, plain: Model) -> dict[str, Any]:
    text = (ROOT / "samples/harbour.txt").read_text()
    ids = document_ids(model.tokenizer, text * 2, chat=True)[0][:4096]
    whole = torch.tensor([ids])
    return versus(
        "prefill of 4,096 tokens with statistics / one plain forward pass",
        "at most 2.1",
        lambda: prefill(model, ids, (0, "", True)),
        lambda: plain.net(input_ids=whole, logits_to_keep=1, use_cache=True),
        runs=3,
    )


@torch.inference_mode()
def massing() -> list[dict[str, Any]]:
    """Shapes of the default model and of an 8B model."""
    rows = []
    for H, G, D, T in ((3, 3, 64, 4096), (8, 4, 128, 2048)):
        case = {"H": H, "G": G, "D": D, "T": T, "M": None}
        q, k, lse, scale, causal, _ = attention_mass.inputs(case, torch.bfloat16, 0)
        what = f"attention mass of {T:,} tokens, {H * G} query and {H} KV heads of {D} / one flash forward"
        flash = partial(causal_attention, q, k, k, scale)
        rows.append(versus(what, "at most 1.4", partial(attention_mass, q, k, lse, scale, causal), flash, 9))
    return rows


def document(model: Model) -> tuple[list[int], int, str]:
    text = (ROOT / "samples/harbour.txt").read_text()
    return document_ids(model.tokenizer, text, chat=True)


@torch.inference_mode()
def from_file(model: Model, plain: Model, folder: Path) -> list[dict[str, Any]]:
    ids, lead, tail = document(model)
    question = question_ids(model.tokenizer, "What changed in the third quarter?", "", tail)
    snapshot = prefill(model, ids, (lead, tail, True))
    write_snapshot(snapshot, folder / "full")
    for recipe, budget in (("snapkv", "35%"), ("snapkv+adakv", "35%"), ("snapkv+adakv", "20%")):
        plans = make_plans(snapshot, Recipe.parse(recipe), [Budget.parse(budget)])
        carry_out(snapshot, plans, [folder / f"{recipe} {budget}"])

    def resumed() -> None:
        with Reader(folder / "full") as reader:
            prefix = Prefix.read(reader.snapshot(), model)
            reader.verify()
        answer(model, prefix, question, Sampling(n=1))

    def again() -> None:
        plain.net(input_ids=torch.tensor([ids + question]), logits_to_keep=1, use_cache=True)

    rows = [raggedness(model, folder / "snapkv+adakv 20%", question)]
    rows += [versus("prefilling again / full snapshot file to first token", "at least 10", again, resumed, runs=3)]
    cache = DynamicCache(config=plain.net.config)
    plain.net(input_ids=torch.tensor([ids]), logits_to_keep=1, **named(plain.net, cache))
    for recipe, name in (("snapkv", "uniform"), ("snapkv+adakv", "ragged")):
        with Reader(folder / f"{recipe} 35%") as reader:
            prefix = Prefix.read(reader.snapshot(), model)
        what = f"decoding 32 tokens from the full DynamicCache / from keep 35% {name}"
        rows.append(
            versus(
                what, "at least 1", lambda: greedy(plain, cache, question), lambda p=prefix: ours(model, p, question), 3
            )
        )
    return rows


def raggedness(model: Model, path: Path, question: list[int]) -> dict[str, Any]:
    """What a ragged file holds beside keys and values, and the largest memory resuming asks for at once."""
    with Reader(path) as reader:
        facts = summary(reader.header, reader.meta)
        layout, prefix = reader.meta.layout, Prefix.read(reader.snapshot(), model)
    entry = 2 * (layout.head_dim + layout.v_dim)
    if facts["kv_bytes"] != facts["entries"] * entry:
        raise ValueError(f"{facts['kv_bytes']} bytes of keys and values, {facts['entries']} entries of {entry} bytes")
    asked = largest_allocation(lambda: attending(prefix, layout, len(question)))
    padded = max(len(rows.lens) * int(rows.lens.max()) * layout.head_dim * 2 for rows in prefix.rows)
    kept = max(rows.k.nbytes for rows in prefix.rows)
    return {
        "kind": "ratio",
        "what": "snapkv+adakv at 20%: bytes beside keys and values / file",
        "ratio": 1 - facts["kv_bytes"] / facts["file_bytes"],
        "aim": "under 0.05",
        "entries": facts["entries"],
        "kv_bytes": facts["kv_bytes"],
        "file_bytes": facts["file_bytes"],
        "largest_allocation_of_attention": asked,
        "largest_keys_of_a_layer": kept,
        "the_same_padded": padded,
    }


def attending(prefix: Prefix, layout: Layout, new: int) -> None:
    """The attention of a question of `new` tokens and of one token more, in every layer; nothing else of the model."""
    for rows in prefix.rows:
        layer = Layer(rows, prefix.tokens)
        for count in (new, 1):
            k = rows.k.new_ones(1, layout.heads, count, layout.head_dim)
            layer.update(k, k)
            layer.attend_lse(rows.k.new_ones(layout.q_heads, count, layout.head_dim), Law(layout.scale))


def largest_allocation(work: Callable[[], object]) -> int:
    """Bytes of the largest single block of memory torch asks for during `work`."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as seen:
        work()
    return max(event.nbytes() for event in seen.profiler.kineto_results.events() if event.name() == "[memory]")


def ours(model: Model, prefix: Prefix, question: list[int]) -> None:
    """The same loop as `greedy`, on a snapshot."""
    greedy_on(model, make_cache(model.net, prefix.rows, prefix.tokens), question)


def greedy(model: Model, cache: DynamicCache, question: list[int]) -> None:
    before = cache.get_seq_length()
    greedy_on(model, cache, question)
    cache.crop(before - cache.get_seq_length())


def greedy_on(model: Model, cache: Any, question: list[int]) -> None:
    tokens = torch.tensor([question])
    for _ in range(32):
        tokens = (
            model.net(input_ids=tokens, use_cache=True, logits_to_keep=1, **named(model.net, cache))
            .logits[:, -1:]
            .argmax(-1)
        )


def starting() -> dict[str, Any]:
    def run(*args: str) -> Callable[[], object]:
        return lambda: subprocess.run([sys.executable, *args], stdout=subprocess.DEVNULL, check=True)

    what = "kvcli --help / importing click"
    return versus(what, "at most 3", run("-m", "kvcli", "--help"), run("-c", "import click"), runs=9)


def compressing(folder: Path) -> list[dict[str, Any]]:
    make_big(folder / "big")
    runs = {"ours": [], "theirs": []}
    peaks = {}
    for _ in range(3):
        for side in runs:
            facts = json.loads(subprocess.check_output([sys.executable, ROOT / "tests/big.py", side, folder]))
            runs[side].append(facts["seconds"])
            peaks[side] = facts
    size = (folder / "big").stat().st_size / 2**30
    speed = row(f"compress of {size:.2f} GiB by kvmerger to 35% / cloning and rewriting it", "at most 3", **runs)
    facts = peaks["ours"]
    over = (facts["peak"] - facts["baseline"] - 2 * facts["layer"] - facts["scores"]) / 1e6
    what = "MB of peak memory of that compress beyond torch, two layers and the scores"
    return [speed, {"kind": "ratio", "what": what, "ratio": over, "aim": "at most 250", **facts}]
