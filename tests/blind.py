"""make peer: kvpress and kvcli on questions nobody knew while compressing, as rows of samples/blind.jsonl.

`python tests/blind.py PEER` takes the interpreter of an environment that has kvpress. Facts are hidden in passages of
the sample, a third of it for each seed; what follows the passage is the continuation whose divergence is measured too.
Intervals are a bootstrap over the texts. Rows that a file already has of the same job are not measured again.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from beside import DTYPE, divergence, make_job, theirs
from peer import next_of

import kvcli
import kvcli.api
from kvcli.header import summary as summary_of
from kvcli.model.batch import answers
from kvcli.model.load import Model, load
from kvcli.model.prefix import Prefix
from kvcli.model.text import plain_ids
from kvcli.recipe import Recipe, collect_of
from kvcli.stamp import stamp
from kvcli.tally import Metric, measured
from kvcli.tally import mean as mean_of
from kvcli.tasks import needle
from kvcli.tasks.hay import fit
from kvcli.tasks.scores import hit
from kvcli.tasks.task import Case

ROOT = Path(__file__).parent.parent
ROWS = ROOT / "samples/blind.jsonl"
SEEDS, COPIES, FACTS = (1, 2, 3), 12, 6
PROSE, ANSWER = 840, 10  # tokens
BUDGETS = (0.35, 0.1, 0.05)
PRESSES = {BUDGETS: ["kvzip"], BUDGETS[1:]: ["keydiff", "adakv+expected", "compactor"]}
BEST = "kvzip:sink=4,recent=1+matching"
RECIPES = {
    BEST: (0.35, 0.2, 0.1, 0.05),
    f"{BEST}+kivi:bits=4": (0.2,),
    "kvzip:sink=4,recent=0+matching": BUDGETS,
    "kvzip:sink=1,recent=1+matching": BUDGETS,
    "kvzip:sink=4,recent=0": BUDGETS,
    "layer-defensivekv": BUDGETS,
}


def make_cases(model: Model, copies: int = COPIES) -> list[Case]:
    """Passages with facts in them, and what follows each passage."""
    ids = plain_ids(model.tokenizer, (ROOT / "samples/harbour.txt").read_text(encoding="utf-8"))
    third, found = len(ids) // len(SEEDS), []
    for i, seed in enumerate(SEEDS):
        part = model.tokenizer.decode(ids[i * third : (i + 1) * third]).strip()
        prose = fit(part, PROSE, lambda text: len(plain_ids(model.tokenizer, text)))
        for copy in range(1, copies + 1):
            hay = needle.facts(prose, FACTS, f"{seed} {copy}")
            asked = tuple(replace(one, n=ANSWER) for one in hay.questions)
            name = f"passage {i + 1}, copy {copy}"
            found.append(Case("blind", name, hay.text, asked, continuation=part[len(prose) :].strip()))
    return found


def ours(model: Model, job: dict[str, Any], cells: Sequence[tuple[str, float]]) -> Iterator[dict[str, Any]]:
    """A row a text for the full cache and each cell, as `peer.measure` gives them; several questions at a time."""
    collect = collect_of([(Recipe.parse(recipe), None) for recipe, _ in cells])
    for seed, case in enumerate(job["cases"]):
        print(f"kvcli: text {seed + 1} of {len(job['cases'])}", file=sys.stderr)
        begin = time.perf_counter()
        full = kvcli.prefill(case["ids"], model, collect=collect)
        prefill_seconds = time.perf_counter() - begin
        reference = Prefix.read(full, model)
        ids, n = [one["ids"] for one in case["questions"]], [one["n"] for one in case["questions"]]
        wanted = answers(model, reference, ids, n)
        for recipe, keep in [("full", 1.0), *cells]:
            begin = time.perf_counter()
            small = full if recipe == "full" else kvcli.compress(full, recipe, keep, seed=seed)
            seconds = {"prefill_seconds": prefill_seconds, "compress_seconds": time.perf_counter() - begin}
            prefix = Prefix.read(small, model)
            said = answers(model, prefix, ids, n)
            found = [divergence(model, prefix, reference, a, b) for a, b in zip(ids, wanted, strict=True)]
            pairs = [{"ids": its, **apart} for its, apart in zip(said, found, strict=True)]
            row = {"case": case["name"], "method": recipe, "budget": keep, "bytes": kv_bytes(small), **seconds}
            first, rest = next_of(case)
            ahead = divergence(model, prefix, reference, first["ids"], rest)
            yield {**row, "answers": pairs, "continuation": ahead}


def kv_bytes(snapshot: kvcli.api.Snapshot) -> int:
    """Of keys and values, as they are stored."""
    if snapshot.file is None:
        return sum(rows.k.nbytes + rows.v.nbytes for rows in snapshot.rows)
    return int(summary_of(snapshot.file.header, snapshot.meta)["kv_bytes"])


def summary(rows: Sequence[dict[str, Any]], cases: Sequence[Case], tokenizer: Any) -> Iterator[dict[str, Any]]:
    """A row for each method and budget; a number with the ends of its interval of 95 %."""
    asked = {case.name: case.questions for case in cases}
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["budget"]), []).append(row)
    full = mean(row["bytes"] for row in groups["full", 1.0])
    for (method, budget), some in groups.items():
        about = {"method": method, "budget": budget, "texts": len(some)}
        if errors := [row["error"] for row in some if "error" in row]:
            yield {**about, "error": errors[0]}
            continue
        hits, kls, ahead = list[tuple[int, float]](), list[tuple[int, float]](), list[tuple[int, float]]()
        for i, row in enumerate(some):
            for one, question in zip(row["answers"], asked[row["case"]], strict=True):
                text = tokenizer.decode(one["ids"], skip_special_tokens=True)
                hits.append((i, float(hit(text, question.answer))))
                kls.append((i, one["kl"]))
            ahead.append((i, row["continuation"]["kl"]))
        numbers = {"hit": interval(hits), "kl": interval(kls), "continuation_kl": interval(ahead)}
        held = mean(row["bytes"] for row in some)
        times = {name: median(row[name] for row in some) for name in ("prefill_seconds", "compress_seconds")}
        yield {**about, "n": len(hits), **numbers, "bytes": held, "keep": held / full, **times}


def interval(pairs: Sequence[tuple[int, float]]) -> list[float]:
    """Mean, and the 2.5th and 97.5th percentile of its bootstrap over texts."""
    group, x = (torch.tensor(part) for part in zip(*pairs, strict=True))
    found = measured(x.double(), group, Metric("x", mean_of), draws=2000)
    return [found.value, *torch.quantile(found.draws, torch.tensor([0.025, 0.975]).double()).tolist()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", help="python of an environment with kvpress")
    parser.add_argument("--copies", type=int, default=COPIES, help="of each passage")
    parser.add_argument("--output", type=Path, default=ROWS)
    given = parser.parse_args()
    model = load(None, device="cpu", dtype=DTYPE)
    cases = make_cases(model, given.copies)
    job = make_job(model, cases, BUDGETS)
    what = hashlib.sha256(json.dumps([job["cases"], job["dtype"]]).encode()).hexdigest()[:16]
    known = [json.loads(line) for line in given.output.read_text().splitlines()] if given.output.exists() else []
    known = [row for row in known if row["job"] == what]
    done = {(row["by"], row["method"], row["budget"]) for row in known}
    about = {"job": what, "date": date.today().isoformat(), "model": model.id, "dtype": DTYPE}
    about |= {"tokens": round(mean(len(case["ids"]) for case in job["cases"])), **stamp(model.device)}
    about |= {"threads": torch.get_num_threads()}

    def add(by: str, rows: Sequence[dict[str, Any]], **more: Any) -> None:
        for row in summary(rows, cases, model.tokenizer):
            if (by, row["method"], row["budget"]) not in done:
                done.add((by, row["method"], row["budget"]))
                with given.output.open("a") as out:
                    out.write(json.dumps({"by": by, **row, **about, **more}) + "\n")

    given.output.write_text("".join(json.dumps(row) + "\n" for row in known))
    for budgets, presses in PRESSES.items():
        if left := [press for press in presses if any(("kvpress", press, each) not in done for each in budgets)]:
            config, rows = theirs(given.peer, {**job, "presses": left, "budgets": budgets})
            add("kvpress", rows, **config)
    every = [(recipe, budget) for recipe, budgets in RECIPES.items() for budget in budgets]
    cells = [cell for cell in every if ("kvcli", *cell) not in done]
    if cells:
        add("kvcli", [*ours(model, job, cells)])


if __name__ == "__main__":
    main()
