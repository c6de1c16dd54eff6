"""How much may stay: what a budget means in entries, and the only place that rounds and clamps."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from math import ceil

import torch
from torch import Tensor

from .errors import InfeasibleError, UsageError

_SUFFIX = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}

_LONGEST = 40  # characters: Python refuses to read numbers of thousands of digits


@dataclass(frozen=True)
class Budget:
    """What the user asked for; exactly one of `share`, `tokens` and `bytes` is set."""

    text: str
    share: Fraction | None = None  # of the entries of the full document
    tokens: int | None = None  # entries a head
    bytes: int | None = None  # of the whole file

    @classmethod
    def parse(cls, text: str) -> "Budget":
        """`0.35` or `35%` of the entries, `512` entries a head, `64MiB` for the whole file; UsageError otherwise."""
        word = text.strip()
        if len(word) > _LONGEST:
            raise UsageError(f"--budget {word[:30]!r}... is not a budget", f"it has {len(word)} characters")
        if match := re.fullmatch(r"(\d+(?:\.\d+)?)%", word):
            return cls(word, share=_share(word, Fraction(match[1]) / 100))
        if re.fullmatch(r"\d*\.\d+", word):
            return cls(word, share=_share(word, Fraction(word)))
        if match := re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B|B)", word, re.IGNORECASE):
            size = int(Fraction(match[1]) * _SUFFIX[match[2].upper()])
            if size > 0:
                return cls(word, bytes=size)
        if word.isascii() and word.isdigit() and int(word) > 1:
            return cls(word, tokens=int(word))
        why = "a bare 1 could be one entry or everything" if word == "1" else ""
        raise UsageError(f"--budget {text!r} is not a budget", why, "write 35% or 0.35, 512 (entries a head) or 64MiB")

    def per_head(self, N: int, heads: int, size_of: Callable[[int], int]) -> int:
        """Entries a head for a document of N tokens and `heads` KV heads in all layers.

        size_of: an upper bound of the file's bytes for a number of entries a head, which may fall at N, where
            everything is kept; used by a budget in bytes.
        Raises InfeasibleError where not one entry a head fits.
        """
        if self.share is not None:
            per_head = int(self.share * N)
        elif self.tokens is not None:
            per_head = min(self.tokens, N)
        else:
            limit = self.bytes or 0
            per_head = N if size_of(N) <= limit else largest(limit, N - 1, size_of)
        if per_head >= 1:
            return per_head
        smallest = f"{size_of(1)} bytes" if self.bytes else f"{ceil(Fraction(10**5, N)) / 1000:g}%, one entry a head"
        raise InfeasibleError(
            f"--budget {self.text} leaves no entry for some of the {heads} heads",
            f"the document has {N} tokens",
            f"the smallest feasible budget is {smallest}",
        )


def _share(text: str, share: Fraction) -> Fraction:
    if not 0 < share <= 1:
        raise UsageError(f"--budget {text}: a share lies above 0 and up to 100%", fix="write 35% or 0.35")
    return share


def largest(limit: int, most: int, size_of: Callable[[int], int]) -> int:
    """The largest n up to `most` with size_of(n) <= limit, for a size_of that never falls; 0 if there is none."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if size_of(middle) <= limit else (low, middle - 1)
    return low


def protection(B: int, lead: int) -> tuple[int, int]:
    """First and newest tokens that stay by default, for B entries a head and a template of `lead` tokens."""
    return min(max(4, lead), B // 8), min(32, B // 4)


def share_out(want: Tensor, total: int, low: Tensor, high: Tensor) -> Tensor:  # [X], [X], [X] -> [X] int64
    """Whole numbers near `want` that add up to `total`, each within [low, high]; on the CPU.

    Largest remainder, ties to the lower index; what the bounds take or free is shared evenly among the rest.
    Raises InfeasibleError when the bounds leave no room for the total.
    """
    want, low, high = want.double().cpu(), low.long().cpu(), high.long().cpu()
    if not int(low.sum()) <= total <= int(high.sum()):
        raise InfeasibleError(
            f"{total} entries cannot be shared out: the heads need {int(low.sum())} and hold {int(high.sum())}",
            "protected entries (sink=, recent=) count inside the budget",
            "raise the budget or protect less",
        )
    count = want.clamp(low.double(), high.double()).floor().long()
    order = (want - want.floor()).argsort(descending=True, stable=True)
    while (missing := total - int(count.sum())) != 0:
        step = 1 if missing > 0 else -1
        room = (high - count if step > 0 else count - low)[order]
        ranked = order if step > 0 else order.flip(0)
        room = room if step > 0 else room.flip(0)
        open_ = ranked[room > 0]
        each = max(1, abs(missing) // len(open_))
        take = torch.minimum(room[room > 0], torch.tensor(each))[: abs(missing)]
        count[open_[: len(take)]] += step * take
    return count
