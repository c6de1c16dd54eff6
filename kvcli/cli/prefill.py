"""kvcli prefill: documents become snapshots, each its own or behind what a snapshot holds already."""

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import KvError, UsageError
from . import streams
from .ui import (
    Ui,
    collect_option,
    complain,
    current,
    model_options,
    output_options,
    peak_memory,
    segments_option,
    size,
    uses_kernels,
)

if TYPE_CHECKING:
    from ..model.given import Document
    from ..model.load import Model
    from ..snapshot import Snapshot
    from ..storage import Reader

NAME = "{name}"


@dataclass(frozen=True)
class Job:
    """One document to be read."""

    doc: str  # `-` for stdin
    text: str
    target: streams.Source
    label: str


@dataclass(frozen=True)
class Base:
    """What all documents share: the model and, with --onto, the snapshot they are appended to."""

    model: "Model"
    reader: "Reader | None"


@click.command("prefill", short_help="Read a document; keep the model's memory of it as one file.")
@click.argument("docs", nargs=-1, metavar="[DOC|-]...")
@click.option(
    "-o",
    "--output",
    metavar="FILE|-",
    help="Where the snapshot goes [stdout in a pipe, else DOC.kv.safetensors]; {name} is filled in.",
)
@click.option("-f", "--force", is_flag=True, help="Overwrite existing files.")
@click.option("--raw", is_flag=True, help="Read the text as it is, without the model's chat template.")
@click.option("--onto", metavar="SNAP|-", help="Append the document to what this snapshot holds; its model is used.")
@click.option(
    "--probe", metavar="TEXT", help="A likely question, run behind the document: compress keeps what it asks."
)
@click.option("--truncate", is_flag=True, help="Cut a document that is too long, leaving room for question and answer.")
@collect_option()
@segments_option
@click.option("--chunk", type=click.IntRange(1), default=1024, show_default=True, help="Tokens read at a time.")
@model_options
@output_options
@uses_kernels
def command(docs: tuple[str, ...], output: str | None, force: bool, **options: Any) -> None:
    """Read documents once and keep the model's memory of each as one file.

    A .json or .jsonl file of {"role", "content"} messages is read as a chat, unless --raw makes it a text.

    \b
    Examples:
      kvcli prefill report.txt
      kvcli prefill a.txt b.txt c.txt -o 'memory/{name}.kv.safetensors'
      kvcli prefill appendix.txt --onto report.kv.safetensors -o both.kv.safetensors
      kvcli prefill report.txt --collect norms,moments -o report.kv.safetensors
      cat report.txt | kvcli prefill --raw -o report.kv.safetensors -
    """
    if not docs and not streams.is_piped(sys.stdin):
        raise UsageError("no document given", fix="kvcli prefill DOC, or pipe text in")
    ui, docs = current(), docs or ("-",)
    _check(docs, output, options)
    if options["collect"]:
        from ..collect import collected

        options["collect"] = collected(options["collect"])
    found: dict[str, Any] = {}
    jobs = []
    for i, (doc, derived) in enumerate(zip(docs, _derived(docs, output), strict=True), 1):
        with _attempt(doc, len(docs), found):
            text = _text(ui, doc)
            label = doc if len(docs) == 1 else f"{doc}, {i} of {len(docs)}"
            jobs.append(Job(doc, text, streams.target(output and derived, derived, force), label))
    if jobs:
        base = _base(ui, options)
        for job in jobs:
            with _attempt(job.doc, len(docs), found):
                found[job.doc] = _prefill(ui, base, job, force, options)
    piped = any(not isinstance(job.target, Path) for job in jobs)
    ui.result("kvcli.prefill/1", {"rows": [found[doc] for doc in docs]}, to_stderr=piped)
    if codes := [row["error"]["code"] for row in found.values() if "error" in row]:
        raise click.exceptions.Exit(codes[0])


def _check(docs: Sequence[str], output: str | None, options: dict[str, Any]) -> None:
    if options["onto"] is not None:
        if len(docs) > 1:
            raise UsageError("--onto takes one document", "each would be appended on its own", "append them in turn")
        if options["onto"] == "-" and docs[0] == "-":
            raise UsageError("the document and the snapshot both want stdin", fix="name one of them")
        if options["raw"]:
            raise UsageError("--raw with --onto", "the snapshot says whether the chat template is used", "leave it out")
    if options["probe"] is not None and not options["probe"].strip():
        raise UsageError("--probe is empty", fix="give it a question that is likely to be asked")
    if options["segments"] is not None and len(docs) > 1:
        raise UsageError("--segments takes one document", "its stretches are of one text", "prefill them apart")
    if len(docs) > 1 and NAME not in (output or NAME):
        raise UsageError("several documents cannot go to one output", fix="write {name} in it, or leave -o out")
    if len(docs) > 1 and not output and streams.is_piped(sys.stdout):
        raise UsageError("several documents cannot go down one pipe", fix="name the files: -o '{name}.kv.safetensors'")


def _derived(docs: Sequence[str], output: str | None) -> list[str]:
    """The names of the files; UsageError where two are the same."""
    stems = ["stdin" if doc == "-" else streams.stem(doc) for doc in docs]
    names = [(output or NAME + streams.SUFFIX).replace(NAME, stem) for stem in stems]
    if twice := next((name for i, name in enumerate(names) if name in names[:i]), None):
        which = " and ".join(doc for doc, name in zip(docs, names, strict=True) if name == twice)
        raise UsageError(f"{which} would both become {twice}", fix="prefill them apart, each with its own -o")
    return names


def _text(ui: Ui, doc: str) -> str:
    origin: streams.Source = sys.stdin.buffer if doc == "-" else Path(doc)
    with streams.waiting(origin, ui, "a document"):
        return streams.text_of(doc)


@contextmanager
def _attempt(doc: str, documents: int, found: dict[str, Any]) -> Iterator[None]:
    """With several documents, say what is wrong with this one, and go on with the next."""
    try:
        yield
    except KvError as error:
        if documents == 1:
            raise
        complain(f"{doc}: {error.what}", error.why, error.fix)
        found[doc] = {"document": doc, "error": error.facts()}


def _base(ui: Ui, options: dict[str, Any]) -> Base:
    given = {name: options[name] for name in ("device", "dtype")}
    with ui.phases() as phase:
        phase("loading torch and transformers")
        from ..model.load import load
        from ..model.resume import model_for
        from ..storage import Reader

        if options["onto"] is None:
            return Base(load(options["model"], **{**given, "dtype": given["dtype"] or "bfloat16"}, tick=phase), None)
        origin = streams.source(options["onto"], ui)
        with streams.waiting(origin, ui):
            reader = Reader(origin)
        return Base(model_for(reader.meta, options["model"], **given, tick=phase), reader)


def _prefill(ui: Ui, base: Base, job: Job, force: bool, options: dict[str, Any]) -> dict[str, Any]:
    from ..storage import write_snapshot

    start = time.perf_counter()
    snapshot, told = _read(ui, base, job, options)
    seconds, tokens = time.perf_counter() - start, snapshot.meta.seq.tokens
    facts = {
        "document": job.doc,
        "file": streams.shown(job.target),
        "model": snapshot.meta.model["id"],
        "dtype": snapshot.meta.layout.dtype,
        "tokens": tokens,
        "tokens_reused": base.reader.meta.seq.tokens if base.reader else 0,
        "entries": sum(len(rows.k) for rows in snapshot.rows),
        "kv_bytes": sum(rows.k.nbytes + rows.v.nbytes for rows in snapshot.rows),
        "file_bytes": write_snapshot(snapshot, job.target, force=force),
        "seconds": seconds,
        "peak_memory": peak_memory(),
        "warnings": told,
    }
    read = tokens - facts["tokens_reused"]
    ui.say(
        f"{streams.titled(job.target)}: {tokens:,} tokens, {size(facts['file_bytes'])}, "
        f"read {f'{read:,} of them ' if base.reader else ''}in {seconds:.1f} s ({read / seconds:,.0f} tokens/s)"
    )
    return facts


def _read(ui: Ui, base: Base, job: Job, options: dict[str, Any]) -> "tuple[Snapshot, list[str]]":
    """The snapshot and the warnings the user was given."""
    from ..api import prefill

    told: list[str] = []

    def warn(text: str) -> None:
        ui.warn(f"{job.doc}: {text}")
        told.append(text)

    onto = base.reader.snapshot() if base.reader else None
    how = {name: options[name] for name in ("raw", "probe", "truncate", "chunk", "collect", "segments")}
    document = job.text if options["raw"] else _document(ui, job)
    with ui.progress(f"reading {job.label}") as tick:
        snapshot = prefill(document, base.model, **how, onto=onto, warn=warn, tick=tick)
    if base.reader:
        base.reader.verify()
    return snapshot, told


def _document(ui: Ui, job: Job) -> "Document":
    """The text, or the messages of the chat that it holds."""
    from ..model.chat import FILES, messages

    if not job.doc.lower().endswith(FILES):
        return job.text
    chat = messages(job.text)
    held = f"a chat of {len(chat):,} message{'s' * (len(chat) > 1)}" if chat else "a text: it is no list of messages"
    ui.say(f"{job.doc} is read as {held}")
    return chat or job.text
