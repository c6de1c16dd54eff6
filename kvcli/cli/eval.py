"""kvcli eval: what each method loses on documents and tasks, beside the full cache and no document at all."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import GateError, UsageError
from . import streams
from .inputs import Options, gather, given
from .tables import print_tables
from .ui import Ui, complain, current, grid_options, model_options, output_options, uses_kernels

if TYPE_CHECKING:
    from ..evaluate import Grid, Key, Unit, Work
    from ..ledger import Ledger
    from ..model.load import Model

SCHEMA, LOG = "kvcli.eval/1", "kvcli.eval.sample/1"
# What is measured where nothing else is asked for.
METHODS, BUDGETS = "random,streamingllm,keydiff,snapkv,snapkv+adakv,h2o,kvmerger", "35%"


@click.command("eval", short_help="Measure what methods lose on a document or a benchmark.")
@click.argument("docs", nargs=-1, metavar="[DOC|SNAP|-]...")
@click.option("-t", "--task", multiple=True, metavar="TASK,...", help="What is asked [needle,ppl].")
@grid_options(METHODS, BUDGETS)
@click.option("--questions", metavar="FILE.jsonl", help='About each DOC: {"prompt", "prefix"?, "answer"} a line.')
@click.option("--continuation", metavar="FILE", help="How expected is this text behind each DOC?")
@click.option("--known", is_flag=True, help="Compress for each question anew, with the question known.")
@click.option("--truncate", is_flag=True, help="Cut a document that is too long.")
@click.option("-n", "--tokens", type=click.IntRange(1), help="Most tokens an answer [as the task says].")
@click.option("--limit", type=click.IntRange(1), help="Most documents a task.")
@click.option("-o", "--output", metavar="FILE.json", help="Write what --json shows to a file.")
@click.option("--log", metavar="FILE.jsonl", help="Every answer, a line each; an interrupted run goes on from it.")
@click.option("-f", "--force", is_flag=True, help="Overwrite existing files.")
@click.option("--fail-under", multiple=True, metavar="METRIC=VALUE", help="Exit 7 if a method stays below.")
@click.option("--markdown", is_flag=True, help="Print the tables as Markdown.")
@model_options
@output_options
@uses_kernels
def command(docs: tuple[str, ...], **options: Any) -> None:
    """Measure what compression loses, before the questions are known: facts found, perplexity, divergence.

    Each document is read once, compressed by every method to every budget, and asked. Beside the methods stand
    two anchors, the full cache and no document; recovery says how much of the way between them is kept.

    \b
    Tasks:
      needle[:KIND]     facts hidden in the document: single, keys, values, variables, common, frequent, all
      ppl               perplexity of the document's last quarter, which is held out
      qa:FILE           JSONL, {"context", "questions": [{"prompt", "prefix"?, "answer"}]} a line
      longbench:FILE    JSONL as LongBench publishes it
      zeroscrolls:FILE  JSONL as ZeroSCROLLS publishes it

    \b
    Examples:
      kvcli eval report.txt -m kvmerger,snapkv,h2o -b 50%,35%,20%
      kvcli eval --task needle:keys,tokens=4000,copies=1 -m keydiff --raw --fail-under top1=0.2
      kvcli eval full.kv.safetensors --questions q.jsonl -m snapkv -b 35% --log answers.jsonl
    """
    ui = current()
    gates = _gates(ui, options)
    output = _output(options["output"], options["force"])
    with ui.phases() as phase:
        phase("loading torch and transformers")
        from ..evaluate import Grid
        from ..recipe import collect_of, grid

        cells = grid(options["method"] or (METHODS,), options["budget"], BUDGETS)
        options["collect"] = collect_of(cells)
        found = given(ui, docs, options, phase)
        plan = Grid(cells, options["seed"], options["known"])
    works = gather(ui, found, plan, options)
    _check_gates(gates, works)
    run = _Run(found.model, works, plan, _config(found.model, works, options))
    units = run.units(ui, options)
    facts = {"config": run.config, **_facts(units)}
    _hand_out(ui, facts, output, options)
    missed = [*_missed(facts["rows"], gates)]
    for text in missed:
        complain(text)
    if codes := [row["error"]["code"] for row in facts["errors"]] + [GateError.exit_code] * bool(missed):
        raise click.exceptions.Exit(codes[0])


def _hand_out(ui: Ui, facts: dict[str, Any], output: Path | None, options: Options) -> None:
    """To stdout as JSON or tables, and then to the file, which may fail."""
    ui.result(SCHEMA, facts)
    if not ui.as_json:
        print_tables(facts["rows"], options["markdown"])
    if output:
        streams.write_text(output, json.dumps({"schema": SCHEMA, **facts}, indent=1) + "\n", options["force"])


def _output(name: str | None, force: bool) -> Path | None:
    """Where the results go, looked at before any work is done."""
    if name is None:
        return None
    target = streams.target(name, "", force)
    if not isinstance(target, Path):
        raise UsageError("-o needs a FILE", fix="--json writes to stdout")
    return target


def _gates(ui: Ui, options: Options) -> dict[str, float]:
    """By metric what no method may stay below; UsageError for options that do not go together."""
    if ui.as_json and options["markdown"]:
        raise UsageError("--json and --markdown exclude each other", fix="give one of them")
    if options["output"] and options["output"] == options["log"]:
        raise UsageError("-o and --log name the same file", fix="name two")
    gates = dict(map(_gate, options["fail_under"]))
    if len(gates) < len(options["fail_under"]):
        raise UsageError("--fail-under names a metric twice", fix="give it once")
    return gates


def _gate(text: str) -> tuple[str, float]:
    name, _, value = text.partition("=")
    try:
        least = float(value)
    except ValueError:
        least = math.nan
    if math.isnan(least):
        raise UsageError(f"--fail-under {text!r}", fix="write METRIC=VALUE, such as hit=0.8")
    return name, least


def _check_gates(gates: Mapping[str, float], works: "Sequence[Work]") -> None:
    from ..tally import metrics_of
    from ..trial import values_of

    known = {name: metric for work in works for name, metric in metrics_of(values_of(work.case)).items()}
    for name in gates:
        if name not in known:
            raise UsageError(f"--fail-under {name}: no task has this metric", f"there are {', '.join(known)}")
        if not known[name].rises:
            raise UsageError(f"--fail-under {name}", "of this metric less is better", "top1 says how far two agree")


def _config(model: "Model", works: "Sequence[Work]", options: Options) -> dict[str, Any]:
    """What the numbers depend on, methods and budgets apart."""
    from ..evaluate import digest
    from ..stamp import stamp
    from ..tasks import version
    from .inputs import specs

    tasks = {spec: version(spec) for spec in specs(options)}
    asked = {name: options[name] for name in ("raw", "known", "truncate", "tokens", "limit", "seed")}
    who = {"model": model.id, **{name: model.identity[name] for name in ("weights", "dtype")}}
    return {**who, **stamp(model.device), "tasks": tasks, **asked, "cases": digest(works)}


@dataclass(frozen=True)
class _Run:
    """What is measured, and what was found."""

    model: "Model"
    works: "Sequence[Work]"
    grid: "Grid"
    config: dict[str, Any]

    def keys(self) -> "list[Key]":
        """In the order of the rows."""
        return [work.key(name) for work in self.works for name in work.names(self.grid)]

    def units(self, ui: Ui, options: Options) -> "list[Unit]":
        """Those that --log has, and the rest measured now; errors are told as they come."""
        from ..ledger import Ledger

        if options["log"] is None:
            return self.measured(ui, None)
        with Ledger(Path(options["log"]), LOG) as ledger:
            _agree(ledger, self.config)
            return self.measured(ui, ledger)

    def measured(self, ui: Ui, ledger: "Ledger | None") -> "list[Unit]":
        from ..evaluate import evaluate, lines, logged

        earlier = logged(ledger.rows[1:]) if ledger else []
        keys, told = self.keys(), set[str]()
        found = {unit.key: unit for unit in earlier if unit.key in keys}
        if found:
            ui.say(f"{len(found)} of {len(keys)} were measured before")
        with ui.progress("measuring") as tick:
            for unit in evaluate(self.model, self.works, self.grid, {*found}):
                found[unit.key] = unit
                if ledger:
                    ledger.put(*lines(unit))
                _tell(unit, told)
                tick(len(found), len(keys))
        return [found[key] for key in keys]


def _agree(ledger: "Ledger", config: dict[str, Any]) -> None:
    """The first row of a log says what its numbers depend on."""
    if not ledger.rows:
        ledger.put({"config": config})
        return
    theirs, ours = ledger.rows[0].get("config") or {}, json.loads(json.dumps(config))
    if theirs != ours:
        unlike = sorted(name for name in {*theirs, *ours} if theirs.get(name) != ours.get(name))
        what = f"the log is of a run that differs in {', '.join(unlike)}"
        raise UsageError(what, "numbers of different runs do not mix", "name another log, or delete this one")


def _tell(unit: "Unit", told: set[str]) -> None:
    """An error once for each document, with the method it first met."""
    error, (_, document, method, budget) = unit.error, unit.key
    if error and (text := f"{document}: {error.what}") not in told:
        told.add(text)
        complain(f"{document}, {' '.join(filter(None, (method, budget)))}: {error.what}", error.why, error.fix)


def _facts(units: "Sequence[Unit]") -> dict[str, Any]:
    from ..evaluate import KEY
    from ..tally import rows

    bad = [(unit, unit.error) for unit in units if unit.error]
    errors = [{**dict(zip(KEY, unit.key, strict=True)), "error": error.facts()} for unit, error in bad]
    return {"rows": rows(units), "errors": errors}


def _missed(rows: Sequence[dict[str, Any]], gates: Mapping[str, float]) -> Iterator[str]:
    """What stays below a gate, in words."""
    from ..evaluate import FULL, NONE

    for row in rows:
        if (row["method"], row["budget"]) not in (FULL, NONE) and row["value"] < gates.get(row["metric"], -math.inf):
            where = " ".join(filter(None, (row["method"], row["budget"])))
            yield f"{row['task']}: {row['metric']} of {where} is {row['value']:.4g}, under {gates[row['metric']]:g}"
