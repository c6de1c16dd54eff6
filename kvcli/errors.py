"""The errors a user can meet, each with its exit code; knows nothing of the rest.

KvError                 1   failed
  UsageError            2   the command line is wrong
  StorageError          3   cannot read or write
  FormatError           4   not a valid snapshot
  MismatchError         5   wrong model or wrong document
  InfeasibleError       6   cannot be met: missing statistic, budget too small, unsupported layer
  GateError             7   a quality gate failed
"""


class KvError(Exception):
    """Something a user can act on: `what` happened, `why`, and how to `fix` it, a line each."""

    exit_code = 1

    def __init__(self, what: str, why: str = "", fix: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.fix = what, why, fix

    def lines(self) -> list[str]:
        """The message as it is shown, empty lines left out."""
        return [line for line in (self.what, self.why, self.fix) if line]

    def facts(self) -> dict[str, int | str]:
        """The same as JSON has it."""
        return {"code": self.exit_code, "what": self.what, "why": self.why, "fix": self.fix}


class UsageError(KvError):
    """The command line, a recipe or a budget cannot be understood."""

    exit_code = 2


class StorageError(KvError):
    """A file or pipe cannot be read or written."""

    exit_code = 3


class FormatError(KvError):
    """The bytes are not a valid snapshot, or not one this version can read."""

    exit_code = 4


class MismatchError(KvError):
    """The model, tokenizer or document is not the one the snapshot was made with."""

    exit_code = 5


class InfeasibleError(KvError):
    """The request is understood but cannot be met."""

    exit_code = 6


class GateError(KvError):
    """A quality threshold given by the user was not reached."""

    exit_code = 7
