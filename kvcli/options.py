"""Options of a stage: its keyword-only arguments, read from text by their annotations and held to their limits."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin


@dataclass(frozen=True)
class Limit:
    """What a number may be: a test, and the same in words."""

    holds: Callable[[Any], bool]
    words: str


Share = Annotated[float, Limit(lambda x: 0 <= x <= 1, "a number from 0 to 1")]
Positive = Annotated[float, Limit(lambda x: x > 0, "a number above 0")]
AtLeast0 = Annotated[int, Limit(lambda n: n >= 0, "a whole number, 0 or more")]
AtLeast1 = Annotated[int, Limit(lambda n: n >= 1, "a whole number, 1 or more")]
Bits = Annotated[int, Limit(lambda n: n in (2, 4, 8), "2, 4 or 8")]
Odd = Annotated[int, Limit(lambda n: n >= 1 and n % 2 == 1, "an odd whole number, 1 or more")]

_PLAIN = {
    bool: Limit(lambda flag: True, "true or false"),
    int: Limit(lambda n: True, "a whole number"),
    float: Limit(lambda x: True, "a number"),
}
# Beyond these a number is a slip: counts are indices of tensors, and float32 makes infinity or 0 of what lies outside.
_MOST = {int: 2**31 - 1, float: (2 - 2**-23) * 2.0**127}
_LEAST = 2.0**-126


@dataclass(frozen=True)
class Option:
    """What one option takes: some of words, a number or flag, and none."""

    default: Any
    choices: tuple[str, ...] = ()
    kind: type | None = None  # bool, int or float
    limit: Limit | None = None
    optional: bool = False

    @classmethod
    def of(cls, default: Any, annotation: Any) -> "Option":
        """From bool, int, float, a limited number, a Literal of words, None, or a union of these; else ValueError."""
        union = get_origin(annotation) in (Union, UnionType)
        option = cls(default)
        for part in get_args(annotation) if union else (annotation,):
            if get_origin(part) is Literal:
                option = replace(option, choices=get_args(part))
            elif part is NoneType:
                option = replace(option, optional=True)
            else:
                kind, limit = get_args(part) if get_origin(part) is Annotated else (part, _PLAIN.get(part))
                if limit is None:
                    raise ValueError(f"an option cannot be {part}")
                option = replace(option, kind=kind, limit=limit)
        return option

    @property
    def words(self) -> str:
        """What it takes, for people."""
        parts = [*self.choices, *([self.limit.words] if self.limit else []), *(["none"] if self.optional else [])]
        return " or ".join(filter(None, (", ".join(parts[:-1]), parts[-1])))

    def read(self, text: str) -> Any:
        """The value of a text; ValueError for one it does not take."""
        if text in self.choices:
            return text
        if self.optional and text == "none":
            return None
        if self.kind is bool and text in ("true", "false"):
            return text == "true"
        if self.kind in _MOST and self.limit:
            value = self.kind(text)
            if (value == 0 or _LEAST <= abs(value) <= _MOST[self.kind]) and self.limit.holds(value):
                return value
        raise ValueError(f"{text!r} is not {self.words}")


def options_of(fn: Callable[..., Any]) -> dict[str, Option]:
    """The keyword-only arguments of a function as options, by name."""
    params = inspect.signature(fn, eval_str=True).parameters.values()
    return {
        param.name: Option.of(param.default, param.annotation) for param in params if param.kind is param.KEYWORD_ONLY
    }
