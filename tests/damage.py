"""A campaign of damage: `python tests/damage.py [N]` harms small snapshots until reading has refused N of them.

Plain harm leaves the digests alone, so each of it must be refused. A forgery mends the digests: it must be refused too
or read like any snapshot, and then be compressed or refused. Nothing but a KvError may come out of either.
"""

import io
import json
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from make import make_snapshot, packed
from xxhash import xxh3_128

from kvcli.budget import Budget
from kvcli.cli.ui import peak_memory
from kvcli.errors import FormatError, KvError
from kvcli.header import read_header
from kvcli.pipeline import carry_out, make_plans
from kvcli.recipe import Recipe
from kvcli.storage import Reader

JUNK: list[Any] = [0, -1, 1, 3, 2**31, 2**60, 2**63, 1e308, float("nan"), "", "x", "full", None, True, [], {}, [1, 2]]
RECIPES = [Recipe.parse(text) for text in ("kvmerger", "snapkv+adakv", "random", "streamingllm")]
Rng = random.Random


def span(raw: bytes, rng: Rng) -> tuple[int, int]:
    """A stretch of the file, short more often than long, and as often in the header as behind it."""
    end = 8 + int.from_bytes(raw[:8], "little") if rng.random() < 0.5 else len(raw)
    start = rng.randrange(end)
    return start, min(len(raw), start + rng.choice([1, 1, 2, 16, 100, 2000]))


def flip(raw: bytes, rng: Rng) -> bytes:
    start, _ = span(raw, rng)
    return raw[:start] + bytes([raw[start] ^ 1 << rng.randrange(8)]) + raw[start + 1 :]


def cut(raw: bytes, rng: Rng) -> bytes:
    return raw[: rng.randrange(len(raw))]


def add(raw: bytes, rng: Rng) -> bytes:
    return raw + rng.randbytes(rng.choice([1, 8, 500]))


def insert(raw: bytes, rng: Rng) -> bytes:
    start, end = span(raw, rng)
    return raw[:start] + rng.choice([rng.randbytes(end - start), raw[start:end]]) + raw[start:]


def drop(raw: bytes, rng: Rng) -> bytes:
    start, end = span(raw, rng)
    return raw[:start] + raw[end:]


def blank(raw: bytes, rng: Rng) -> bytes:
    start, end = span(raw, rng)
    return raw[:start] + bytes([rng.choice([0, 0, 255])]) * (end - start) + raw[end:]


def swap(raw: bytes, rng: Rng) -> bytes:
    (a, b), (c, d) = sorted([span(raw, rng), span(raw, rng)])
    return raw if b > c else raw[:a] + raw[c:d] + raw[b:c] + raw[a:b] + raw[d:]


def splice(raw: bytes, rng: Rng) -> bytes:
    """The bytes of one tensor where those of another belong."""
    a, b = rng.sample(read_header(io.BytesIO(raw)).entries, 2)
    part = raw[a.start : a.end][: b.nbytes]
    return raw[: b.start] + part + raw[b.start + len(part) :]


def forged_tensor(raw: bytes, rng: Rng) -> bytes:
    """Other numbers in a tensor, its digest and that of the header right."""
    header = read_header(io.BytesIO(raw))
    at = rng.randrange(len(header.entries) - 1)
    entry, start = header.entries[at], header.entries[-1].start + 16 * at
    part = bytearray(raw[entry.start : entry.end])
    for _ in range(rng.choice([1, 1, 4])):
        i = rng.randrange(len(part))
        part[i] = rng.choice([part[i] ^ 1 << rng.randrange(8), 0, 1, 127, 255])
    digest = xxh3_128(bytes(part)).digest()
    return raw[: entry.start] + part + raw[entry.end : start] + digest + raw[start + 16 :]


def forged_header(raw: bytes, rng: Rng) -> bytes:
    """Another header, its digest right."""
    length = int.from_bytes(raw[:8], "little")
    table = json.loads(raw[8 : 8 + length])
    if rng.random() < 0.5:
        key = rng.choice([key for key, text in table["__metadata__"].items() if text[:1] in "[{"])
        part = json.loads(table["__metadata__"][key])
        table["__metadata__"][key] = json.dumps(edited(part, rng))
    else:
        table = edited(table, rng)
    text = json.dumps(table).encode()
    head = len(text).to_bytes(8, "little") + text
    return head + raw[8 + length : -16] + xxh3_128(head).digest()


def edited(value: Any, rng: Rng) -> Any:
    """A JSON value with one thing in it changed, taken away, doubled, renamed or moved."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
        at = rng.randrange(len(pairs))
        key, part = pairs[at]
        act = rng.random()
        if act < 0.75:
            pairs[at] = (key, edited(part, rng))
        elif act < 0.85:
            del pairs[at]
        elif act < 0.92:
            pairs.insert(rng.randrange(len(pairs)), pairs.pop(at))
        else:
            pairs.append((f"{key}x", part))
        return dict(pairs) if isinstance(value, dict) else [part for _, part in pairs]
    if type(value) in (int, float) and rng.random() < 0.6:
        return value + rng.choice([-1, 1, 8])
    return rng.choice(JUNK)


HARM: tuple[Callable[[bytes, Rng], bytes], ...] = (flip, cut, add, insert, drop, blank, swap, splice)
FORGERY: tuple[Callable[[bytes, Rng], bytes], ...] = (forged_tensor, forged_header)


def use(source: Any, rng: Rng) -> None:
    """What verify, resume and compress do with a snapshot."""
    with Reader(source) as reader:
        snapshot = reader.snapshot()
        _ = snapshot.rows[:], snapshot.stats[:]
        reader.verify()
        try:
            plans = make_plans(snapshot, rng.choice(RECIPES), [Budget.parse("50%")], parent=reader.digest)
            carry_out(snapshot, plans, [io.BytesIO()])
        except FormatError as wrong:
            raise AssertionError("found only after the file was called sound") from wrong
        except KvError:
            pass  # what is asked cannot be met, such as a score without its statistic


def campaign(n: int, seed: int = 0) -> Counter[tuple[str, str]]:
    """How often each kind of harm was refused or passed; whatever is no KvError comes out with the harm that did it."""
    rng, counts = Rng(seed), Counter[tuple[str, str]]()
    options: list[dict[str, Any]] = [{}, {"ragged": True, "bias": True}, {"ragged": True, "dtype": torch.float32}]
    files = [packed(make_snapshot(**option)) for option in options]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "harmed"
        while sum(count for (_, said), count in counts.items() if said == "refused") < n:
            harm, whole, state = rng.choice(HARM + FORGERY), rng.choice(files), rng.getstate()
            raw = harm(whole, rng)
            if raw == whole:
                continue
            path.write_bytes(raw)
            try:
                use(path if rng.random() < 0.5 else io.BytesIO(raw), rng)
                counts[harm.__name__, "sound"] += 1
            except FormatError as error:
                shown = all(line.isprintable() for line in error.lines())
                counts[harm.__name__, "refused" if shown and error.what else "badly told"] += 1
            except Exception as error:
                raise AssertionError(f"{harm.__name__} of {options[files.index(whole)]}, rng {state[1][-1]}") from error
    return counts


def resident() -> int:
    """Bytes this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def main(n: int) -> dict[str, Any]:
    """Run the campaign and say what came of it; memory is the peak above what a first round left."""
    campaign(20)
    rest = resident()
    counts = campaign(n, seed=1)
    kinds = {name: {said: counts[name, said] for kind, said in counts if kind == name} for name, _ in sorted(counts)}
    return {"refused": n, "memory": max(0, peak_memory() - rest), "kinds": kinds}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(main(int(sys.argv[1]) if len(sys.argv) > 1 else 2000)))
