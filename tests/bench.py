"""make bench: quality on hidden facts and ratios of speed, as rows of samples/bench.jsonl and as text.

`make bench WHAT=kvmerger` measures one kind alone: quality, known (the question, by --probe), kvmerger (its
variants beside H2O and SnapKV) or ratio.
"""

import json
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from ratios import ratios

from kvcli.bench import stamp
from kvcli.budget import Budget
from kvcli.metrics import kl, median_p95, top1
from kvcli.model.answer import Sampling, answer
from kvcli.model.extend import aim
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix, logits
from kvcli.model.text import document_ids, question_ids
from kvcli.pipeline import carry_out, make_plans
from kvcli.recipe import Recipe
from kvcli.snapshot import Snapshot
from kvcli.storage import Reader, write_snapshot
from kvcli.tasks.needle import facts
from kvcli.tasks.scores import hit
from kvcli.tasks.task import Question

ROOT = Path(__file__).parent.parent
RECIPES = ("random", "streamingllm", "knorm", "keydiff", "h2o", "snapkv", "snapkv+adakv", "kvmerger")
VARIANTS = (
    "kvmerger:values=count",
    "kvmerger:values=mean",
    "kvmerger:values=logcount",
    "kvmerger:values=logcount,keys=pivot",
    "kvmerger:values=logcount,keys=rerotate",
    "kvmerger:values=logcount+global",
    "h2o",
    "snapkv",
)
GRIDS = {
    "quality": (RECIPES, ("50%", "35%", "20%")),
    "known": (("snapkv", "snapkv+adakv"), ("35%", "20%")),
    "kvmerger": (VARIANTS, ("50%", "35%")),
}
COPIES, FACTS, TOKENS = 4, 6, 16


class Tally:
    """Hits and divergence of one recipe and budget over all questions."""

    def __init__(self) -> None:
        self.hits: list[bool] = []
        self.kl: list[float] = []
        self.top1: list[bool] = []
        self.sizes: dict[str, float] = {}

    def row(self, kind: str, recipe: str, budget: str) -> dict[str, Any]:
        row = {"kind": kind, "recipe": recipe, "budget": budget, "hits": sum(self.hits), "asked": len(self.hits)}
        if self.kl:
            row |= {"kl_mean": sum(self.kl) / len(self.kl), "kl_p95": median_p95(torch.tensor(self.kl))[1]}
            row |= {"top1": sum(self.top1) / len(self.top1)}
        return row | {name: total / COPIES for name, total in self.sizes.items()}


def quality(model: Model, kind: str) -> list[dict[str, Any]]:
    recipes, budgets = GRIDS[kind]
    prose = (ROOT / "samples/harbour.txt").read_text()
    tallies: dict[tuple[str, str], Tally] = {}
    with TemporaryDirectory() as folder:
        for seed in range(COPIES):
            hay = facts(prose, FACTS, seed)
            ids, lead, tail = document_ids(model.tokenizer, hay.text, chat=True)
            snapshot = prefill(model, ids, (lead, tail, True))
            full = Path(folder) / "full.kv.safetensors"
            write_snapshot(snapshot, full, force=True)
            asked = [ask_full(model, full, question, tallies) for question in hay.questions]
            groups = [(snapshot, asked)] if kind != "known" else [(aimed(model, snapshot, one), [one]) for one in asked]
            for recipe, (source, some) in product(recipes, groups):
                paths = [Path(folder) / f"{budget}.kv.safetensors" for budget in budgets]
                plans = make_plans(source, Recipe.parse(recipe), [Budget.parse(budget) for budget in budgets])
                carry_out(source, plans, paths, force=True)
                for budget, path in zip(budgets, paths, strict=True):
                    ask_small(model, path, some, tallies.setdefault((recipe, budget), Tally()))
            print(f"copy {seed + 1} of {COPIES} done", file=sys.stderr)
    return [tally.row(kind, *name) for name, tally in tallies.items()]


def read(model: Model, path: Path, tally: Tally) -> Prefix:
    with Reader(path) as reader:
        prefix = Prefix.read(reader.snapshot(), model)
        entries = sum(len(rows.k) for rows in prefix.rows)
        keep = entries / (prefix.tokens * sum(len(rows.lens) for rows in prefix.rows))
    add = {"keep": keep, "entries": entries, "file_bytes": reader.header.size}
    if len(tally.hits) % FACTS == 0:
        tally.sizes = {name: tally.sizes.get(name, 0) + value for name, value in add.items()}
    return prefix


Asked = tuple[Question, list[int], list[int], torch.Tensor]


def ask_full(model: Model, path: Path, question: Question, tallies: dict[tuple[str, str], Tally]) -> Asked:
    """The full cache's own greedy continuation and its logits; also the plain chat, without the answer's start."""
    tally, chat = (
        tallies.setdefault(("full", "100%"), Tally()),
        tallies.setdefault(("full, plain chat", "100%"), Tally()),
    )
    prefix = read(model, path, tally)
    read(model, path, chat)
    ids = question_ids(model.tokenizer, question.prompt, question.prefix, prefix.tail)
    said = answer(model, prefix, ids, Sampling(n=TOKENS))
    tally.hits.append(hit(said.text, question.answer))
    plain = question_ids(model.tokenizer, question.prompt, "", prefix.tail)
    chat.hits.append(hit(answer(model, prefix, plain, Sampling(n=48)).text, question.answer))
    both = [*ids, *said.ids[:-1]]
    return question, ids, both, logits(model, prefix, both, len(said.ids))


def aimed(model: Model, snapshot: Snapshot, asked: Asked) -> Snapshot:
    """The snapshot as `prefill --probe` makes it with the very question, without the start of its answer."""
    return aim(model, snapshot, question_ids(model.tokenizer, asked[0].prompt, "", snapshot.meta.seq.tail))


def ask_small(model: Model, path: Path, asked: list[Asked], tally: Tally) -> None:
    prefix = read(model, path, tally)
    for question, ids, both, reference in asked:
        tally.hits.append(hit(answer(model, prefix, ids, Sampling(n=TOKENS)).text, question.answer))
        other = logits(model, prefix, both, len(reference))
        tally.kl += kl(reference, other).tolist()
        tally.top1 += top1(reference, other).tolist()


def commit() -> str:
    describe = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(describe, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip()


def show(row: dict[str, Any]) -> str:
    if row["kind"] not in GRIDS:
        return f"{row['what']:<86} {row['ratio']:6.2f}  (aim {row['aim']})"
    divergence = f"KL {row['kl_mean']:.3f}  top-1 {row['top1']:.1%}" if "kl_mean" in row else ""
    size = f"{row['file_bytes'] / 1e6:6.1f} MB"
    return f"{row['recipe']:<38} {row['budget']:>4}  {row['hits']:>2} of {row['asked']}  {size}  {divergence}"


def main() -> None:
    model = load(None, dtype="bfloat16")
    which = sys.argv[1:] or [*GRIDS, "ratio"]
    path = ROOT / "samples/bench.jsonl"
    old = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    rows = {kind: [row for row in old if row["kind"] == kind] for kind in (*GRIDS, "ragged", "ratio")}
    for kind in which:
        fresh = quality(model, kind) if kind in GRIDS else ratios(model)
        rows |= {
            kind: [{**row, **stamp(model.device), "commit": commit()} for row in fresh if row["kind"] == kind]
            for kind in {row["kind"] for row in fresh}
        }
    every = [row for kind in rows.values() for row in kind]
    path.write_text("".join(json.dumps(row) + "\n" for row in every))
    print("\n".join(show(row) for row in every))


if __name__ == "__main__":
    main()
