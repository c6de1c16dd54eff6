"""What tests share: a home of its own for each, so that none reads or writes the user's, and a tiny model."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from kvcli.model.load import Model

# A hub that cannot be reached is asked for half a minute; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Shells start background jobs deaf to Ctrl-C, and the commands that tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("KVCLI_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny model, not to be changed."""
    from tiny import tiny_model

    return tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def model(folder: Path) -> "Model":
    """That model, the test's own to break."""
    from kvcli.model.load import load

    return load(str(folder), dtype="float32")


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    import torch

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton kernels run on the CPU, in Triton's interpreter."""
    from interpret import interpret

    from kvcli.kernels import launch

    monkeypatch.setattr(launch, "run", interpret)
