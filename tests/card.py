"""A card that is none: tensors that say they live on it, and no operation that takes them together with the CPU's."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from kvcli import device as devices

CARD = torch.device("cuda", 0)
BETWEEN = {"copy_", "_to_copy", "to", "index"}  # what may name tensors of two devices: an index may lie on the CPU


class CardTensor(Tensor):
    """A tensor of the CPU that passes for one of the card."""

    inner: Tensor
    device = property(lambda self: CARD)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, inner: Tensor) -> "CardTensor":
        # torch guards the device it is told; "meta" has nothing to guard.
        made = Tensor._make_wrapper_subclass(
            cls, inner.shape, inner.stride(), inner.storage_offset(), dtype=inner.dtype, device="meta"
        )
        made.inner = inner
        return made

    def record_stream(self, stream: "Stream") -> None:  # type: ignore[override]
        stream.card.note(f"{stream.name} keeps")

    @classmethod
    def __torch_dispatch__(cls, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = dict(kwargs or {}), op._schema.name.split("::")[1]
        tensors = [part for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor)]
        if name not in BETWEEN and any(part.dim() and not isinstance(part, cls) for part in tensors):
            raise RuntimeError(f"{name} of tensors on two devices: {[tuple(part.shape) for part in tensors]}")
        if "device" in kwargs:
            kwargs["device"] = torch.device("cpu")
        out = op(*tree_map(bare, args), **tree_map(bare, kwargs))
        if name.endswith("_") and not name.endswith("__"):
            return args[0]
        return tree_map(lambda part: cls(part) if isinstance(part, Tensor) else part, out)


def bare(part: Any) -> Any:
    return part.inner if isinstance(part, CardTensor) else part


@dataclass
class Stream:
    """A stream on which everything is done at once; the card's log says what was asked of it."""

    card: "OneCard"
    name: str
    events: int = 0
    device = CARD

    def __enter__(self) -> None:
        self.card.here.stream = self

    def __exit__(self, *_: object) -> None:
        del self.card.here.stream

    def record_event(self) -> int:
        self.events += 1
        self.card.note(f"event {self.events}")
        return self.events

    def wait_event(self, event: int) -> None:
        self.card.note(f"{self.name} waits for {event}")


class OneCard(TorchFunctionMode):
    """While it lasts, tensors can be made on the card, sent there, and fetched from it; there are streams and a thread.

    log: what was asked of streams and of pinned memory, in order, and whether by a thread of its own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log: list[tuple[bool, str]] = []
        self.here = threading.local()

    def __enter__(self) -> "OneCard":
        self.patch = pytest.MonkeyPatch()
        self.patch.setattr(torch.cuda, "is_available", lambda: True)
        self.patch.setattr(torch.cuda, "device_count", lambda: 1)
        self.patch.setattr(torch.cuda, "Stream", lambda device: Stream(self, "side"))
        self.patch.setattr(torch.cuda, "stream", lambda stream: stream)
        self.patch.setattr(torch.cuda, "current_stream", lambda device: Stream(self, "work"))
        self.patch.setattr(devices, "ThreadPoolExecutor", partial(ThreadPoolExecutor, initializer=self._enter_thread))
        super().__enter__()
        return self

    def _enter_thread(self) -> None:
        super().__enter__()
        self.here.mode = torch.inference_mode()  # wrappers made outside cannot be viewed inside
        self.here.mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.patch.undo()
        super().__exit__(*error)

    def note(self, what: str) -> None:
        self.log.append((threading.current_thread() is not threading.main_thread(), what))

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name, first = dict(kwargs or {}), getattr(fn, "__name__", ""), args[0] if args else None
        if name == "to" and len(args) > 1 and isinstance(args[1], str | torch.device):
            kwargs, args = {"device": args[1], **kwargs}, (first, *args[2:])
        device = kwargs.pop("device", None)
        there = device is not None and torch.device(device).type == "cuda"
        if name == "pin_memory" and type(first) is Tensor:
            self.note("pin")
            return first.clone()
        if name == "to" and kwargs.get("non_blocking"):
            self.note(f"copy on {self.here.stream.name}")
        if isinstance(first, CardTensor):
            if name in ("cpu", "tolist") or (name == "to" and device is not None and not there):
                return fn(first.inner, *args[1:], **kwargs) if name != "to" or args[1:] or kwargs else first.inner
            if name == "new_tensor":
                return CardTensor(fn(first.inner, *args[1:], **kwargs))
            if name == "__setitem__":
                first.inner[tree_map(bare, args[1])] = bare(args[2])
                return None
        elif device is not None and not there:
            kwargs["device"] = device
        if name == "to" and not args[1:] and not kwargs:
            return CardTensor(first) if there and not isinstance(first, CardTensor) else first
        out = fn(*args, **kwargs)
        return CardTensor(out) if there and not isinstance(out, CardTensor) else out


def send(net: nn.Module) -> None:
    """Weights and buffers of a network, sent to the card."""
    for part in net.modules():
        for held in (part._parameters, part._buffers):
            held.update({name: CardTensor(old.data) for name, old in held.items() if old is not None})
