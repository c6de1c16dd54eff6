"""Stretches of a text, by its characters and by its tokens: paragraphs, and those that are given."""

import re
from bisect import bisect_left
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from ..collect import SEGMENTS
from ..errors import FormatError

Span = tuple[int, int, int, int]  # begin, end, type (index in SEGMENTS), group
FORM = '{"start": 0, "end": 120, "type": "paragraph", "group": 0}'


def paragraphs(text: str) -> list[Span]:
    """What blank lines divide the text into, without a gap: the lines before a paragraph belong to the one before."""
    begin = len(text) - len(text.lstrip())
    starts = [0, *(blank.end() for blank in re.finditer(r"\n\s*\n", text) if blank.end() > begin)]
    ends = [*starts[1:], len(text)]
    return [(start, end, 0, i) for i, (start, end) in enumerate(zip(starts, ends, strict=True))]


def spans_of(rows: Iterable[tuple[str, Mapping[str, Any]]], length: int) -> list[Span]:
    """The stretches that rows describe, each with its place in words, of a text of `length` characters.

    Raises FormatError, with the place, for one that is no stretch of the text, or that overlaps the one before.
    """
    found: list[Span] = []
    for i, (where, row) in enumerate(rows):
        start, end, kind, group = (row.get(key, usual) for key, usual in _usual(i).items())
        if strange := row.keys() - _usual(i).keys():
            raise FormatError(f"{where}: {min(strange)!r:.80} says nothing of a stretch", f"write {FORM}")
        if not all(type(n) is int and 0 <= n < 2**31 for n in (start, end, group)) or start >= end:
            raise FormatError(f"{where} is no stretch of a text", "start < end and group are whole numbers", FORM)
        if kind not in SEGMENTS:
            raise FormatError(f"{where}: there is no type {kind!r:.80}", f"there are {', '.join(SEGMENTS)}")
        if end > length:
            raise FormatError(f"{where} ends at character {end:,}", f"the document has {length:,}")
        if found and start < found[-1][1]:
            raise FormatError(f"{where} begins at character {start:,}", f"the one before ends at {found[-1][1]:,}")
        found.append((start, end, SEGMENTS.index(kind), group))
    return found


def _usual(i: int) -> dict[str, Any]:
    return {"start": None, "end": None, "type": SEGMENTS[0], "group": i}


def in_tokens(spans: Sequence[Span], last: Sequence[int], lead: int) -> Tensor:  # -> [S, 4] int32
    """Stretches of characters as stretches of tokens, `lead` of which come before; without those that have none.

    last: of each token its last character. A token is where that is.
    """
    rising = [*accumulate(last, max)]
    edges = [(lead + bisect_left(rising, start), lead + bisect_left(rising, end)) for start, end, *_ in spans]
    pairs = zip(edges, spans, strict=True)
    return table([(start, end, *rest) for (start, end), (_, _, *rest) in pairs if start < end])


def table(rows: Sequence[Sequence[int]]) -> Tensor:  # -> [S, 4] int32
    """The tensor `stat.segments` of stretches of tokens."""
    return torch.tensor(rows, dtype=torch.int32).view(-1, 4)


def behind(old: Tensor | None, new: Tensor, start: int) -> Tensor:  # [S, 4], [S', 4] -> [S + S', 4]
    """The stretches of a text, and those of one that was appended at `start`, whose groups are counted on."""
    if old is None or not len(old):
        return new + new.new_tensor([start, start, 0, 0])
    return torch.cat([old, new + new.new_tensor([start, start, 0, int(old[:, 3].max()) + 1])])
