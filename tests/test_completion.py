"""kvcli completion: scripts for shells, and what a real bash makes of its own."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvcli.cli import COMMANDS, run
from kvcli.cli.completion import SHELLS
from kvcli.cli.names import METHODS

ROOT = Path(__file__).parent.parent
# The shell's part of a completion: words and their index in, COMPREPLY out.
ASK = """
source <(kvcli completion bash) || exit 9
complete -p kvcli | grep -q _kvcli_completion || exit 8
compopt() { echo compopt "$@"; }
for line in "$@"; do
  COMP_WORDS=($line) COMP_CWORD=$((${#COMP_WORDS[@]} - 1)) COMPREPLY=()
  _kvcli_completion kvcli
  echo "$line: ${COMPREPLY[*]}"
done
"""


@pytest.mark.parametrize("shell", SHELLS)
def test_scripts_are_of_their_shell(
    shell: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(["completion", shell]) == 0
    seen = capsys.readouterr()
    assert f"_KVCLI_COMPLETE={shell}_complete" in seen.out and not seen.err
    monkeypatch.setenv("SHELL", f"/usr/bin/{shell}")
    assert run(["completion"]) == 0
    assert capsys.readouterr().out == seen.out


@pytest.mark.parametrize("own", ["/bin/tcsh", "", None])
def test_an_unknown_shell_is_asked_for(
    own: str | None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SHELL", raising=False) if own is None else monkeypatch.setenv("SHELL", own)
    assert run(["completion"]) == 2
    assert "zsh" in capsys.readouterr().err
    assert run(["completion", "tcsh"]) == 2


def completed(folder: Path, *lines: str) -> dict[str, list[str]]:
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    script = folder / "kvcli"
    script.write_text(f'#!/bin/sh\nPYTHONPATH="{ROOT}" exec "{sys.executable}" -m kvcli "$@"\n')
    script.chmod(0o755)
    command = [bash, "--norc", "-c", f'PATH="{folder}:$PATH"\n{ASK}', "bash", *lines]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert not done.stderr
    return {line.partition(":")[0]: line.partition(":")[2].split() for line in done.stdout.splitlines()}


@pytest.mark.slow
def test_bash_completes_commands_methods_and_files(tmp_path: Path) -> None:
    lines = ["kvcli comp", "kvcli compress --method kvm", "kvcli compress -m snapkv+ad", "kvcli completion z"]
    lines += ["kvcli eval -m h2o,snapkv+ad", "kvcli calibrate --for h", "kvcli prefill --collect norms,m"]
    found = completed(tmp_path, *lines, "kvcli inspect x")
    assert found["kvcli comp"] == [name for name in COMMANDS if name.startswith("comp")]
    assert found["kvcli compress --method kvm"] == [name for name in METHODS if name.startswith("kvm")] != []
    assert found["kvcli compress -m snapkv+ad"] == ["snapkv+adakv"]
    assert found["kvcli eval -m h2o,snapkv+ad"] == ["h2o,snapkv+adakv"]
    assert found["kvcli calibrate --for h"] == ["hack"]
    assert found["kvcli prefill --collect norms,m"] == ["norms,moments"]
    assert found["kvcli completion z"] == ["zsh"]
    assert "compopt -o default" in found  # names of files are left to the shell


def test_an_old_bash_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", "bash"]) == 0
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash here")
    # The version cannot be set, so the number asked for is moved out of reach.
    script = capsys.readouterr().out.replace(">= 404", ">= 99900") + "\ncomplete -p kvcli 2>/dev/null; echo $?"
    done = subprocess.run([bash, "--norc", "-c", script], capture_output=True, text=True, check=True)
    assert (done.stdout.strip(), done.stderr) == ("1", "")
