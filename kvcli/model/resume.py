"""Resume: the model a snapshot names, questions to it, and two snapshots held against each other on the same text."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import repeat

import torch
from torch import Tensor

from ..device import blaming_card
from ..errors import MismatchError
from ..layers import DTYPES
from ..meta import Meta
from ..metrics import kl, nll, top1
from ..snapshot import Snapshot
from .answer import Answer, Sampling, answer, kept
from .identity import check
from .load import DEFAULT, Model, Tick, find_by_weights, load
from .observe import probe
from .prefix import Prefix, check_room, predict
from .text import closing_ids, question_ids


def model_for(
    meta: Meta, name: str | None, *, device: str = "auto", dtype: str | None = None, tick: Tick = lambda text: None
) -> Model:
    """The model `name`, else the one the snapshot names: a folder seen before with these weights, or its id.

    Computes in the snapshot's own precision unless told otherwise.
    """
    if name is None:
        name = _named(meta)
    own = str(DTYPES[meta.layout.dtype]).removeprefix("torch.")
    return load(name, device=device, dtype=dtype or own, tick=tick)


def check_model(snapshot: Snapshot, model: Model, *, trust: bool = False, warn: Callable[[str], None]) -> None:
    """Raise MismatchError unless this is the model the snapshot was made with; see `identity.check`."""
    found = [snapshot.extra[name] for name in ("stat.probe_k", "stat.probe_v") if name in snapshot.extra]
    saved = (found[0], found[1]) if len(found) == 2 else None
    few = snapshot.ids[: found[0].shape[2]] if saved else snapshot.ids[:0]
    check(snapshot.meta, model, lambda: probe(model, few), saved, trust=trust, warn=warn)


def _named(meta: Meta) -> str:
    name = str(meta.model["id"])
    folder = None if name == DEFAULT else find_by_weights(str(meta.model["weights"]))
    if folder is None and name != DEFAULT and "/" not in name:
        raise MismatchError(f"the snapshot was made with a local model, {name}", fix="say where it is with --model")
    return str(folder or name)


def question(model: Model, prefix: Prefix, prompt: str, start: str = "") -> list[int]:
    """Ids of a question and of how its answer starts; an empty one adds nothing to plain text, which then goes on."""
    tail = prefix.tail if prompt or prefix.chat else ""
    return question_ids(model.tokenizer, prompt, start, tail)


def turn(model: Model, prefix: Prefix, prompt: str, ids: Sequence[int], said: Answer) -> list[int]:
    """All ids of a question's turn: its own, those of its answer, and what lies between that and the next question."""
    return [*ids, *kept(model.tokenizer, said), *closing(model, prefix, prompt)]


def closing(model: Model, prefix: Prefix, prompt: str) -> list[int]:
    """Ids between an answer and the next question; none where plain text goes on."""
    return closing_ids(model.tokenizer, prefix.chat) if prompt or prefix.chat else []


def compare(
    model: Model, prefix: Prefix, full: Prefix, ids: Sequence[int], n: int
) -> tuple[Tensor, Tensor]:  # -> [M] KL, [M] bool
    """KL and top-1 agreement of `prefix` with `full` over the full cache's own greedy continuation of `ids`."""
    said = answer(model, full, ids, Sampling(n=n)).ids
    found = expected(model, prefix, full, [*ids, *said], len(said))
    return found["kl"], found["top1"]


@blaming_card()
def expected(model: Model, prefix: Prefix, full: Prefix | None, ids: Sequence[int], n: int) -> dict[str, Tensor]:
    """How well the last `n` of these ids were expected, token by token, [n] each, with a chunk of logits in memory.

    `nll` behind the prefix and, where there is a full one, `nll_against` behind that, `kl` and `top1` between the two.
    Raises InfeasibleError if the ids do not fit the model's context.
    """
    check_room(model, prefix.tokens, len(ids))
    found, at = defaultdict[str, list[Tensor]](list), len(ids) - n
    ours = predict(model, prefix, ids[:-1], n)
    theirs = repeat(None) if full is None else predict(model, full, ids[:-1], n)
    for mine, other in zip(ours, theirs, strict=full is not None):
        target = torch.tensor(ids[at : at + len(mine)], device=mine.device)
        at += len(mine)
        found["nll"].append(nll(mine, target))
        if other is not None:
            found["nll_against"].append(nll(other, target))
            found["kl"].append(kl(other, mine))
            found["top1"].append(top1(other, mine))
    return {name: torch.cat(parts).cpu() for name, parts in found.items()}
