"""Two campaigns from the command line: damage to files, and writers killed while they write."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from damage import FORGERY, HARM

HERE = Path(__file__).parent


def run(script: str, n: int) -> dict[str, Any]:
    """What the script reports, in a process of its own, since it measures or kills."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE.parent)}
    command = [sys.executable, str(HERE / script), str(n)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return dict(json.loads(done.stdout))


@pytest.mark.slow
def test_two_thousand_damages_are_refused_in_little_memory() -> None:
    facts = run("damage.py", 2000)
    assert facts["refused"] == 2000 and facts["memory"] < 200e6
    assert set(facts["kinds"]) == {harm.__name__ for harm in HARM + FORGERY}
    for harm in HARM:
        assert list(facts["kinds"][harm.__name__]) == ["refused"]
    for harm in FORGERY:
        assert set(facts["kinds"][harm.__name__]) == {"refused", "sound"}


@pytest.mark.slow
def test_a_hundred_killed_writers_lose_nothing() -> None:
    facts = run("kills.py", 100)  # fails where anything is lost
    assert facts["killed"] == 100 == sum(facts.get(found, 0) for found in ("old", "new", "none", "whole"))
    assert facts["temporaries"] > 5, "no writer was killed while it wrote"
