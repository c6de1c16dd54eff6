"""Where work is done: the device that is meant, layers that are on it before they are needed, a card that is full."""

import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from .errors import InfeasibleError, KvError, UsageError
from .snapshot import Lazy, Snapshot, Stats

CPU = torch.device("cpu")

Pair = tuple[Any, Stats]
Layer = tuple[int, Any, Stats]  # Rows, or Coded where that is asked for
Sent = tuple[Pair, torch.cuda.Event]
Part = TypeVar("Part")


def find_device(text: str) -> torch.device:
    """The device of this name; `auto` is CUDA if there is a card.

    Raises InfeasibleError for a card that is not there, UsageError for a name that torch does not know.
    """
    cards = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if text == "auto":
        return torch.device("cuda" if cards else "cpu")
    try:
        found = torch.device(text)
    except RuntimeError as cause:
        raise UsageError(f"--device {text}: write auto, cpu or cuda") from cause
    if found.type == "cuda" and (found.index or 0) >= cards:
        raise InfeasibleError(f"--device {text}: torch sees no {'such ' * bool(cards)}GPU here", fix="use --device cpu")
    return found


@contextmanager
def ahead(snapshot: Snapshot, device: torch.device, *, resuming: bool = False) -> Iterator[Iterator[Layer]]:
    """All layers in turn, on the device but for the lengths of heads; let go of each before you ask for the next.

    For a card the next one is read by a thread into pinned memory and copied on a stream of its own while the last is
    worked on, and what is there already is not copied. On the CPU nothing is read ahead: it would be one layer more in
    memory, and whoever reads verifies digests and numbers, on the cores that the work is done by.

    resuming: codes stay codes, and statistics are not read.
    """
    rows = snapshot.rows
    layer = rows.compact if resuming and isinstance(rows, Lazy) else rows.__getitem__

    def read(i: int) -> Pair:
        return layer(i), Stats() if resuming else snapshot.stats[i]

    layers = range(len(snapshot.rows))
    if device.type != "cuda":
        yield ((i, *_moved(read(i), lambda part: part.to(device))) for i in layers)
        return
    stream, thread = torch.cuda.Stream(device), ThreadPoolExecutor(1)  # type: ignore[no-untyped-call]
    try:
        yield _arriving(layers, lambda i: thread.submit(lambda: _sent(read(i), stream)), device)
    finally:
        thread.shutdown(cancel_futures=True)


def on_device(snapshot: Snapshot, device: torch.device) -> Snapshot:
    """The same snapshot with all its layers in the memory of the device."""
    with ahead(snapshot, device) as layers:
        every = list(layers)
    return replace(snapshot, rows=[rows for _, rows, _ in every], stats=[stats for _, _, stats in every])


@contextmanager
def blaming_card() -> Iterator[None]:
    """A card without memory becomes a KvError."""
    try:
        yield
    except torch.OutOfMemoryError as cause:
        # Who keeps the error would keep what filled the card.
        traceback.clear_frames(cause.__traceback__)
        why = ". ".join(str(cause).split(". ")[1:3])
        raise KvError("the card's memory is full", why, "use --device cpu, or a shorter document") from cause


def _arriving(layers: range, fetch: Callable[[int], "Future[Sent]"], device: torch.device) -> Iterator[Layer]:
    coming = deque(fetch(i) for i in layers[:1])
    for i in layers:
        coming.extend(fetch(i) for i in layers[i + 1 : i + 2])
        yield i, *_arrived(coming.popleft(), device)


def _sent(layer: Pair, stream: torch.cuda.Stream) -> Sent:
    """In the thread: the copies are under way when this returns, and done at the event."""

    def send(part: Tensor) -> Tensor:
        return (part if part.is_cuda else part.pin_memory()).to(stream.device, non_blocking=True)

    with torch.cuda.stream(stream):
        return _moved(layer, send), stream.record_event()


def _arrived(coming: "Future[Sent]", device: torch.device) -> Pair:
    """Where the work is done: what is asked of the card from here on waits for the copies."""
    layer, copied = coming.result()
    now = torch.cuda.current_stream(device)
    now.wait_event(copied)
    _moved(layer, lambda tensor: _kept(tensor, now))
    return layer


def _kept(tensor: Tensor, now: torch.cuda.Stream) -> Tensor:
    tensor.record_stream(now)  # its memory is not given to the next copy before the work is done
    return tensor


def _moved(layer: Pair, change: Callable[[Tensor], Tensor]) -> Pair:
    return _each(layer[0], change), _each(layer[1], change)


def _each(part: Part, change: Callable[[Tensor], Tensor]) -> Part:
    """With all tensors changed but the lengths of heads, by which the CPU decides what is done."""
    changed: dict[str, Any] = {}
    for field in fields(part):  # type: ignore[arg-type]
        held = getattr(part, field.name)
        if isinstance(held, Tensor) and field.name != "lens":
            changed[field.name] = change(held)
        elif is_dataclass(held):
            changed[field.name] = _each(held, change)
    return replace(part, **changed)  # type: ignore[type-var]
