"""The table of stages: decorators that fill it, and discovery of `methods/`; knows no single method."""

import inspect
import math
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from importlib import import_module
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from .codes import Split
from .errors import UsageError
from .meta import Json
from .options import Option, options_of

Kind = Literal["score", "allocate", "reduce", "encode"]
KINDS: tuple[Kind, ...] = get_args(Kind)
# What `kvcli calibrate` makes the profile of a method from: answers of the model, or snapshots; "" for none.
Profile = Literal["", "answers", "snapshots"]
# Name of a tensor in a layer -> its dtype, as safetensors names it, and its shape.
Shapes = dict[str, tuple[str, tuple[int, ...]]]


@dataclass(frozen=True)
class Source:
    """Where a method comes from and what of ours was held against it."""

    paper: str = ""
    year: int | None = None
    question: bool = False  # whether its paper compressed with the question in view
    checked: str = ""  # what our code was compared with


@dataclass(frozen=True)
class Ask:
    """What is asked of a stage, the same for all heads of a layer."""

    layer: int
    L: int  # layers
    n: int  # entries for the whole file
    B: int  # entries a head
    N: int  # tokens of the full document
    sink: int  # first tokens that always stay
    recent: int  # newest tokens that always stay
    lead: int  # template tokens before the document
    scale: float  # attention scale
    seed: int = 0
    softcap: float | None = None  # of the attention logits
    rope: Mapping[str, Any] = field(default_factory=dict)  # as in Meta
    segments: Tensor | None = None  # [S, 4] int32 begin, end, type (index in SEGMENTS), group; None where unknown
    profiles: Mapping[str, Json] = field(default_factory=dict)  # by method, what was calibrated on the model
    held: tuple[int, ...] = ()  # which L layers of the model these are; () for the first L

    @property
    def layers(self) -> tuple[int, ...]:
        """The layers that are compressed, by their number in the model."""
        return self.held or tuple(range(self.L))

    @property
    def place(self) -> int:
        """Where among them this layer comes."""
        return self.layers.index(self.layer)

    @property
    def freq(self) -> Tensor | None:  # [R] float32
        """How fast each pair of channels of a key turns with its position; None where the snapshot does not say."""
        found = self.rope.get("inv_freq")
        if not isinstance(found, list) or not all(isinstance(x, float) and math.isfinite(x) for x in found):
            return None
        return torch.tensor(found) if 0 < 2 * len(found) <= self.rope.get("head_dim", 0) else None


@dataclass(frozen=True)
class Scored:
    """How much each entry matters: higher stays, +inf must stay, -inf is padding."""

    score: Tensor  # [H, T] float32
    weight: Tensor | None = None  # for the allocator and the reducer of the same method
    count: Tensor | None = None  # [H] where a score fixes its own sizes
    least: Tensor | None = None  # [H] fewest entries a head can hold, where that is more than its +inf
    note: str = ""  # what the user should know of this layer, such as a fallback

    @property
    def low(self) -> Tensor:  # [H] int64
        """The fewest entries each head may be given."""
        must = self.score.isposinf().sum(1).clamp(min=1)
        return must if self.least is None else torch.maximum(must, self.least)

    @property
    def high(self) -> Tensor:  # [H] int64
        """The entries each head has."""
        return (self.score > -torch.inf).sum(1)


@dataclass(frozen=True)
class Stage:
    """A registered function of one kind; call it as the function itself."""

    kind: Kind
    name: str
    fn: Callable[..., Any]
    source: Source = Source()
    needs: tuple[str, ...] = ()  # statistics
    profile: Profile = ""  # what the profile of its name is made from, where it reads one
    after: str = ""  # the score whose meaning it relies on
    by_budget: bool = False  # the result depends on the budget
    sizes: Callable[..., bool] = lambda **_: False  # (**options) -> whether a score fixes its own sizes
    adds: Callable[..., tuple[str, ...]] = lambda **_: ()  # (**options) -> parts of an entry a reducer adds: bias, span
    lossy: bool = False  # whether an encoding changes numbers
    options: Mapping[str, Option] = field(default_factory=dict)
    parts: dict[str, Callable[..., Any]] = field(default_factory=dict)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self.fn(*args, **options)

    @property
    def help(self) -> str:
        """The first line of the docstring."""
        return self.doc.split("\n")[0]

    @property
    def doc(self) -> str:
        """The whole docstring."""
        return inspect.getdoc(self.fn) or ""

    def check(self, fn: Callable[..., None]) -> Callable[..., None]:
        """Register what must hold before a layer is read: (ask, **options) raises InfeasibleError."""
        self.parts["check"] = fn
        return fn

    def decoder(self, fn: Callable[..., Any]) -> Callable[..., Any]:
        """Register the inverse of an encoder: ({name: tensor}, lens [H], **options) -> k [E, D], v [E, Dv]."""
        self.parts["decode"] = fn
        return fn

    def codes(self, fn: Callable[..., Split]) -> Callable[..., Split]:
        """Register ({name: tensor}, lens [H], **options) -> Split, for codes that attention reads as they are.

        It is the decoder as well.
        """
        self.parts["codes"] = fn
        self.parts["decode"] = lambda payload, lens, **options: fn(payload, lens, **options).rows()
        return fn

    def bound(self, fn: Callable[..., float]) -> Callable[..., float]:
        """Register (B, layout, **options) -> the most bytes of a head of any length, where B entries is the mean.

        It never falls with B. Needed where bytes do not follow from the sum of `lens` alone, or fall as it grows.
        """
        self.parts["bound"] = fn
        return fn

    def shapes(self, fn: Callable[..., Shapes]) -> Callable[..., Shapes]:
        """Register what an encoder will write: (lens, layout, **options) -> {name: (dtype, shape)}.

        With `split` it is (lens, layout, first, **options), and `hi` I32 [H] is among what it writes.
        """
        self.parts["shapes"] = fn
        return fn

    def split(self, fn: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Register (scored, lens [H], **options) -> [H] int64: the entries that are treated better than others."""
        self.parts["split"] = fn
        return fn


_table: dict[tuple[Kind, str], Stage] = {}


def _register(kind: Kind, name: str, **facts: Any) -> Callable[[Callable[..., Any]], Stage]:
    def decorate(fn: Callable[..., Any]) -> Stage:
        stage = Stage(kind, name or fn.__module__.rsplit(".", 1)[-1], fn, options=options_of(fn), **facts)
        if (kind, stage.name) in _table:
            raise ValueError(f"{kind} {stage.name} is registered twice")
        if not stage.help:
            raise ValueError(f"{kind} {stage.name} has no docstring")
        _table[kind, stage.name] = stage
        return stage

    return decorate


Decorator = Callable[[Callable[..., Any]], Stage]


def score(
    *,
    name: str = "",
    needs: tuple[str, ...] = (),
    source: Source = Source(),
    profile: Profile = "",
    by_budget: bool = False,
    sizes: Callable[..., bool] = lambda **_: False,
) -> Decorator:
    """(kv, stats, ask, **options) -> Scored."""
    return _register("score", name, needs=needs, source=source, profile=profile, by_budget=by_budget, sizes=sizes)


def allocate(*, name: str = "", source: Source = Source(), profile: Profile = "", after: str = "") -> Decorator:
    """(L x Scored, n, ask, **options) -> L x [H] int64, adding up to n."""
    return _register("allocate", name, source=source, profile=profile, after=after)


def reduce(
    *,
    name: str = "",
    needs: tuple[str, ...] = (),
    source: Source = Source(),
    after: str = "",
    adds: Callable[..., tuple[str, ...]] = lambda **_: (),
) -> Decorator:
    """(kv, stats, scored, count [H], ask, **options) -> LayerKV, pivots [H, n] (index in the input, -1 padding)."""
    return _register("reduce", name, needs=needs, source=source, after=after, adds=adds)


def encode(*, name: str = "", source: Source = Source(), after: str = "", lossy: bool = False) -> Decorator:
    """(kv, scored, ask, **options) -> {name: tensor}; give it `.shapes` and a `.decoder`, or `.codes`, too."""
    return _register("encode", name, source=source, after=after, lossy=lossy)


@cache
def _discover() -> None:
    methods = import_module(".methods", __package__)
    for module in pkgutil.iter_modules(methods.__path__):
        import_module(f"{methods.__name__}.{module.name}")


def stages() -> list[Stage]:
    """Every stage, by name and then in the order of the pipeline."""
    _discover()
    return sorted(_table.values(), key=lambda stage: (stage.name, KINDS.index(stage.kind)))


def named(name: str) -> dict[Kind, Stage]:
    """The stages of a method by kind; UsageError with the near names if there is none."""
    found = {stage.kind: stage for stage in stages() if stage.name == name}
    if not found:
        names = sorted({stage.name for stage in stages()})
        near = get_close_matches(name.lower(), names, n=3)
        raise UsageError(
            f"no method is called {name!r}",
            f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(names)}",
            "kvcli methods lists them with their options",
        )
    return found
