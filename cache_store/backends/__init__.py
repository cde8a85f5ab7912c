"""The file formats of segments, one per module ``<name>_shards``."""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING

from cache_store.contract import CacheSchemaError

if TYPE_CHECKING:
    from cache_store.contract import Backend

_SUFFIX = "_shards"


def backend_names() -> list[str]:
    """Return the names of the backends, without importing any."""
    return sorted(module.name.removesuffix(_SUFFIX) for module in pkgutil.iter_modules(__path__))


def load_backend(name: str) -> Backend:
    """Import a backend.

    Raises:
        CacheSchemaError: No such backend.
    """
    if name not in backend_names():
        raise CacheSchemaError(f"cache backend {name!r} is not one of {', '.join(backend_names())}; set cache_backend")
    backend: Backend = importlib.import_module(f"{__name__}.{name}{_SUFFIX}").PLUGIN
    return backend
