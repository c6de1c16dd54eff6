"""What kvpress makes of a job: `make peer` runs this with an interpreter that has kvpress and need not have kvcli.

`python peer.py JOB.json` prints a line with versions, then one for each document, press and budget. The job holds token
ids, so that both sides read exactly the same: {"model": folder, "dtype", "stops": [ids that end an answer], "budgets",
"presses", "cases": [{"name", "ids", "questions": [{"ids", "n"}], "continuation": ids that follow, if any}]}. With
"kept" in the job a line says which positions a press, here [name, budget, options], keeps in each [layer][head],
instead of what the model then answers.
"""

import hashlib
import json
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from itertools import product
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache

# Names of kvpress' classes, the outer one first.
PRESSES = {
    "random": ["RandomPress"],
    "streamingllm": ["StreamingLLMPress"],
    "knorm": ["KnormPress"],
    "keydiff": ["KeyDiffPress"],
    "snapkv": ["SnapKVPress"],
    "adakv+snapkv": ["AdaKVPress", "SnapKVPress"],
    "observed attention": ["ObservedAttentionPress"],
    "tova": ["TOVAPress"],
    "expected attention": ["ExpectedAttentionPress"],
    "adakv+expected": ["AdaKVPress", "ExpectedAttentionPress"],
    "compactor": ["CompactorPress"],
    "kvzip": ["KVzipPress"],
    "lagkv": ["LagKVPress"],
    "pyramidkv": ["PyramidKVPress"],
    "critical+snapkv": ["CriticalKVPress", "SnapKVPress"],
}
# Defaults but for this one, which is what kvpress' own benchmark runs: with the default, 0, it finds next to nothing.
OPTIONS = {"adakv+expected": {"epsilon": 1e-2}}
EAGER = {"observed attention"}  # presses that need the attention weights themselves


@dataclass(frozen=True)
class Held:
    """The cache of a document, the seconds its reading took, and those the press added."""

    cache: Any
    prefill_seconds: float
    compress_seconds: float

    @property
    def bytes(self) -> int:
        """Of all keys and values in memory, whether or not a mask hides them."""
        return sum(part.nbytes for layer in self.cache.layers for part in (layer.keys, layer.values))


def make_press(name: str, keep: float, **options: Any) -> Any:
    """The press; options are those of the class that is wrapped around, or that is alone."""
    kvpress = import_module("kvpress")
    *outer, inner = PRESSES[name]
    own = {} if outer else options
    press = getattr(kvpress, inner)(compression_ratio=1 - keep, **OPTIONS.get(name, {}), **own)
    for wrap in reversed(outer):
        press = getattr(kvpress, wrap)(press, **options)
    return press


def read(net: Any, ids: Sequence[int], press: Any = None) -> Held:
    """Prefill under a press: its time is that inside its hooks, and that of leaving it, when KVzip does its work."""
    cache, spent = DynamicCache(), []
    for module in net.modules():  # what AdaKV and KVzip masked of the last cache; eager attention would not forget it
        module.__dict__.pop("masked_key_indices", None)
    if press is not None:
        press.forward_hook = timed(press.forward_hook, spent)
    with nullcontext() if press is None else press(net):
        begin = time.perf_counter()
        net.base_model(input_ids=torch.tensor([ids]), past_key_values=cache)
        end, hooks = time.perf_counter(), sum(spent)
    return Held(cache, end - begin - hooks, hooks + time.perf_counter() - end)


def timed(work: Callable[..., Any], spent: list[float]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.perf_counter()
        out = work(*args, **kwargs)
        spent.append(time.perf_counter() - begin)
        return out

    return run


@contextmanager
def attention(net: Any, name: str) -> Iterator[None]:
    """The model with this attention for a while."""
    before = net.config._attn_implementation
    net.set_attn_implementation(name)
    try:
        yield
    finally:
        net.set_attn_implementation(before)


def logits(net: Any, cache: Any, ids: Sequence[int], at: int, keep: int = 1) -> Tensor:  # -> [keep, V]
    """Of the last `keep` of these ids, which stand at positions `at` and on, however few entries are left before."""
    pos = torch.arange(at, at + len(ids))[None]
    return net(input_ids=torch.tensor([ids]), past_key_values=cache, position_ids=pos, logits_to_keep=keep).logits[0]


def speak(net: Any, held: Held, at: int, question: dict[str, Any], stops: Sequence[int]) -> tuple[list[int], float]:
    """The greedy answer, and its seconds without the first token; the cache is left as it was."""
    cache = deepcopy(held.cache)
    said = [int(logits(net, cache, question["ids"], at).argmax())]
    at, begin = at + len(question["ids"]), time.perf_counter()
    while len(said) < question["n"] and said[-1] not in stops:
        said.append(int(logits(net, cache, said[-1:], at + len(said) - 1).argmax()))
    return said, time.perf_counter() - begin


def expect(net: Any, held: Held, at: int, question: dict[str, Any], said: Sequence[int]) -> Tensor:  # -> [M, V] float32
    """Log-probabilities at each token of what the full cache said, whatever this one would say."""
    ids = [*question["ids"], *said[:-1]]
    return logits(net, deepcopy(held.cache), ids, at, len(said)).float().log_softmax(-1)


def next_of(case: dict[str, Any]) -> tuple[dict[str, Any], list[int]]:
    """What follows the document, as a question of one token and the text that answers it."""
    first, *rest = case["continuation"]
    return {"ids": [first]}, rest


def divergence(full: Tensor, other: Tensor) -> dict[str, float]:  # [M, V], [M, V] log-probabilities
    """Mean KL(full || other) in nats, and how often both would say the same next."""
    same = full.argmax(-1) == other.argmax(-1)
    return {"kl": float((full.exp() * (full - other)).sum(-1).mean()), "top1": float(same.float().mean())}


@torch.inference_mode()
def measure(net: Any, job: dict[str, Any], case: dict[str, Any], seed: int = 0) -> Iterator[dict[str, Any]]:
    """A row for the full cache, then one for each press and budget; a press that fails gives a row with its error."""
    N, full = len(case["ids"]), read(net, case["ids"])
    said = [speak(net, full, N, question, job["stops"])[0] for question in case["questions"]]
    asked = list(zip(case["questions"], said, strict=True))
    wanted = [expect(net, full, N, question, ids) for question, ids in asked]
    ahead = expect(net, full, N, *next_of(case)) if "continuation" in case else None
    for press, keep in [("full", 1.0), *product(job["presses"], job["budgets"])]:
        row = {"case": case["name"], "method": press, "budget": keep}
        try:
            torch.manual_seed(seed)
            held = full if press == "full" else under(net, case["ids"], press, keep)
            answers = []
            for (question, ids), want in zip(asked, wanted, strict=True):
                mine, spent = speak(net, held, N, question, job["stops"])
                found = divergence(want, expect(net, held, N, question, ids))
                answers.append({"ids": mine, "seconds": spent, **found})
            beyond = (
                {"continuation": divergence(ahead, expect(net, held, N, *next_of(case)))} if ahead is not None else {}
            )
        except Exception as cause:  # whatever a library of others raises: the next press is measured all the same
            yield {**row, "error": f"{type(cause).__name__}: {cause}"}
            continue
        seconds = {"prefill_seconds": held.prefill_seconds, "compress_seconds": held.compress_seconds}
        yield {**row, "bytes": held.bytes, **seconds, "answers": answers, **beyond}


def under(net: Any, ids: Sequence[int], press: str, keep: float) -> Held:
    with attention(net, "eager") if press in EAGER else nullcontext():
        return read(net, ids, make_press(press, keep))


@torch.inference_mode()
def kept(net: Any, job: dict[str, Any], case: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """What each press keeps at each budget, found by looking up its keys among those of the full cache."""
    full = read(net, case["ids"])
    where = [[lookup(head) for head in layer.keys[0]] for layer in full.cache.layers]
    for press, keep, options in job["presses"]:
        held, found = read(net, case["ids"], make_press(press, keep, **options)), []
        modules = [layer.self_attn for layer in net.base_model.layers]
        for module, layer, tables in zip(modules, held.cache.layers, where, strict=True):
            hidden = module.__dict__.get("masked_key_indices")
            gone = {*zip(*(part.tolist() for part in hidden[1:]), strict=True)} if hidden else set()
            rows = [[table[row] for row in names(head)] for table, head in zip(tables, layer.keys[0], strict=True)]
            found.append([[j for j in sorted(head) if (h, j) not in gone] for h, head in enumerate(rows)])
        yield {"method": press, "budget": keep, "options": options, "kept": found}


def names(keys: Tensor) -> list[bytes]:  # [T, D]
    """A key as bytes, by which it is recognised: no two of a head are alike, since their positions differ."""
    return [row.numpy().tobytes() for row in keys]


def lookup(keys: Tensor) -> dict[bytes, int]:  # [T, D]
    return {name: i for i, name in enumerate(names(keys))}


def fingerprint(job: dict[str, Any]) -> dict[str, str]:
    """Hashes of the weights and of all ids: equal on both sides, or they did not read the same."""
    weights = hashlib.sha256()
    for file in sorted(Path(job["model"]).glob("*.safetensors")):
        with file.open("rb") as parts:
            for part in iter(partial(parts.read, 1 << 24), b""):
                weights.update(part)
    ids = json.dumps([[case["ids"], case["questions"]] for case in job["cases"]])
    return {"weights": weights.hexdigest(), "ids": hashlib.sha256(ids.encode()).hexdigest()}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    import_module("kvpress")  # before the model is made: it changes the attention of transformers
    versions = {"kvpress": version("kvpress"), "torch": torch.__version__, "transformers": transformers.__version__}
    config = {**versions, "python": platform.python_version(), "threads": torch.get_num_threads(), **fingerprint(job)}
    print(json.dumps(config), flush=True)
    net = AutoModelForCausalLM.from_pretrained(job["model"], dtype=getattr(torch, job["dtype"])).eval()
    for i, case in enumerate(job["cases"]):
        print(f"kvpress: text {i + 1} of {len(job['cases'])}", file=sys.stderr)
        for row in kept(net, job, case) if "kept" in job else measure(net, job, case, seed=i):
            print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
