"""A card gives what the CPU gives: no tensor of one meets a tensor of the other, and what is kept is on the CPU.

The card is `card.py`'s: there is none here. Operations take the paths of a card, their kernels interpreted.
"""

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from card import CARD, CardTensor, OneCard, bare, send
from make import make_snapshot
from test_architectures import IDS, MORE, build
from torch import Tensor

from kvcli.model.answer import Sampling, answer
from kvcli.model.extend import aim, extend
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix, logits
from kvcli.model.resume import expected
from kvcli.pipeline import protect
from kvcli.recipe import Recipe
from kvcli.registry import Ask
from kvcli.snapshot import LayerKV, Snapshot, Stats

CLOSE = {"atol": 1e-4, "rtol": 1e-3}  # two orders of summation


def test_devices_do_not_mix() -> None:
    with OneCard():
        here, there = torch.arange(3.0), torch.arange(3.0, device=CARD)
        with pytest.raises(RuntimeError, match="two devices"):
            here + there
        assert isinstance(here.to(CARD), CardTensor) and (here.to(CARD) + 1).cpu().tolist() == [1, 2, 3]
        there[1:] = here[1:] * 2
        assert there.tolist() == [0, 2, 4] and type(there.cpu()) is Tensor is type(there.to("cpu"))


def tensors(snapshot: Snapshot) -> Iterable[tuple[str, Tensor]]:
    yield from snapshot.extra.items()
    for i, (rows, stats) in enumerate(zip(snapshot.rows, snapshot.stats, strict=True)):
        parts = {"k": rows.k, "v": rows.v, "pos": rows.pos, "lens": rows.lens, **stats.present()}
        yield from ((f"{i}.{name}", part) for name, part in parts.items())


def work(model: Model) -> tuple[list[Snapshot], list[Any]]:
    """Snapshots and answers of every kind."""
    full = prefill(model, IDS, (3, "\n", True), chunk=60)
    prefix = Prefix.read(full, model)
    drawn = Sampling(n=2, temperature=0.01, top_k=5, top_p=0.9)
    said = [answer(model, prefix, ids, how).ids for ids, how in ((MORE, Sampling(n=3)), ([], drawn))]
    numbers = [logits(model, prefix, MORE, 5), expected(model, prefix, prefix, MORE, len(MORE))["nll"]]
    return [full, extend(model, full, MORE), aim(model, full, MORE)], [said, numbers]


@pytest.mark.parametrize(
    "name", ["llama", "mistral sliding", "gemma2", pytest.param("gpt_oss", marks=pytest.mark.slow)]
)
def test_a_card_gives_what_the_cpu_gives(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interpreted: None
) -> None:
    model = load(str(build(name, tmp_path)), dtype="float32", device="cpu")
    model.net.set_experts_implementation("eager")  # others ask the card what it can
    expected, (said, numbers) = work(model)
    monkeypatch.setenv("KVCLI_KERNELS", "triton")
    with torch.inference_mode(), OneCard():
        send(model.net)
        got, (said_there, numbers_there) = work(replace(model, device=CARD))
        numbers_there = [part.cpu() for part in numbers_there]
    assert said_there == said
    for one, other in zip(numbers_there, numbers, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)
    for one, other in zip(got, expected, strict=True):
        assert one.meta == other.meta
        for (part, found), (_, wanted) in zip(tensors(one), tensors(other), strict=True):
            assert type(found) is Tensor, part
            torch.testing.assert_close(found, wanted, **CLOSE)


def on_card(value: Any) -> Any:
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    return type(value)(**{name: CardTensor(part) if isinstance(part, Tensor) else part for name, part in parts.items()})


@pytest.mark.parametrize(
    "recipe", ["snapkv+adakv", "kvmerger:max_run=4", "kvmerger:keys=rerotate+global", "h2o", "keydiff"]
)
def test_stages_work_where_their_layer_is(recipe: str, monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", "triton")
    full, parsed = make_snapshot(tokens=60, bias=True, dtype=torch.float32), Recipe.parse(recipe)
    ask = Ask(0, 1, 2 * 20, 20, 60, 2, 4, 0, 0.3, rope=full.meta.rope)

    def shrink(kv: LayerKV, stats: Stats) -> LayerKV:
        assert parsed.score
        scored = protect(parsed.score(kv, stats, ask), kv, ask)
        small: LayerKV = parsed.reduce(kv, stats, scored, parsed.allocate([scored], ask.n, ask)[0], ask)[0]
        return small

    wanted = shrink(full.layer(0), full.stats[0])
    with torch.inference_mode(), OneCard():
        found = shrink(on_card(full.layer(0)), on_card(full.stats[0]))
    for field in fields(LayerKV):
        part, other = getattr(found, field.name), getattr(wanted, field.name)
        assert isinstance(part, CardTensor)
        torch.testing.assert_close(bare(part), other)
