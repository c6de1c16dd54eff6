"""kvcli: gzip for KV caches. Importing it loads nothing heavy; what is used is loaded then."""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .api import ATTENTION, Model, Snapshot, compress, from_cache, load, open, prefill

__all__ = ["ATTENTION", "Model", "Snapshot", "compress", "from_cache", "load", "open", "prefill"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import api

    return getattr(api, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
