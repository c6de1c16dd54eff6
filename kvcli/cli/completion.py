"""kvcli completion: the script that makes a shell complete commands, options and methods; imports no torch."""

import os
from pathlib import Path

import click
from click.shell_completion import get_completion_class

from ..errors import UsageError

SHELLS = ("bash", "zsh", "fish")


@click.command("completion", short_help="Print a script that completes kvcli in your shell.")
@click.argument("shell", required=False, type=click.Choice(SHELLS))
def command(shell: str | None) -> None:
    """Print the script that completes commands, options and methods; without SHELL for the one in $SHELL.

    \b
    Examples, each for the start-up file of its shell (bash 4.4 or newer):
      source <(kvcli completion bash)            in ~/.bashrc
      source <(kvcli completion zsh)             in ~/.zshrc, after compinit
      kvcli completion fish | source             in ~/.config/fish/config.fish
    """
    click.echo(_script(shell or _own()))


def _own() -> str:
    name = Path(os.environ.get("SHELL", "")).name
    if name not in SHELLS:
        why = f"SHELL is {name}" if name else "SHELL is not set"
        raise UsageError("which shell? it cannot be told", why, f"write one of {', '.join(SHELLS)}")
    return name


def _script(shell: str) -> str:
    root = click.get_current_context().find_root().command
    found = get_completion_class(shell)
    if found is None:
        raise ValueError(f"click has no completion for {shell}")
    ours = found(root, {}, "kvcli", "_KVCLI_COMPLETE")
    # Not source(): it asks the bash of this machine for its version, and warns at every start of a shell.
    text = ours.source_template % ours.source_vars()
    # An old bash lacks an option of `complete`; it goes without completion rather than complain at every start.
    return f"if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 404)); then\n{text}\nfi" if shell == "bash" else text
