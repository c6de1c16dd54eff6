"""The model a snapshot was made with: found, loaded, and checked to be the same."""

from collections.abc import Callable

from ..snapshot import Snapshot
from .identity import check
from .load import Model, Tick
from .observe import probe
from .resume import model_for


def own_model(
    snapshot: Snapshot,
    name: str | None,
    *,
    device: str = "auto",
    dtype: str | None = None,
    trust: bool = False,
    warn: Callable[[str], None],
    tick: Tick = lambda text: None,
) -> Model:
    """The model `name`, else the one the snapshot names, in the snapshot's precision unless told otherwise.

    Raises MismatchError where it is not the model the snapshot was made with; see `identity.check`.
    """
    model = model_for(snapshot.meta, name, device=device, dtype=dtype, tick=tick)
    check_model(snapshot, model, trust=trust, warn=warn)
    return model


def check_model(snapshot: Snapshot, model: Model, *, trust: bool = False, warn: Callable[[str], None]) -> None:
    """Raise MismatchError unless this is the model the snapshot was made with."""
    found = [snapshot.extra[name] for name in ("stat.probe_k", "stat.probe_v") if name in snapshot.extra]
    saved = (found[0], found[1]) if len(found) == 2 else None
    few = snapshot.ids[: found[0].shape[2]] if saved else snapshot.ids[:0]
    check(snapshot.meta, model, lambda: probe(model, few), saved, trust=trust, warn=warn)
