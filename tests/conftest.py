"""Every test has a home of its own, so that none reads or writes the user's."""

import os
from pathlib import Path

import pytest

# A hub that cannot be reached is asked for half a minute; transformers reads this when it is imported.
os.environ["HF_HUB_OFFLINE"] = "1"


@pytest.fixture(autouse=True)
def home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("home")
    monkeypatch.setenv("KVCLI_HOME", str(folder))
    return folder
