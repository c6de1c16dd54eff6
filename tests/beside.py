"""make peer: kvpress and kvcli on the same model, tokens, questions and budgets, as rows of samples/peer.jsonl.

`python tests/beside.py PEER` takes the interpreter of an environment that has kvpress, which runs `peer.py`; then our
side is measured in this process. Both run on the CPU; the answers of both are decoded and judged here.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import date
from itertools import product
from pathlib import Path
from statistics import mean, median
from tempfile import TemporaryDirectory
from typing import Any

import peer
import torch
from docs import peer_table

import kvcli
from kvcli.model.answer import Answer, Sampling, answer
from kvcli.model.load import Model, load
from kvcli.model.prefix import Prefix
from kvcli.model.resume import expected
from kvcli.model.text import document_ids, plain_ids, question_ids, stop_ids
from kvcli.stamp import stamp
from kvcli.tasks import needle
from kvcli.tasks.scores import hit
from kvcli.tasks.task import Case, Question, Setting

ROOT = Path(__file__).parent.parent
DTYPE = "bfloat16"
AHEAD = 128  # tokens of what follows a text
# The same method of both sides, ours first; what only one side has stands alone.
PAIRS = (
    ("full", "full"),
    ("random", "random"),
    ("streamingllm", "streamingllm"),
    ("knorm", "knorm"),
    ("keydiff", "keydiff"),
    ("snapkv", "snapkv"),
    ("snapkv+adakv", "adakv+snapkv"),
    ("h2o", "observed attention"),
    ("kvmerger", ""),
    ("", "tova"),
    ("", "expected attention"),
    ("", "adakv+expected"),
    ("", "compactor"),
    ("", "kvzip"),
)
RECIPES = [recipe for recipe, _ in PAIRS[1:] if recipe]


def make_job(model: Model, cases: Iterable[Case], budgets: Sequence[float]) -> dict[str, Any]:
    """What `peer.py` reads: documents without a chat template, and questions with the start of their answers."""
    rows = []
    for case in cases:
        ids, _, tail = document_ids(model.tokenizer, case.text, chat=False)
        asked = [
            {"ids": question_ids(model.tokenizer, one.prompt, one.prefix, tail), "n": one.n} for one in case.questions
        ]
        rows.append({"name": case.name, "ids": ids, "questions": asked})
        if case.continuation:
            rows[-1]["continuation"] = plain_ids(model.tokenizer, case.continuation)[:AHEAD]
    stops = stop_ids(model.net, model.tokenizer, tail)
    head = {"model": str(model.folder), "dtype": DTYPE, "stops": stops, "budgets": list(budgets)}
    return {**head, "presses": [press for _, press in PAIRS[1:] if press], "cases": rows}


def ours(model: Model, job: dict[str, Any], recipes: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Our rows, as `peer.measure` makes theirs; compressing is scoring, writing the file and measuring its error."""
    for seed, case in enumerate(job["cases"]):
        print(f"kvcli: text {seed + 1} of {len(job['cases'])}", file=sys.stderr)
        begin = time.perf_counter()
        full = kvcli.prefill(case["ids"], model)
        prefill_seconds = time.perf_counter() - begin
        reference = Prefix.read(full, model)
        said = [answer(model, reference, one["ids"], Sampling(n=one["n"])) for one in case["questions"]]
        for recipe, keep in [("full", 1.0), *product(recipes, job["budgets"])]:
            begin = time.perf_counter()
            small = full if recipe == "full" else kvcli.compress(full, recipe, keep, seed=seed)
            seconds = {"prefill_seconds": prefill_seconds, "compress_seconds": time.perf_counter() - begin}
            prefix = Prefix.read(small, model)
            asked = zip(case["questions"], said, strict=True)
            answers = [ask(model, prefix, reference, one, its) for one, its in asked]
            row = {"case": case["name"], "method": recipe, "budget": keep, "bytes": nbytes(prefix)}
            yield {**row, **seconds, "answers": answers}


def ask(model: Model, prefix: Prefix, full: Prefix, question: dict[str, Any], said: Answer) -> dict[str, Any]:
    mine = answer(model, prefix, question["ids"], Sampling(n=question["n"]))
    found = divergence(model, prefix, full, question["ids"], said.ids)
    return {"ids": mine.ids, "seconds": mine.seconds - mine.first_seconds, **found}


def divergence(model: Model, prefix: Prefix, full: Prefix, ids: Sequence[int], said: Sequence[int]) -> dict[str, float]:
    """As `peer.divergence`, along what follows these ids."""
    found = expected(model, prefix, full, [*ids, *said], len(said))
    return {name: float(found[name].float().mean()) for name in ("kl", "top1")}


def nbytes(prefix: Prefix) -> int:
    """Bytes of what attention reads: keys, values, and biases where entries were merged."""
    parts = (part for rows in prefix.rows for part in (rows.k, rows.v, rows.bias) if part is not None)
    return sum(part.nbytes for part in parts)


def theirs(interpreter: str, job: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The versions and rows of kvpress; isolated, so that nothing of this folder or environment gets in its way."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "job.json"
        path.write_text(json.dumps(job))
        command = [interpreter, "-I", str(Path(peer.__file__)), str(path)]
        try:
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        except (OSError, subprocess.CalledProcessError) as cause:
            sys.exit(f"{cause}\ngive the python of an environment that has kvpress: make peer PEER=/path/to/python")
    config, *rows = map(json.loads, done.stdout.splitlines())
    if {name: config.pop(name) for name in ("weights", "ids")} != peer.fingerprint(job):
        sys.exit("kvpress read other weights or other tokens than we did")
    return config, rows


def summary(rows: Sequence[dict[str, Any]], cases: Sequence[Case], tokenizer: Any) -> dict[tuple[str, float], Any]:
    """One row for each method and budget: means over questions and texts, medians of seconds."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["method"], row["budget"]), []).append(row)
    full = [row["bytes"] for row in groups["full", 1.0]]
    asked = {case.name: case.questions for case in cases}
    found = {}
    for (method, budget), some in groups.items():
        head = {"method": method, "budget": budget}
        errors = [row["error"] for row in some if "error" in row]
        rest = {"error": errors[0]} if errors else averages(some, asked, tokenizer, mean(full))
        found[method, budget] = {**head, **rest}
    return found


def averages(
    rows: Sequence[dict[str, Any]], asked: dict[str, tuple[Question, ...]], tokenizer: Any, full: float
) -> dict[str, Any]:
    pairs = [(one, question) for row in rows for one, question in zip(row["answers"], asked[row["case"]], strict=True)]
    said = [tokenizer.decode(one["ids"], skip_special_tokens=True) for one, _ in pairs]
    hits = [hit(text, question.answer) for text, (_, question) in zip(said, pairs, strict=True)]
    share = mean(hits)
    row = {"hit": share, "stderr": (share * (1 - share) / len(hits)) ** 0.5, "n": len(hits)}
    row |= {name: mean(one[name] for one, _ in pairs) for name in ("kl", "top1")}
    row |= {"bytes": (held := mean(one["bytes"] for one in rows)), "keep": held / full}
    row |= {name: median(one[name] for one in rows) for name in ("prefill_seconds", "compress_seconds")}
    tokens, seconds = sum(len(one["ids"]) - 1 for one, _ in pairs), sum(one["seconds"] for one, _ in pairs)
    return row | {"tokens_per_second": tokens / seconds if seconds else 0.0}


def agreement(rows: Sequence[dict[str, Any]], others: Sequence[dict[str, Any]]) -> int:
    """How many questions the full caches of both sides answer with the same tokens."""
    mine, their = ([row["answers"] for row in side if row["method"] == "full"] for side in (rows, others))
    pairs = (pair for texts in zip(mine, their, strict=True) for pair in zip(*texts, strict=True))
    return sum(a["ids"] == b["ids"] for a, b in pairs)


def merged(sides: dict[str, dict[tuple[str, float], Any]], budgets: Sequence[float]) -> list[dict[str, Any]]:
    """The rows of both, budget by budget, the same method of both sides one below the other."""
    keys = [(pair, budget) for budget in (1.0, *budgets) for pair in PAIRS]
    cells = ((side, (name, budget)) for pair, budget in keys for side, name in zip(sides, pair, strict=True))
    return [{"by": side, **sides[side][cell]} for side, cell in cells if cell in sides[side]]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", help="python of an environment with kvpress")
    parser.add_argument("--texts", type=int, default=10)
    parser.add_argument("--facts", type=int, default=6, help="hidden in each text")
    parser.add_argument("--tokens", type=int, default=1000, help="of each text")
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.35, 0.10])
    parser.add_argument("--output", type=Path, default=ROOT / "samples/peer.jsonl")
    return parser.parse_args()


def main() -> None:
    given = options()
    model = load(None, device="cpu", dtype=DTYPE)
    sample = (ROOT / "samples/harbour.txt").read_text(encoding="utf-8")
    setting = Setting([("harbour", sample)], lambda text: len(model.tokenizer.encode(text)))
    cases = needle.cases(f"tokens={given.tokens},copies={given.texts},facts={given.facts}", setting)
    job = make_job(model, cases, given.budgets)
    config, other = theirs(given.peer, job)
    mine = list(ours(model, job, RECIPES))
    run = {"date": date.today().isoformat(), "model": model.id, "dtype": DTYPE, "texts": len(cases)}
    run |= {"tokens": round(mean(len(case["ids"]) for case in job["cases"])), "agree": agreement(mine, other)}
    stamps = {"kvcli": {**stamp(model.device), "threads": torch.get_num_threads()}}
    stamps["kvpress"] = {**config, **{name: stamps["kvcli"][name] for name in ("device", "processor")}}
    sides = {"kvcli": mine, "kvpress": other}
    found = merged({side: summary(rows, cases, model.tokenizer) for side, rows in sides.items()}, given.budgets)
    lines = [json.dumps({**row, **run, **stamps[row["by"]]}) + "\n" for row in found]
    given.output.write_text("".join(lines))
    print(peer_table(given.output))


if __name__ == "__main__":
    main()
