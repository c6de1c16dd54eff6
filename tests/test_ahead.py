"""Layers read ahead: in order, never more of them than promised, copies and work in order, nothing left behind."""

import threading
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from card import CARD, CardTensor, OneCard
from make import make_snapshot, same, shrunk

from kvcli.budget import Budget
from kvcli.device import CPU, ahead, blaming_card, find_device, on_device
from kvcli.errors import FormatError, InfeasibleError, KvError, UsageError
from kvcli.pipeline import carry_out, make_plans
from kvcli.recipe import Recipe
from kvcli.snapshot import Lazy, Rows, Snapshot

L = 4
DEVICES = pytest.mark.parametrize("device", [CPU, CARD], ids=["cpu", "card"])


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch) -> Iterator[OneCard]:
    """One that leaves no thread behind."""
    monkeypatch.setenv("KVCLI_KERNELS", "ref")
    before = threading.active_count()
    with torch.inference_mode(), OneCard() as one:
        yield one
    assert threading.active_count() == before


def watched(look: Callable[[int], None] = lambda i: None, **sizes: Any) -> Snapshot:
    """A snapshot whose layers are made when they are asked for, after `look` is told which."""
    full = make_snapshot(layers=L, tokens=40, **sizes)

    def read(i: int) -> Rows:
        look(i)
        return replace(full.rows[i], **{name: getattr(full.rows[i], name).clone() for name in ("k", "v", "pos")})

    return replace(full, rows=Lazy(range(L), read))


@DEVICES
@pytest.mark.parametrize("ragged", [False, True])
def test_all_layers_come_in_turn_and_whole(device: torch.device, ragged: bool) -> None:
    full = make_snapshot(layers=L, ragged=ragged, bias=True)
    with ahead(full, device) as layers:
        for i, (at, rows, stats) in enumerate(layers):
            assert at == i and rows.k.device == device == stats.q_last.device and type(rows.lens) is torch.Tensor
    there = on_device(full, device)
    back = on_device(there, CPU)
    for i in range(L):
        assert isinstance(there.rows[i].bias, CardTensor) == (device == CARD)
        same(back.rows[i], full.rows[i])
        same(back.stats[i], full.stats[i])
    with ahead(full, device, resuming=True) as layers:
        assert not any(stats.present() for _, _, stats in layers)


@DEVICES
@pytest.mark.parametrize("ragged", [False, True])
def test_the_pipeline_lets_go_of_a_layer_before_it_reads_another(
    device: torch.device, ragged: bool, tmp_path: Path
) -> None:
    full = make_snapshot(layers=L, tokens=40, ragged=ragged, dtype=torch.float32)
    given: list[weakref.ref[Any]] = []

    def read(i: int) -> Rows:
        assert not any(one() is not None for one in given)
        memory = full.rows[i].k.numpy().copy()  # lives as long as any view of it
        given.append(weakref.ref(memory))
        return replace(full.rows[i], k=torch.from_numpy(memory))

    for recipe, budget in (("snapkv+adakv", "30%"), ("knorm", "30%"), ("kvmerger:epsilon=0.5", "")):
        shrunk(replace(full, rows=Lazy(range(L), read)), recipe, tmp_path / "a", budget, device=device)
    assert len(given) == 6 * L


def test_the_next_layer_is_read_while_one_is_worked_on_and_none_beyond() -> None:
    begun = [threading.Event() for _ in range(L)]
    given: list[weakref.ref[torch.Tensor]] = []
    with ahead(watched(lambda i: begun[i].set()), CARD) as layers:
        for i, rows, stats in layers:
            assert not any(one() is not None for one in given)
            given.append(weakref.ref(rows.k))
            del rows, stats
            assert all(event.wait(5) for event in begun[: i + 2])
            assert not any(event.is_set() for event in begun[i + 2 :])


def test_copies_are_waited_for_and_kept(card: OneCard) -> None:
    full = make_snapshot(layers=L)
    n = 3 + len(full.stats[0].present())
    with ahead(full, CARD) as layers:
        for i, _, _ in layers:
            card.note(f"layer {i}")
    apart = [what for thread, what in card.log if thread]
    assert apart == [what for i in range(L) for what in (*["pin", "copy on side"] * n, f"event {i + 1}")]
    here = [what for thread, what in card.log if not thread]
    assert here == [what for i in range(L) for what in (f"work waits for {i + 1}", *["work keeps"] * n, f"layer {i}")]
    order = [what for _, what in card.log]
    assert all(order.index(f"event {i}") < order.index(f"work waits for {i}") for i in range(1, L + 1))


def test_what_is_on_the_card_is_not_copied(card: OneCard) -> None:
    there = on_device(make_snapshot(layers=L), CARD)
    del card.log[:]
    again = on_device(there, CARD)
    assert all(a.k is b.k and a.pos is b.pos for a, b in zip(again.rows, there.rows, strict=True))
    assert "pin" not in [what for _, what in card.log]


@DEVICES
@pytest.mark.parametrize("stop", [KeyboardInterrupt, RuntimeError])
def test_who_stops_early_leaves_no_thread(device: torch.device, stop: type[BaseException]) -> None:
    with pytest.raises(stop), ahead(watched(), device) as layers:
        next(layers)
        raise stop
    with ahead(watched(), device):
        pass


@DEVICES
def test_an_error_comes_where_its_layer_would(device: torch.device, tmp_path: Path) -> None:
    def refuse(i: int) -> None:
        if i == 2:
            raise FormatError("damaged")

    seen = []
    with pytest.raises(FormatError, match="damaged"), ahead(watched(refuse), device) as layers:
        seen += [i for i, _, _ in layers]
    assert seen == []
    good, bad = watched(), watched(refuse)
    plans = make_plans(good, Recipe.parse("snapkv"), [Budget.parse("50%")], device=device)
    with pytest.raises(FormatError, match="damaged"):
        carry_out(bad, plans, [tmp_path / "a"])
    assert not [*tmp_path.iterdir()]


def test_devices_by_name(card: OneCard) -> None:
    assert find_device("auto").type == find_device("cuda").type == "cuda" and find_device("cpu") == CPU
    with pytest.raises(InfeasibleError, match="--device cuda:7: torch sees no such GPU here"):
        find_device("cuda:7")
    card.patch.setattr(torch.cuda, "is_available", lambda: False)
    assert find_device("auto") == CPU
    with pytest.raises(InfeasibleError, match="--device cuda: torch sees no GPU here"):
        find_device("cuda")
    with pytest.raises(UsageError, match="write auto, cpu or cuda"):
        find_device("gpu")


def test_a_full_card_is_an_error_with_a_remedy_that_holds_nothing() -> None:
    kept = []

    @blaming_card()
    def work() -> None:
        big = torch.zeros(3)
        kept.append(weakref.ref(big))
        raise torch.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free. If reserved memory is large, try."
        )

    with pytest.raises(KvError) as caught:
        work()
    lines = ["Tried to allocate 2.00 GiB. GPU 0 has 1.00 GiB free", "use --device cpu, or a shorter document"]
    assert caught.value.lines()[1:] == lines
    assert kept[0]() is None
