"""What methods have to know of a model, measured: on questions that it answers, or on snapshots that it made."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .document import naming
from .errors import InfeasibleError, MismatchError, UsageError
from .kernels.window import window_scores
from .meta import Json
from .model import text as texts
from .model.load import Model
from .model.observe import prefill
from .model.prefix import Prefix
from .model.resume import question
from .model.watched import Watched, speak
from .pipeline import protect
from .recipe import Recipe
from .registry import Ask
from .snapshot import LayerKV, Snapshot
from .tasks import cases
from .tasks.scores import SCORES
from .tasks.task import Case, Question, Setting

CAPACITY, RECENT = 32, 8  # entries a head whose loss is measured, the newest of them always kept (arXiv:2508.02401)
TOKENS = 1000  # of a document
SEED = 2508  # other facts than those that `eval` asks for
Tick = Callable[[int, int], None]


@dataclass(frozen=True)
class Run:
    """A question about a document that was read, and where in it the answer stands."""

    prefix: Prefix
    ids: Sequence[int]
    question: Question
    begin: int
    end: int
    answer: frozenset[int]  # tokens that stand there


def from_answers(model: Model, method: str, *, tokens: int | None, documents: int, tick: Tick) -> Json:
    """Which heads look at the answer while it is given, and how much each layer loses with few entries.

    Documents with facts in them are read, and every fact is asked for. A head's score is the attention that the queries
    which make tokens of the answer give to it, summed over an answer, mean over those found. Then the method itself
    chooses `CAPACITY` entries by these heads, and the error of a layer's output is summed over all answers; errors
    add up to 1. Raises InfeasibleError where no answer is found.
    """
    most = texts.readable(model.config)
    if (tokens := tokens or min(TOKENS, most)) > most:
        raise InfeasibleError(f"{model.id} has no room for documents of {tokens:,} tokens", fix=f"give --tokens {most}")
    made = _documents(model, tokens, documents)
    asked = sum(len(case.questions) for case in made)
    given: dict[int, Tensor] = {}
    for i, run in enumerate(_runs(model, made)):
        if (mass := _mass(model, run)) is not None:
            given[i] = mass
        tick(i + 1, 2 * asked)
    if not given:
        what = f"the model {model.id} finds none of {asked} facts in documents of {tokens:,} tokens"
        raise InfeasibleError(what, f"{method} needs heads that find them", "shorter documents (--tokens) may help")
    heads = _rounded(torch.stack([*given.values()]).mean(0))
    error = torch.zeros(len(heads), dtype=torch.float64)
    for i, run in enumerate(_runs(model, made)):
        if i in given:
            error += _error(model, run, method, heads)
        tick(asked + i + 1, 2 * asked)
    about = {"method": method, "weights": model.identity["weights"], "model": model.id}
    measured = {"tokens": tokens, "asked": asked, "found": len(given)}
    return {**about, **measured, "heads": heads, "errors": _rounded(error / error.sum().clamp(min=1e-12))}


def _documents(model: Model, tokens: int, documents: int) -> list[Case]:
    def size(text: str) -> int:
        return len(texts.appended_ids(model.tokenizer, text))

    try:
        return cases(f"needle:tokens={tokens},copies={documents}", Setting([], size, SEED))
    except UsageError as error:
        what = f"documents of {tokens:,} tokens have no room for the facts to be found"
        raise UsageError(what, error.why, "raise --tokens") from error


def _runs(model: Model, made: Sequence[Case]) -> Iterator[Run]:
    """A document is read when its first question comes up; only the newest is held."""
    for case in made:
        doc = texts.encoded(model.tokenizer, case.text, lambda text: None)
        ids, seq = doc.ids, doc.seq
        prefix = Prefix.read(prefill(model, ids, seq), model)
        for each in case.questions:
            begin, end = (seq[0] + at for at in span(model, case.text, each))
            asked = question(model, prefix, each.prompt, each.prefix)
            yield Run(prefix, asked, each, begin, end, frozenset(ids[begin:end]))


def span(model: Model, text: str, asked: Question) -> tuple[int, int]:
    """Which tokens of a text are the answer to a question."""
    start = text.index(f"{asked.prefix} {asked.answer[0]}") + len(asked.prefix)
    whole, before, behind = (
        texts.question_ids(model.tokenizer, part, "", "")
        for part in (text, text[:start], text[: start + 1 + len(asked.answer[0])])
    )
    # The last token before the answer may not be one of the whole.
    same = [one == other for one, other in zip(whole, before, strict=False)]
    begin = [*same, False].index(False)
    return begin, max(begin + 1, len(behind))


def _mass(model: Model, run: Run) -> Tensor | None:  # -> [L, Hq]
    """What each head gives to the answer while its tokens are made; None where another answer is given."""
    said, given = list[int](), torch.zeros(())
    for token, layers in speak(model, run.prefix, run.ids, run.question.n):
        said.append(token)
        given = given + torch.stack([layer.mass(run.begin, run.end) for layer in layers]).cpu() * (token in run.answer)
    text = model.tokenizer.decode(said, skip_special_tokens=True)
    return given if all(SCORES[name](text, run.question) == 1 for name in run.question.metrics) else None


def _error(model: Model, run: Run, method: str, heads: list[Any]) -> Tensor:  # -> [L] float64
    """The errors of each layer's outputs with few entries of document and question, summed over the answer."""
    profile = {"method": method, "heads": heads, "errors": [1.0] * len(heads)}
    recipe, error = Recipe.parse(method), torch.zeros(len(heads), dtype=torch.float64)
    for made, (_, layers) in enumerate(speak(model, run.prefix, run.ids, run.question.n)):
        for i, layer in enumerate(layers):
            if not made and layer.whole:
                layer.shrink(_few(recipe, layer, i, profile))
        error = torch.tensor([layer.error for layer in layers], dtype=torch.float64)
    return error


def _few(recipe: Recipe, layer: Watched, index: int, profile: Json) -> LayerKV:
    """The entries that the method keeps of all that the layer has read."""
    if recipe.score is None:
        raise ValueError(f"{recipe} has no score")
    (kv, stats), law = layer.seen(), layer.law
    N, L = kv.pos.shape[1], len(profile["heads"])
    B = min(CAPACITY, N)
    ask = Ask(index, L, L * len(kv.k) * B, B, N, 0, min(RECENT, B), 0, law.scale)
    ask = replace(ask, softcap=law.softcap, profiles={profile["method"]: profile})
    scored = protect(recipe.score(kv, stats, ask), kv, ask)
    few: LayerKV = recipe.reduce(kv, stats, scored, torch.full((len(kv.k),), B, device=kv.pos.device), ask)[0]
    return few


def from_snapshots(method: str, snapshots: Iterable[tuple[str, Snapshot]]) -> Json:
    """How much the attention of each head varies between queries spread over the document, mean over the snapshots.

    snapshots: with their names, for messages.
    Raises MismatchError for snapshots of several models, InfeasibleError for one that is compressed or too short.
    """
    tables, about = list[list[Tensor | None]](), dict[str, str]()
    for name, snapshot in snapshots:
        mine = {"weights": snapshot.meta.model["weights"], "model": snapshot.meta.model["id"]}
        with naming(name):
            if (about or mine)["weights"] != mine["weights"]:
                what = f"it is of another model than those before, {mine['model']} and not {about['model']}"
                raise MismatchError(what, "their weights differ", "calibrate on snapshots of one of them")
            if snapshot.meta.history:
                why = "what was dropped shows no variation"
                raise InfeasibleError("the snapshot is compressed", why, "name a full one")
            held = snapshot.meta.held
            tables.append([variation(snapshot, i) if i in held else None for i in range(len(snapshot.rows))])
        about = mine
    # A layer that slides over one of the documents is not known.
    found = [[part for part in layer if part is not None] for layer in zip(*tables, strict=True)]
    sigma = [_rounded(torch.stack(each).mean(0)) if len(each) == len(tables) else None for each in found]
    return {"method": method, **about, "snapshots": len(tables), "sigma": sigma}


def variation(snapshot: Snapshot, index: int) -> Tensor:  # -> [H] float64
    """Variance of each column of attention weights over the spread queries that see it, summed over the columns.

    It is a share of what a head varies that looks at its own token alone, so that documents of different lengths
    count alike; heads are compared within one.
    """
    kv, stats, layout = snapshot.layer(index), snapshot.stats[index], snapshot.meta.layout
    q, q_pos = stats.q_probe, stats.q_probe_pos
    if q is None or q_pos is None or len(q_pos) < 2:
        what = f"layer {index} of the snapshot has no queries spread over the document, or a single one"
        raise InfeasibleError(what, fix="kvcli prefill DOC records them")
    rest = kv.bias, layout.scale, layout.softcap, stats.sink_logit, True
    spread = window_scores(q, q_pos, kv.k, kv.pos, *rest)[2].double()
    seeing = (q_pos[:, None] >= torch.arange(len(kv.pos[0]), device=q_pos.device)).sum(0).clamp(min=1)
    each = torch.arange(1, len(q_pos) + 1, dtype=torch.float64, device=spread.device)
    sigma: Tensor = (spread / seeing).sum(1) / ((each - 1) / each**2).sum()
    return sigma.cpu()


def _rounded(part: Tensor) -> list[Any]:
    """Digits that two runs agree on."""
    return (part.double() * 1e6).round().div(1e6).tolist()
