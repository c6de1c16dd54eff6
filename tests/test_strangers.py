"""The Python interface in the hands of a stranger: wrong things are refused in words, never read as something else."""

from pathlib import Path
from typing import Any

import pytest
import torch
from test_api import IDS, TEXT, filled, network
from tiny import tiny_model, tiny_tokenizer

import kvcli
from kvcli.cli import run
from kvcli.errors import InfeasibleError, MismatchError, UsageError
from kvcli.model.cache import named
from kvcli.model.load import Model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_model(tmp_path_factory.mktemp("strangers"))


@pytest.fixture(scope="module")
def model(folder: Path) -> Model:
    return kvcli.load(folder, dtype="float32")


@pytest.mark.parametrize("document", [None, Path("doc.txt"), b"words", ["a", "b"], {"input_ids": [1]}, [5, 2**70]])
def test_what_is_neither_text_nor_ids(model: Model, document: Any) -> None:
    with pytest.raises(UsageError, match="neither text nor ids"):
        kvcli.prefill(document, model)


@pytest.mark.parametrize("ids", [[1.5, 2.0], [True, False], [], [[1, 2], [3, 4]], torch.tensor(5)])
def test_ids_are_one_sequence_of_whole_numbers(model: Model, ids: Any) -> None:
    with pytest.raises(UsageError, match=r"no type for ids|not one sequence"):
        kvcli.prefill(ids, model)


@pytest.mark.parametrize("token", [-1, 300, 2**40])
def test_tokens_that_the_model_does_not_have_are_never_run(folder: Path, model: Model, token: int) -> None:
    snapshot = kvcli.prefill(IDS, model)
    given = [5, token, 7]
    for work in (
        lambda: kvcli.prefill(given, model),
        lambda: kvcli.prefill(given, model, onto=snapshot),
        lambda: kvcli.from_cache(filled(network(folder, "sdpa"), [5, 6, 7]), given, model),
    ):
        with pytest.raises(MismatchError, match=f"no token {token}, it knows 300"):
            work()


def test_a_tokenizer_larger_than_the_model(tmp_path: Path) -> None:
    tiny_model(tmp_path / "odd")
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"w{i}" for i in range(60)])
    tokenizer.save_pretrained(tmp_path / "odd")
    (tmp_path / "doc.txt").write_text("the w59 sailed")
    (tmp_path / "fine.txt").write_text("the ferry sailed")
    prefill = ["prefill", "--model", str(tmp_path / "odd"), "-f", "-o", str(tmp_path / "x")]
    assert run([*prefill, str(tmp_path / "doc.txt")]) == 5
    assert run([*prefill, str(tmp_path / "fine.txt")]) == 0
    assert run(["resume", str(tmp_path / "x"), "-p", "w59?", "-n", "2", "--model", str(tmp_path / "odd")]) == 5


@pytest.mark.parametrize("name", ["report.kv.safetensors", Path("report.kv.safetensors"), torch.tensor(IDS)])
def test_a_name_where_a_snapshot_is_wanted(model: Model, name: Any) -> None:
    for work in (lambda: kvcli.compress(name, "snapkv", 0.5), lambda: kvcli.prefill("x", model, onto=name)):
        with pytest.raises(UsageError, match="is no snapshot"):
            work()


@pytest.mark.parametrize("thing", [None, 5, [], ((torch.zeros(1, 2, 5, 8),) * 2,) * 2])
def test_what_is_no_cache(model: Model, thing: Any) -> None:
    with pytest.raises(UsageError, match="no cache of transformers"):
        kvcli.from_cache(thing, IDS, model)


@pytest.mark.parametrize("chunk", [0, -1])
def test_chunks_hold_something(model: Model, chunk: int) -> None:
    with pytest.raises(UsageError, match="at least one token"):
        kvcli.prefill(TEXT, model, chunk=chunk)


def test_a_second_tokenizer_is_not_ignored(folder: Path) -> None:
    with pytest.raises(UsageError, match="its own tokenizer"):
        kvcli.load(folder, tiny_tokenizer())
    assert kvcli.load(folder, device=torch.device("cpu")).device.type == "cpu"


def test_a_question_that_does_not_fit(model: Model) -> None:
    with pytest.raises(InfeasibleError, match="no room for"):
        kvcli.prefill(TEXT, model).inputs(model, "who " * 300)


def test_a_network_of_another_attention_does_not_answer(folder: Path, model: Model) -> None:
    cache, net = kvcli.prefill(TEXT, model).cache(model), network(folder, "sdpa")
    with pytest.raises(InfeasibleError, match="did not attend to what the cache holds"):
        net(torch.tensor([[5]]), **named(net, cache))


def test_one_layer_is_found_out_at_its_second_run(tmp_path: Path) -> None:
    one = kvcli.load(tiny_model(tmp_path, num_hidden_layers=1), dtype="float32")
    cache, net = kvcli.prefill(TEXT, one).cache(one), network(tmp_path, "sdpa")
    net(torch.tensor([[5]]), **named(net, cache))
    with pytest.raises(InfeasibleError, match="did not attend"):
        net(torch.tensor([[5]]), **named(net, cache))
