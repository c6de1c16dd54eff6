"""A card gives what the CPU gives: no tensor of one meets a tensor of the other, and what was read stays on the card.

The card is `card.py`'s: there is none here. Operations take the paths of a card, their kernels interpreted.
"""

import io
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from card import CARD, CardTensor, OneCard, bare, send
from make import make_snapshot, opened, packed, same
from test_architectures import IDS, MORE, build
from torch import Tensor
from transformers import DynamicCache

import kvcli
from kvcli.budget import Budget
from kvcli.device import CPU, on_device
from kvcli.model.adopt import adopt
from kvcli.model.answer import Sampling, answer
from kvcli.model.batch import answers
from kvcli.model.extend import aim, extend
from kvcli.model.load import Model, load
from kvcli.model.observe import prefill
from kvcli.model.prefix import Prefix, logits
from kvcli.model.resume import expected
from kvcli.pipeline import carry_out, make_plans, protect
from kvcli.recipe import Recipe
from kvcli.registry import Ask
from kvcli.snapshot import LayerKV, Snapshot, Stats
from kvcli.storage import Reader

CLOSE = {"atol": 1e-4, "rtol": 1e-3}  # two orders of summation


def test_devices_do_not_mix() -> None:
    with OneCard():
        here, there = torch.arange(3.0), torch.arange(3.0, device=CARD)
        with pytest.raises(RuntimeError, match="two devices"):
            here + there
        assert isinstance(here.to(CARD), CardTensor) and (here.to(CARD) + 1).cpu().tolist() == [1, 2, 3]
        there[1:] = here[1:] * 2
        assert there.tolist() == [0, 2, 4] and type(there.cpu()) is Tensor is type(there.to("cpu"))


def on_cpu(snapshot: Snapshot) -> dict[str, Tensor]:
    """What the CPU needs to decide what is done: ids, tensors of the whole file, and how many entries a head has."""
    return {"ids": snapshot.ids, **snapshot.extra, **{f"{i}.lens": rows.lens for i, rows in enumerate(snapshot.rows)}}


def on_card(snapshot: Snapshot) -> dict[str, Tensor]:
    """All that grows with entries or comes from layers."""
    found = {}
    for i, (rows, stats) in enumerate(zip(snapshot.rows, snapshot.stats, strict=True)):
        parts = {name: getattr(rows, name) for name in ("k", "v", "pos", "bias", "span")} | stats.present()
        found |= {f"{i}.{name}": part for name, part in parts.items() if part is not None}
    return found


def same_on_card(there: Snapshot, here: Snapshot) -> None:
    """The same numbers, each where it belongs."""
    assert there.meta == here.meta
    for select, kind in ((on_cpu, Tensor), (on_card, CardTensor)):
        found, wanted = select(there), select(here)
        assert found.keys() == wanted.keys()
        for name in wanted:
            assert type(found[name]) is kind, name
            torch.testing.assert_close(bare(found[name]), wanted[name], **CLOSE)


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
        same_on_card(one, other)


def chain(model: Model, recipe: str, path: Path) -> tuple[Snapshot, Snapshot, Snapshot, list[Any]]:
    """The snapshot of prefill, what was made of it and read further, and the answers to that."""
    full = prefill(model, IDS, (3, "\n", True), chunk=60)
    plan = make_plans(full, Recipe.parse(recipe), [Budget.parse("40%")], device=model.device)[0]
    assert all(part and part.score.device == model.device for part in plan.scored)
    assert all(type(count) is Tensor for count in plan.outline.counts)
    report = carry_out(full, [plan], [path])[0]
    with Reader(path) as reader:
        small = reader.snapshot()
        prefix = Prefix.read(small, model)
        said = answers(model, prefix, [MORE, MORE[:2]], [2, 2])
        numbers = [said, report, logits(model, prefix, MORE, 5).cpu()]
        return extend(model, small, MORE), aim(model, small, MORE), full, numbers


@pytest.mark.parametrize("recipe", ["snapkv+adakv", "kvmerger", "kvmerger+global"])
def test_prefill_compress_resume(recipe: str, model: Model, tmp_path: Path, interpreted: None) -> None:
    *wanted, numbers = chain(model, recipe, tmp_path / "here")
    with torch.inference_mode(), OneCard():
        send(model.net)
        *found, numbers_there = chain(replace(model, device=CARD), recipe, tmp_path / "there")
        again = [packed(part) for part in found]
    for one, other, raw in zip(found, wanted, again, strict=True):
        same_on_card(one, other)
        back = opened(io.BytesIO(raw))
        for name, part in on_card(one).items():
            assert torch.equal(bare(part), on_card(back)[name])
    torch.testing.assert_close(numbers_there, numbers, **CLOSE)


def test_a_cache_on_the_card_is_adopted_there(model: Model, interpreted: None) -> None:
    full = prefill(model, IDS, (0, "\n", False))
    wanted = adopt(cache_of(full), IDS, model)
    with torch.inference_mode(), OneCard():
        send(model.net)
        same_on_card(adopt(cache_of(full, CARD), IDS, replace(model, device=CARD)), wanted)


def test_compress_takes_the_card_that_is_there(model: Model, interpreted: None) -> None:
    full = kvcli.prefill(IDS, model)
    with torch.inference_mode(), OneCard() as card:
        small, asked = kvcli.compress(full, "knorm", 0.4), [what for _, what in card.log]
        there = on_device(full, CARD)
        del card.log[:]
        again = kvcli.compress(there, "knorm", 0.4, device="cpu")
        assert asked.count("event 1") == 2 and not card.log
    for found in (small, again):
        for one, other in zip(found.rows, kvcli.compress(full, "knorm", 0.4, device="cpu").rows, strict=True):
            same(one, other)


def cache_of(full: Snapshot, device: torch.device = CPU) -> DynamicCache:
    cache = DynamicCache()
    for i in range(len(full.rows)):
        kv = full.layer(i)
        cache.update(kv.k[None].to(device), kv.v[None].to(device), i)
    return cache


def sent(value: Any) -> Any:
    parts = {field.name: getattr(value, field.name) for field in fields(value)}
    return type(value)(**{name: CardTensor(part) if isinstance(part, Tensor) else part for name, part in parts.items()})


@pytest.mark.parametrize(
    "recipe",
    [
        "snapkv+adakv",
        "kvzip+matching",
        "kvmerger:max_run=4",
        "kvmerger:keys=rerotate+global",
        "h2o",
        "keydiff",
        "random+global",
        "lookm:merge=weighted",
        "d2o:merge=paper",
        "weightedkv:mode=sequential",
        "h2o+cam",
    ],
)
def test_stages_work_where_their_layer_is(recipe: str, monkeypatch: pytest.MonkeyPatch, interpreted: None) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", "triton")
    full, parsed = make_snapshot(tokens=60, bias=True, dtype=torch.float32), Recipe.parse(recipe)
    ask = Ask(0, 1, 2 * 20, 20, 60, 2, 4, 0, 0.3, rope=full.meta.rope)

    def shrink(kv: LayerKV, stats: Stats) -> LayerKV:
        assert parsed.score
        scored = protect(parsed.score(kv, stats, ask), kv, ask)
        count = parsed.allocate([scored], ask.n, ask)[0].to(kv.pos.device)
        small: LayerKV = parsed.reduce(kv, stats, scored, count, ask)[0]
        return small

    wanted = shrink(full.layer(0), full.stats[0])
    with torch.inference_mode(), OneCard():
        found = shrink(sent(full.layer(0)), sent(full.stats[0]))
    for field in fields(LayerKV):
        part, other = getattr(found, field.name), getattr(wanted, field.name)
        assert isinstance(part, CardTensor)
        torch.testing.assert_close(bare(part), other)
