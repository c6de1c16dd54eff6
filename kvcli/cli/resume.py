"""kvcli resume: questions to a snapshot, answers and what they cost."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import UsageError
from . import streams
from .answers import Facts, Talk, ask, judge, save, total
from .questions import check_options, continuation, questions
from .ui import Ui, current, model_options, output_options, peak_memory, size, uses_kernels

if TYPE_CHECKING:
    from ..model.load import Model
    from ..model.prefix import Prefix
    from ..snapshot import Snapshot
    from ..storage import Reader


@click.command("resume", short_help="Ask a snapshot questions.")
@click.argument("file", required=False, metavar="[FILE|-]")
@click.option("-p", "--prompt", multiple=True, metavar="TEXT|-", help="A question, each on its own; - reads stdin.")
@click.option("--prefix", default="", metavar="TEXT", help="The answer starts so.")
@click.option("--questions", metavar="FILE.jsonl", help='Many: {"prompt", "prefix"?, "answer"?} a line.')
@click.option("--continuation", metavar="FILE", help="No question: how expected is this text behind the document?")
@click.option("--against", metavar="FULL", help="Compare with the full snapshot: KL and top-1 agreement.")
@click.option("-n", "--tokens", type=click.IntRange(1), default=128, show_default=True, help="Most tokens an answer.")
@click.option("--stop", multiple=True, metavar="TEXT", help="The answer ends before this text.")
@click.option("--temperature", type=click.FloatRange(0), default=0.0, show_default=True, help="0 is greedy.")
@click.option("--top-p", type=click.FloatRange(0, 1), default=1.0, show_default=True, help="Draw from this share.")
@click.option("--top-k", type=click.IntRange(0), default=0, help="Draw from so many best tokens; 0: from all.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), default=0, show_default=True, help="For drawing.")
@click.option("--save", metavar="OUT", help="Keep the question and its answer too, as a new snapshot.")
@click.option("-f", "--force", is_flag=True, help="Overwrite an existing OUT.")
@click.option("--jsonl", is_flag=True, help="One JSON object an answer, as each is finished.")
@click.option("--trust-model", is_flag=True, help="Use a model with other weights; warn instead of refusing.")
@model_options
@output_options
@uses_kernels
def command(file: str | None, **options: Any) -> None:
    """Ask a snapshot: the answer streams to stdout, what it took is told on stderr. An empty prompt lets it go on.

    \b
    Examples:
      kvcli resume --prompt "What changed in Q3?"
      kvcli resume -p "Who signed it?" -p "When?" --stop . --jsonl
      kvcli resume report.kv.safetensors -p "What changed?" --save talk.kv.safetensors
      kvcli resume small.kv.safetensors --questions q.jsonl --against full.kv.safetensors
      kvcli prefill report.txt | kvcli compress -m kvmerger -b 35% | kvcli resume -p "What changed?"
    """
    ui = current()
    check_options(file, options, ui.as_json)
    rows = questions(options)
    text = None if options["continuation"] is None else continuation(options["continuation"])
    target = streams.target(options["save"], "", options["force"]) if options["save"] else None
    origin = streams.source(file, ui)
    with _reader(ui, origin) as reader:
        talk, facts = _begin(ui, reader, streams.shown(origin), options)
        turns = [ask(talk, row) for row in rows]
        facts |= total(turns) if text is None else judge(talk, text)
        if target:
            facts["saved"] = save(talk, reader.snapshot(), turns[0], target, options["force"])
    facts = {"file": streams.shown(origin), **facts, "peak_memory": peak_memory()}
    if not ui.as_json:
        _show(ui, facts)
    ui.result("kvcli.resume/1", facts)


def _reader(ui: Ui, origin: streams.Source) -> "Reader":
    with ui.phases() as phase:
        phase("loading torch")
        from ..storage import Reader

        with streams.waiting(origin, ui):
            return Reader(origin)


def _begin(ui: Ui, reader: "Reader", name: str, options: Mapping[str, Any]) -> tuple[Talk, Facts]:
    snapshot = reader.snapshot()
    with ui.phases() as phase:
        phase("loading transformers")
        from ..model.answer import Sampling
        from ..model.prefix import Prefix
        from ..model.resume import check_model, model_for

        how = {name: options[name] for name in ("device", "dtype")}
        model = model_for(reader.meta, options["model"], tick=phase, **how)
        check_model(snapshot, model, trust=options["trust_model"], warn=ui.warn)
        start = time.perf_counter()
        prefix = Prefix.read(snapshot, model)
        reader.verify()
        seconds = time.perf_counter() - start
        full = _against(options["against"], snapshot, name, model)
    drawn = (options[name] for name in ("tokens", "temperature", "top_p", "top_k", "seed", "stop"))
    facts = {"model": model.id, "file_bytes": reader.header.size, "tokens_reused": prefix.tokens}
    facts |= {"entries": sum(int(rows.lens.sum()) for rows in prefix.rows), "load_seconds": seconds}
    return Talk(ui, model, prefix, full, Sampling(*drawn), options["jsonl"], bool(options["save"])), facts


def _against(path: str | None, snapshot: "Snapshot", name: str, model: "Model") -> "Prefix | None":
    if path is None:
        return None
    from ..diff import check_same
    from ..model.prefix import Prefix
    from ..storage import Reader

    with Reader(Path(path)) as reader:
        check_same(snapshot.meta, reader.meta, (name, path))
        if reader.meta.history:
            raise UsageError(f"{path} is compressed", "KL is measured against the full cache", "name the full snapshot")
        return Prefix.read(reader.snapshot(), model)


def _show(ui: Ui, facts: Facts) -> None:
    if "continuation" in facts:
        _show_continuation(facts["continuation"])
    ui.say(
        f"{facts['tokens_reused']:,} tokens reused, {facts['tokens_computed']:,} computed; "
        f"{facts['entries']:,} entries, {size(facts['file_bytes'])} read in {facts['load_seconds']:.2f} s"
    )
    first = [row["first_token_seconds"] for row in facts["answers"]]
    speed = [row["tokens_per_second"] for row in facts["answers"] if row["tokens_per_second"]]
    wait = f"first token after {sum(first) / len(first):.2f} s, " if first else ""
    rate = f"{sum(speed) / len(speed):.1f} tokens/s, " if speed else ""
    ui.say(f"{wait}{rate}peak memory {size(facts['peak_memory'])}")
    if "saved" in facts:
        saved = facts["saved"]
        ui.say(f"{saved['file']}: {saved['tokens']:,} tokens, {saved['added']:,} new, {size(saved['file_bytes'])}")
    if "hits" in facts:
        ui.say(f"{facts['hits']} of {facts['asked']} answers found")
    if "kl_mean" in facts:
        ui.say(f"against the full cache: {_compared(facts)}")


def _show_continuation(facts: Facts) -> None:
    """What was asked for, so it goes to stdout."""
    print(f"perplexity {facts['perplexity']:.4f}, {facts['nll']:.4f} nats a token, {facts['tokens']:,} tokens")
    if "kl_mean" in facts:
        full = f"perplexity {facts['perplexity_against']:.4f}, {facts['nll_against']:.4f} nats a token"
        print(f"the full cache: {full}; {_compared(facts)}")


def _compared(facts: Facts) -> str:
    return (
        f"KL {facts['kl_mean']:.4f} nats mean, {facts['kl_p95']:.4f} at the 95th percentile, "
        f"top-1 agreement {facts['top1']:.1%}"
    )
