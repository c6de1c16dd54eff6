"""kvcli resume: questions to a snapshot, answers and what they cost."""

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FormatError, MismatchError, UsageError
from . import streams
from .ui import Ui, clean, current, model_options, output_options, peak_memory, size

if TYPE_CHECKING:
    from ..model.load import Model
    from ..model.resume import Answer, Prefix, Sampling
    from ..snapshot import Snapshot


@click.command("resume", short_help="Ask a snapshot questions.")
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("-p", "--prompt", metavar="TEXT|-", help="The question; - reads it from stdin.")
@click.option("--prefix", default="", metavar="TEXT", help="The answer starts so.")
@click.option("--questions", metavar="FILE.jsonl", help='Many: {"prompt", "prefix"?, "answer"?} a line.')
@click.option("--against", metavar="FULL", help="Compare with the full snapshot: KL and top-1 agreement.")
@click.option("-n", "--tokens", type=click.IntRange(1), default=128, show_default=True, help="Most tokens an answer.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Draw from this share.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Draw from so many best tokens; 0: from all.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="For drawing.")
@click.option("--trust-model", is_flag=True, help="Use a model with other weights; warn instead of refusing.")
@model_options
@output_options
def command(file: str | None, prompt: str | None, prefix: str, questions: str | None, **options: Any) -> None:
    """Ask a snapshot: the answer streams to stdout, what it took is told on stderr.

    \b
    Examples:
      kvcli resume --prompt "What changed in Q3?"
      kvcli resume small.kv.safetensors --questions q.jsonl --against full.kv.safetensors
      kvcli prefill report.txt | kvcli compress -m kvmerger -b 35% | kvcli resume -p "What changed?"
    """
    ui = current()
    asked = _questions(file, prompt, prefix, questions)
    facts = _resume(ui, streams.source(file, ui), asked, options)
    if ui.as_json:
        ui.result("kvcli.resume/1", facts)
    else:
        _show(ui, facts)


def _questions(file: str | None, prompt: str | None, prefix: str, path: str | None) -> list[dict[str, Any]]:
    if (prompt is None) == (path is None):
        raise UsageError("ask something: --prompt TEXT or --questions FILE.jsonl, one of them")
    if path is not None:
        return [{"prefix": prefix, **row} for row in _read_questions(path)]
    if prompt == "-":
        if file == "-" or (file is None and streams.is_piped(sys.stdin)):
            raise UsageError("--prompt - and a piped snapshot both want stdin", fix="name the snapshot's FILE")
        prompt = streams.text_of("-").strip()
    return [{"prompt": prompt, "prefix": prefix}]


def _read_questions(path: str) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(streams.text_of(path).split("\n"), 1):
        if line.strip():
            rows.append(_question(line, f"{path}:{number}"))
    if not rows:
        raise FormatError(f"{path} holds no questions")
    return rows


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    good = isinstance(row, dict) and isinstance(row.get("prompt"), str) and isinstance(row.get("prefix", ""), str)
    answers = row.get("answer", "") if good else None
    answers = answers if isinstance(answers, list) else [answers]
    if not good or not answers or not all(isinstance(one, str) for one in answers):
        raise FormatError(f"{where} is not a question", fix='write {"prompt": "...", "answer": "..."} a line')
    return dict(row)


def _resume(ui: Ui, origin: streams.Source, asked: list[dict[str, Any]], options: dict[str, Any]) -> dict[str, Any]:
    with ui.phases() as phase:
        phase("loading torch and transformers")
        from ..model.resume import Prefix, Sampling
        from ..storage import Reader

        with streams.waiting(origin, ui):
            reader = Reader(origin)
        with reader:
            snapshot = reader.snapshot()
            model = _model(ui, snapshot, options, phase)
            start = time.perf_counter()
            prefix = Prefix.read(snapshot, model)
            reader.verify()
            load_seconds = time.perf_counter() - start
        full = _against(options["against"], snapshot, model)
    sampling = Sampling(options["tokens"], options["temperature"], options["top_p"], options["top_k"], options["seed"])
    answers = [_ask(ui, model, prefix, row, sampling, full) for row in asked]
    facts = {"file": streams.shown(origin), "model": model.id, "file_bytes": reader.header.size}
    facts |= {"tokens_reused": prefix.tokens, "tokens_computed": sum(row["computed"] for row in answers)}
    facts |= {"entries": sum(len(rows.k) for rows in prefix.rows), "load_seconds": load_seconds}
    return {**facts, "peak_memory": peak_memory(), "answers": answers, **_totals(answers)}


def _model(ui: Ui, snapshot: "Snapshot", options: dict[str, Any], phase: Any) -> "Model":
    from ..model.identity import check
    from ..model.observe import probe
    from ..model.resume import model_for

    meta = snapshot.meta
    model = model_for(meta, options["model"], device=options["device"], dtype=options["dtype"], tick=phase)
    found = [snapshot.extra[name] for name in ("stat.probe_k", "stat.probe_v") if name in snapshot.extra]
    saved = (found[0], found[1]) if len(found) == 2 else None
    few = snapshot.ids[: found[0].shape[2]] if saved else snapshot.ids[:0]
    check(meta, model, lambda: probe(model, few), saved, trust=options["trust_model"], warn=ui.warn)
    return model


def _against(path: str | None, snapshot: "Snapshot", model: "Model") -> "Prefix | None":
    if path is None:
        return None
    from ..model.resume import Prefix
    from ..storage import Reader

    with Reader(Path(path)) as reader:
        mine, other = snapshot.meta, reader.meta
        if other.seq.ids_hash != mine.seq.ids_hash:
            raise MismatchError(f"{path} is a snapshot of another document", fix="name the full one it was made from")
        if (other.model.get("weights"), other.layout) != (mine.model.get("weights"), mine.layout):
            raise MismatchError(
                f"{path} was made with another model or precision", fix="name the full one it was made from"
            )
        if other.history:
            raise UsageError(f"{path} is compressed", "KL is measured against the full cache", "name the full snapshot")
        return Prefix.read(reader.snapshot(), model)


def _ask(
    ui: Ui, model: "Model", prefix: "Prefix", row: dict[str, Any], sampling: "Sampling", full: "Prefix | None"
) -> dict[str, Any]:
    from ..model.resume import answer, compare
    from ..model.text import question_ids
    from ..tasks.needle import hit

    ids = question_ids(model.tokenizer, row["prompt"], row.get("prefix", ""), prefix.tail)
    said = answer(model, prefix, ids, sampling, _streamer(ui, row))
    if not ui.as_json:
        print(flush=True)
    facts = _answer_facts(row, said)
    if "answer" in row:
        facts["hit"] = hit(said.text, row["answer"])
    if full is not None:
        divergence, same = compare(model, prefix, full, ids, sampling.n)
        facts["kl"], facts["top1"] = divergence.tolist(), same.tolist()
    return facts


def _streamer(ui: Ui, row: dict[str, Any]) -> Any:
    if ui.as_json:
        return lambda text: None
    print(row.get("prefix", ""), end="", flush=True)
    shown = clean if sys.stdout.isatty() else str
    return lambda text: print(shown(text), end="", flush=True)


def _answer_facts(row: dict[str, Any], said: "Answer") -> dict[str, Any]:
    return {
        "prompt": row["prompt"],
        "prefix": row.get("prefix", ""),
        "text": said.text,
        "computed": said.computed,
        "generated": len(said.ids),
        "first_token_seconds": said.first_seconds,
        "tokens_per_second": said.tokens_per_second,
    }


def _totals(answers: list[dict[str, Any]]) -> dict[str, Any]:
    import torch

    from ..metrics import median_p95

    facts: dict[str, Any] = {}
    if marked := [row["hit"] for row in answers if "hit" in row]:
        facts["hits"], facts["asked"] = sum(marked), len(marked)
    if divergence := [value for row in answers for value in row.pop("kl", [])]:
        same = [value for row in answers for value in row.pop("top1")]
        facts["kl_mean"] = sum(divergence) / len(divergence)
        facts["kl_p95"] = median_p95(torch.tensor(divergence))[1]
        facts["top1"] = sum(same) / len(same)
    return facts


def _show(ui: Ui, facts: dict[str, Any]) -> None:
    first = [row["first_token_seconds"] for row in facts["answers"]]
    speed = [row["tokens_per_second"] for row in facts["answers"] if row["tokens_per_second"]]
    ui.say(
        f"{facts['tokens_reused']:,} tokens reused, {facts['tokens_computed']:,} computed; "
        f"{facts['entries']:,} entries, {size(facts['file_bytes'])} read in {facts['load_seconds']:.2f} s"
    )
    rate = f"{sum(speed) / len(speed):.1f} tokens/s, " if speed else ""
    ui.say(f"first token after {sum(first) / len(first):.2f} s, {rate}peak memory {size(facts['peak_memory'])}")
    if "hits" in facts:
        ui.say(f"{facts['hits']} of {facts['asked']} answers found")
    if "kl_mean" in facts:
        ui.say(
            f"against the full cache: KL {facts['kl_mean']:.4f} nats mean, "
            f"{facts['kl_p95']:.4f} at the 95th percentile, top-1 agreement {facts['top1']:.1%}"
        )
