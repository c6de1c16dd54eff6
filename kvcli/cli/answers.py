"""Asking a snapshot that is in memory: answers to stdout as they are made, and the facts about each and about all."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..errors import InfeasibleError
from .streams import Source, shown
from .ui import Ui, clean

if TYPE_CHECKING:
    from torch import Tensor

    from ..model.answer import Answer, Sampling
    from ..model.load import Model
    from ..model.prefix import Prefix
    from ..snapshot import Snapshot

Facts = dict[str, Any]


@dataclass(frozen=True)
class Talk:
    """A model with a snapshot in its memory, ready to be asked."""

    ui: Ui
    model: "Model"
    prefix: "Prefix"
    full: "Prefix | None"  # what to compare with
    sampling: "Sampling"
    jsonl: bool
    saves: bool


@dataclass(frozen=True)
class Turn:
    """A question as it was given, its ids, and what was said; `compared` holds `kl` and `top1` of each token."""

    row: Facts
    ids: list[int]
    said: "Answer"
    compared: "Mapping[str, Tensor]"

    def facts(self) -> Facts:
        """As --json and --jsonl show it."""
        from ..tasks.scores import hit

        facts = {
            "prompt": self.row["prompt"],
            "prefix": self.row["prefix"],
            "text": self.said.text,
            "computed": self.said.computed,
            "generated": len(self.said.ids),
            "finish": self.said.finish,
            "first_token_seconds": self.said.first_seconds,
            "tokens_per_second": self.said.tokens_per_second,
        }
        if "answer" in self.row:
            facts["hit"] = hit(self.said.text, self.row["answer"])
        return facts | measured(self.compared)


def ask(talk: Talk, row: Facts) -> Turn:
    """Answer one question, streaming to stdout."""
    from ..model.answer import answer
    from ..model.prefix import check_room
    from ..model.resume import closing, compare, question

    ids = question(talk.model, talk.prefix, row["prompt"], row["prefix"])
    _warn_of_loss(talk, "the question", row["prompt"] + row["prefix"])
    if talk.saves:
        close = closing(talk.model, talk.prefix, row["prompt"])
        check_room(talk.model, talk.prefix.tokens, len(ids) + len(close), talk.sampling.n)
    plain = not (talk.jsonl or talk.ui.as_json)
    said = answer(talk.model, talk.prefix, ids, talk.sampling, _stream(row["prefix"]) if plain else lambda text: None)
    if plain:
        print(flush=True)
    turn = Turn(row, ids, said, {})
    if talk.full is not None:
        kl, top1 = compare(talk.model, talk.prefix, talk.full, ids, talk.sampling.n)
        turn = replace(turn, compared={"kl": kl, "top1": top1})
    if talk.jsonl:
        print(json.dumps(turn.facts()), flush=True)
    return turn


def _warn_of_loss(talk: Talk, name: str, text: str) -> None:
    from ..model.text import lost, question_ids

    tokenizer = talk.model.tokenizer
    if missing := lost(tokenizer, text, question_ids(tokenizer, text, "", "")):
        talk.ui.warn(f"{name}: {missing}")


def save(talk: Talk, snapshot: "Snapshot", turn: Turn, target: Source, force: bool) -> Facts:
    """Write the snapshot with the whole turn read behind it."""
    from ..model.extend import extend
    from ..model.resume import turn as turn_ids
    from ..storage import write_snapshot

    ids = turn_ids(talk.model, talk.prefix, turn.row["prompt"], turn.ids, turn.said)
    grown = extend(talk.model, snapshot, ids)
    size = write_snapshot(grown, target, force=force)
    return {"file": shown(target), "tokens": grown.meta.seq.tokens, "added": len(ids), "file_bytes": size}


def _stream(prefix: str) -> Callable[[str], None]:
    """Show how the answer starts, and return what shows the rest."""
    safe = clean if sys.stdout.isatty() else str
    print(safe(prefix), end="", flush=True)
    return lambda text: print(safe(text), end="", flush=True)


def total(turns: Sequence[Turn]) -> Facts:
    """The facts of each answer and of all together."""
    import torch

    answers = [turn.facts() for turn in turns]
    facts: Facts = {"tokens_computed": sum(row["computed"] for row in answers), "answers": answers}
    if marked := [row["hit"] for row in answers if "hit" in row]:
        facts |= {"hits": sum(marked), "asked": len(marked)}
    names = turns[0].compared if turns else ()
    return facts | measured({name: torch.cat([turn.compared[name] for turn in turns]) for name in names})


def judge(talk: Talk, text: str) -> Facts:
    """How expected a text is as the continuation of the document; raises InfeasibleError if no token stands for it."""
    from ..model.resume import expected
    from ..model.text import question_ids

    ids = question_ids(talk.model.tokenizer, text, "", "")
    if not ids:
        raise InfeasibleError("the model's tokenizer has no token for anything in the text")
    _warn_of_loss(talk, "the continuation", text)
    found = expected(talk.model, talk.prefix, talk.full, ids, len(ids))
    return {"tokens_computed": len(ids) - 1, "answers": [], "continuation": {"tokens": len(ids), **measured(found)}}


def measured(found: "Mapping[str, Tensor]") -> Facts:
    """Over all tokens: the mean of `nll` and its perplexity, mean and 95th percentile of `kl`, the share of `top1`."""
    from ..metrics import median_p95

    facts: Facts = {}
    for name, values in found.items():
        mean = values.double().mean()
        if name == "kl":
            facts |= {"kl_mean": float(mean), "kl_p95": median_p95(values)[1]}
        else:
            facts[name] = float(mean)
        if name.startswith("nll"):
            facts[name.replace("nll", "perplexity")] = float(mean.exp())
    return facts
