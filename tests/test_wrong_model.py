"""Models that did not write the snapshot are refused at the command line: exit 5, and what differs is named."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import nudge, tiny_model, tiny_tokenizer

from kvcli.cli import run

RANK = 2


def other_seed(folder: Path) -> None:
    tiny_model(folder, seed=1)


def one_bit(folder: Path) -> None:
    nudge(tiny_model(folder))


def other_tokenizer(folder: Path) -> None:
    tiny_tokenizer(extra=("zebra",)).save_pretrained(tiny_model(folder))


def merged_adapter(folder: Path) -> None:
    """What a low-rank adapter leaves behind when it is merged: the same names, shapes and dtypes."""
    file = tiny_model(folder) / "model.safetensors"
    weights = load_file(file)
    name = "model.layers.1.self_attn.q_proj.weight"
    down, up = torch.randn(RANK, 32), torch.randn(32, RANK)
    weights[name] += 1e-3 * up @ down
    save_file(weights, file, {"format": "pt"})


def other_shape(folder: Path) -> None:
    tiny_model(folder, num_key_value_heads=4)


def other_rope(folder: Path) -> None:
    tiny_model(folder, rope_parameters={"rope_type": "default", "rope_theta": 5e4})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("work")
    os.environ["KVCLI_HOME"] = str(folder / "home")
    (folder / "doc.txt").write_text("The harbour opened at six. " * 5)
    tiny_model(folder / "model")
    assert run(["prefill", f"{folder}/doc.txt", "--model", f"{folder}/model", "-o", f"{folder}/a"]) == 0
    return folder


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (other_seed, "its weights differ"),
        (one_bit, "its weights differ"),
        (merged_adapter, "its weights differ"),
        (other_tokenizer, "its tokenizer differs"),
        (other_rope, "its config differs"),
        (other_shape, "4 query and 4 KV heads"),
    ],
)
def test_what_differs_is_named(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], make: Callable[[Path], None], says: str
) -> None:
    make(tmp_path / "other")
    assert run(["resume", f"{work}/a", "-p", "x", "-n", "2", "--model", str(tmp_path / "other")]) == 5
    seen = capsys.readouterr()
    assert says in seen.err and seen.out == "" and len(seen.err.splitlines()) <= 3


def test_an_equal_copy_elsewhere_is_accepted(work: Path, tmp_path: Path) -> None:
    tiny_model(tmp_path / "copy")
    assert run(["resume", f"{work}/a", "-p", "x", "-n", "2", "--model", str(tmp_path / "copy")]) == 0
