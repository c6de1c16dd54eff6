"""The names of what is recorded of a document beyond the usual, and of the stretches of a text."""

from collections.abc import Iterable
from difflib import get_close_matches

from .errors import UsageError

# What `--collect` names: statistics that prefill records only when asked to.
COLLECT = {
    "norms": ("resid_norm", "attn_in_norm"),
    "moments": ("mass_sq", "q_mean", "q_cov"),
    "kvzip": ("kvzip", "kvzip_rms", "kvzip_plus", "q_repeat", "q_repeat_pos"),
}
# What a stretch of the text can be, by the code in column 2 of `stat.segments` [S, 4]: begin, end, type, group.
SEGMENTS = ("paragraph", "turn", "system", "frame", "scale")


def collected(texts: Iterable[str], names: Iterable[str] = COLLECT) -> tuple[str, ...]:
    """The names in lists with commas, each once; UsageError for one that is not among `names`."""
    found = tuple(dict.fromkeys(name.strip() for text in texts for name in text.split(",")))
    for name in found:
        if name not in (known := [*names]):
            near = get_close_matches(name.lower(), known, n=3)
            why = f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(known)}"
            raise UsageError(f"--collect {name}: no statistics are called so", why)
    return found


def collect_for(stats: Iterable[str]) -> tuple[str, ...]:
    """The names of COLLECT under which some of these statistics are recorded."""
    some = {*stats}
    return tuple(name for name, parts in COLLECT.items() if some & {*parts})
