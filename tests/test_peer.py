"""Beside the peer, without it: both sides measure the same thing, and their rows are put together rightly."""

import ast
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import beside
import docs
import kept as kept_entries
import peer
import pytest
import torch
from tiny import tiny_model
from transformers import AutoModelForCausalLM

import kvcli
from kvcli.metrics import kl, top1
from kvcli.model.load import Model
from kvcli.tasks.task import Case, Question

pytestmark = pytest.mark.filterwarnings("ignore:.*past_key_values")  # what the peer's transformers calls it

CASES = [
    Case("needle", f"text-{i}", f"The {word} of Riga is 31{i}3. " * 4, (Question(f"Which {word}?", "It is", n=4),))
    for i, word in enumerate(("price", "lot", "age"))
]


class Keep:
    """A press in kvpress' shape that keeps entries of these indices, the same in every head."""

    def __init__(self, index: torch.Tensor) -> None:
        self.index = index

    def forward_hook(self, module: Any, args: Any, kwargs: Any, output: Any) -> Any:
        layer = (kwargs.get("cache") or kwargs["past_key_values"]).layers[module.layer_idx]
        layer.keys, layer.values = layer.keys[:, :, self.index], layer.values[:, :, self.index]
        return output

    @contextmanager
    def __call__(self, net: Any) -> Iterator[None]:
        hooks = [part.self_attn.register_forward_hook(self.forward_hook, with_kwargs=True) for part in net.model.layers]
        yield
        for hook in hooks:
            hook.remove()


def kept(full: kvcli.Snapshot, recipe: str, keep: float) -> torch.Tensor:
    """Indices that a recipe keeps, of one that keeps the same in every head."""
    rows = kvcli.compress(full, recipe, keep).rows[0]
    return rows.pos[: int(rows.lens[0])].long()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose weights are large enough for its attention to matter."""
    return tiny_model(tmp_path_factory.mktemp("loud"), initializer_range=0.3)


@pytest.fixture
def net(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def job(model: Model) -> dict[str, Any]:
    return beside.make_job(model, CASES, [0.3, 0.6])


def test_a_job_is_json(job: dict[str, Any]) -> None:
    assert json.loads(json.dumps(job)) == job
    assert [len(case["questions"]) for case in job["cases"]] == [1, 1, 1]
    assert len(job["stops"]) > 0


def test_a_fingerprint_is_of_every_token_and_weight(job: dict[str, Any], tmp_path: Path) -> None:
    before = peer.fingerprint(job)
    job["cases"][1]["questions"][0]["ids"][-1] += 1
    after = peer.fingerprint(job)
    assert (before["ids"] != after["ids"], before["weights"]) == (True, after["weights"])
    (tmp_path / "model.safetensors").write_bytes(b"other")
    assert peer.fingerprint({**job, "model": tmp_path})["weights"] != before["weights"]


def test_both_sides_measure_the_same(model: Model, net: Any, job: dict[str, Any], monkeypatch: Any) -> None:
    theirs = []
    for case in job["cases"]:
        full = kvcli.prefill(case["ids"], model)
        monkeypatch.setattr(peer, "make_press", lambda name, keep, full=full: Keep(kept(full, name, keep)))
        theirs += peer.measure(net, {**job, "presses": ["streamingllm"]}, case)
    mine = list(beside.ours(model, job, ["streamingllm"]))
    assert [(row["case"], row["method"], row["budget"]) for row in mine] == [
        (row["case"], row["method"], row["budget"]) for row in theirs
    ]
    for a, b in zip(mine, theirs, strict=True):
        assert a["bytes"] == b["bytes"]
        for x, y in zip(a["answers"], b["answers"], strict=True):
            assert (x["ids"], x["top1"]) == (y["ids"], y["top1"])
            assert x["kl"] == pytest.approx(y["kl"], rel=1e-2, abs=1e-6)
    own, *rest = (row["answers"][0]["kl"] for row in theirs[:3])
    assert (own, min(rest) > 1e-3) == (0.0, True)
    assert beside.agreement(mine, theirs) == 3


def test_what_a_press_keeps_is_found_by_its_keys(net: Any, job: dict[str, Any], monkeypatch: Any) -> None:
    monkeypatch.setattr(peer, "make_press", lambda name, keep: Keep(torch.tensor([7, 2, 11])))
    (row, *_) = peer.kept(net, {**job, "presses": ["knorm"]}, job["cases"][0])
    assert row["kept"] == [[[2, 7, 11]] * 2] * 2
    masked = net.base_model.layers[1].self_attn.__dict__
    read = peer.read

    def hiding(net: Any, ids: Any, press: Any = None) -> Any:
        held = read(net, ids, press)
        masked["masked_key_indices"] = (torch.zeros(2, dtype=torch.long), torch.tensor([0, 1]), torch.tensor([7, 2]))
        return held

    monkeypatch.setattr(peer, "read", hiding)
    (row, *_) = peer.kept(net, {**job, "presses": ["knorm"]}, job["cases"][0])
    assert row["kept"] == [[[2, 7, 11]] * 2, [[2, 11], [7, 11]]]


def test_shares_of_what_is_kept() -> None:
    ours, other = [[{1, 2, 3, 4}, {5}]], [[[1, 2, 9], [5, 6]]]
    found = kept_entries.shares(ours, other)
    assert (found["same"], found["agree"], found["sizes_differ"]) == (3 / 5, 3 / 4, 1.0)
    assert found["entries"] == [5, 5]


def test_a_press_that_fails_is_a_row(net: Any, job: dict[str, Any], monkeypatch: Any) -> None:
    def make(name: str, keep: float) -> Keep:
        if name == "bad":
            raise ValueError("no such press")
        return Keep(torch.arange(5))

    monkeypatch.setattr(peer, "make_press", make)
    rows = list(peer.measure(net, {**job, "presses": ["bad", "good"]}, job["cases"][0]))
    assert [row.get("error") for row in rows] == [None, *["ValueError: no such press"] * 2, None, None]
    assert rows[-1]["bytes"] / rows[0]["bytes"] == 5 / len(job["cases"][0]["ids"])
    assert rows[-1]["compress_seconds"] > 0


def test_no_press_leaves_anything_to_the_next(net: Any, job: dict[str, Any]) -> None:
    attention = net.model.layers[1].self_attn
    attention.masked_key_indices = "what AdaKV sets"
    with pytest.raises(OSError), peer.attention(net, "eager"):
        assert (net.config._attn_implementation, peer.read(net, job["cases"][0]["ids"]).bytes > 0) == ("eager", True)
        raise OSError
    assert (net.config._attn_implementation, hasattr(attention, "masked_key_indices")) == ("sdpa", False)


@pytest.mark.parametrize("name", peer.PRESSES)
def test_a_press_is_nested_as_listed(name: str, monkeypatch: Any) -> None:
    class Library:
        def __getattr__(self, kind: str) -> Any:
            return lambda *inner, **options: [kind, *(inner[0] if inner else [options])]

    monkeypatch.setitem(sys.modules, "kvpress", Library())
    *kinds, options = peer.make_press(name, 0.25)
    assert kinds == peer.PRESSES[name]
    assert options.pop("compression_ratio") == 0.75
    assert options == peer.OPTIONS.get(name, {})


def test_seconds_of_a_press_are_those_in_its_hooks(net: Any, job: dict[str, Any], monkeypatch: Any) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(peer.time, "perf_counter", lambda: float(next(clock)))
    with torch.inference_mode():
        held = peer.read(net, job["cases"][0]["ids"], Keep(torch.arange(5)))
    # Two layers: begin, four ticks in hooks, end, left.
    assert (held.prefill_seconds, held.compress_seconds) == (3.0, 3.0)


def test_divergence_is_ours_and_exact() -> None:
    rng = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 7, 50, generator=rng)
    found = peer.divergence(a.log_softmax(-1), b.log_softmax(-1))
    p, q = a.double().log_softmax(-1), b.double().log_softmax(-1)
    assert found["kl"] == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-5)
    assert found["kl"] == pytest.approx(float(kl(a, b).mean()), rel=1e-6)
    assert found["top1"] == pytest.approx(float(top1(a, b).float().mean()))


def spoken(case: str, method: str, keep: float, texts: list[str], model: Model) -> dict[str, Any]:
    """A row of one case whose answers are these texts, 2 tokens a second, with a KL of 0.1, 0.2, ..."""
    ids = [model.tokenizer.encode(text) for text in texts]
    answers = [
        {"ids": one, "seconds": (len(one) - 1) / 2, "kl": (i + 1) / 10, "top1": 0.5} for i, one in enumerate(ids)
    ]
    seconds = {"prefill_seconds": 3.0, "compress_seconds": 1.0 + len(case)}
    return {"case": case, "method": method, "budget": keep, "bytes": int(1000 * keep), **seconds, "answers": answers}


def test_a_summary_is_over_all_texts(model: Model) -> None:
    asked = tuple(Question("?", "", (answer,)) for answer in ("oak", "elm"))
    cases = [Case("needle", name, "", asked) for name in ("a", "bb", "cccccc")]
    said = {"a": ["an oak", "no"], "bb": ["oaks", "elm."], "cccccc": ["Oak", "an elm"]}
    rows = [spoken(name, "full", 1.0, ["oak", "elm"], model) for name in said]
    rows += [spoken(name, "knorm", 0.3, texts, model) for name, texts in said.items()]
    broken = {"case": "bb", "method": "tova", "budget": 0.3, "error": "ValueError: no"}
    rows += [spoken("a", "tova", 0.3, ["oak", "elm"], model), broken]
    found = beside.summary(rows, cases, model.tokenizer)
    assert found["full", 1.0]["hit"] == 1
    small = found["knorm", 0.3]
    assert (small["hit"], small["n"], small["keep"], small["compress_seconds"]) == (4 / 6, 6, 0.3, 3.0)
    assert small["stderr"] == pytest.approx((2 / 9 / 6) ** 0.5)
    assert (small["kl"], small["tokens_per_second"]) == (pytest.approx(0.15), pytest.approx(2.0))
    assert found["tova", 0.3] == {"method": "tova", "budget": 0.3, "error": "ValueError: no"}


def test_the_same_method_of_both_sides_stands_together() -> None:
    each = {
        side: {(name, budget): {"method": name, "budget": budget} for budget in (0.3, 0.1) for name in names if name}
        for side, names in zip(("kvcli", "kvpress"), zip(*beside.PAIRS, strict=True), strict=True)
    }
    found = beside.merged(each, [0.3, 0.1])
    assert len(found) == sum(map(len, each.values()))
    assert [row["budget"] for row in found] == sorted((row["budget"] for row in found), reverse=True)
    beneath = {(a["method"], b["method"]) for a, b in pairwise(found) if (a["by"], b["by"]) == ("kvcli", "kvpress")}
    assert {pair for pair in beside.PAIRS if all(pair)} <= beneath
    assert {name for _, name in beside.PAIRS[1:] if name} <= set(peer.PRESSES)
    assert {press for press, _ in kept_entries.PAIRS.values()} <= set(peer.PRESSES)


def test_the_table_has_a_line_for_every_row(tmp_path: Path, model: Model) -> None:
    cases = [Case("needle", "a", "", (Question("?", "", ("oak",)),))]
    rows = [spoken("a", "full", 1.0, ["oak"], model), spoken("a", "knorm", 0.3, ["elm"], model)]
    rows.append({"case": "a", "method": "tova", "budget": 0.3, "error": "ValueError: no"})
    run = {"date": "2000-01-01", "processor": "2 cores", "threads": 1, "model": "tiny", "dtype": "float32"}
    run |= {"texts": 1, "tokens": 1000, "agree": 1, "torch": "2", "transformers": "5", "by": "kvpress", "kvpress": "1"}
    path = tmp_path / "peer.jsonl"
    summary = beside.summary(rows, cases, model.tokenizer).values()
    path.write_text("".join(json.dumps({**row, **run}) + "\n" for row in summary))
    about, _, *table = docs.peer_table(path).splitlines()
    assert "kvpress 1 (torch 2, transformers 5), 2000-01-01" in about
    assert len(table) == 2 + len(rows)
    assert {line.count("|") for line in table} == {10}
    assert "ValueError: no" in table[-1]


@pytest.mark.parametrize(
    ("script", "words"),
    [("exit 3", "give the python"), ("""echo '{"weights": "0", "ids": "0"}'""", "other tokens")],
)
def test_a_peer_that_cannot_be_trusted_ends_it(script: str, words: str, job: dict[str, Any], tmp_path: Path) -> None:
    fake = tmp_path / "python"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    with pytest.raises(SystemExit, match=words):
        beside.theirs(str(fake), job)


def test_a_peer_that_is_not_there_ends_it(job: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="give the python"):
        beside.theirs(str(tmp_path / "none"), job)


def test_the_peer_needs_nothing_of_ours() -> None:
    tree = ast.parse(Path(peer.__file__).read_text())
    found = {name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    found |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    roots = {name.split(".")[0] for name in found}
    assert roots - set(sys.stdlib_module_names) == {"torch", "transformers"}
