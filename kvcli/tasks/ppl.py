"""Perplexity: how expected the document's own end is, which is held out before the document is read."""

from ..errors import UsageError
from .task import Case, Setting

VERSION = 1


def cases(words: str, setting: Setting) -> list[Case]:
    """Each document given, without its last quarter, 512 tokens at most."""
    if words:
        raise UsageError(f"--task 'ppl:{words}'", "ppl has no options")
    if not setting.texts:
        raise UsageError("--task ppl needs a document", fix="name one: kvcli eval report.txt --task ppl")
    return [Case("ppl", name, text, hold_out=True) for name, text in setting.texts[: setting.limit]]
