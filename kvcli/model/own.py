"""Whether a model is the one a snapshot was made with, its probe taken where the weights alone cannot tell."""

from collections.abc import Callable

from ..snapshot import Snapshot
from .identity import check
from .load import Model
from .observe import probe


def check_model(snapshot: Snapshot, model: Model, *, trust: bool = False, warn: Callable[[str], None]) -> None:
    """Raise MismatchError unless this is the model the snapshot was made with; see `identity.check`."""
    found = [snapshot.extra[name] for name in ("stat.probe_k", "stat.probe_v") if name in snapshot.extra]
    saved = (found[0], found[1]) if len(found) == 2 else None
    few = snapshot.ids[: found[0].shape[2]] if saved else snapshot.ids[:0]
    check(snapshot.meta, model, lambda: probe(model, few), saved, trust=trust, warn=warn)
