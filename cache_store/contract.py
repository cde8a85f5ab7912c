"""The words of the store: fields, records, errors, and what a backend does.

A **record** is what one encode unit yields for one key: one array per field. A **segment** is an immutable directory of
records that one writer wrote and renamed into place whole. A **sample** names one record per unit. A **snapshot** is a
sealed list of samples.
"""

from __future__ import annotations

from dataclasses import dataclass


class CacheError(Exception):
    """Base of the store's errors; the message names the path and the cure."""


class CacheNotFound(CacheError, FileNotFoundError):
    """No cache, or none that is sealed, at this path."""


class CacheCorrupt(CacheError, ValueError):
    """Bytes on disk are not the bytes that were committed."""


class CacheSchemaError(CacheError, ValueError):
    """The cache has another backend or a newer schema than this version knows."""


class RecordRefused(CacheError, ValueError):
    """A record that must not be stored: NaN, Inf, or not what its field says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldSpec:
    """One named tensor of a record.

    Attributes:
        name: Unique among the fields of all units of a family.
        dtype: ``bfloat16``, ``float32``, ``float16``, ``int64``, ``int32`` or ``uint8``. bfloat16 is handed over and
            returned as uint16 bit patterns.
        dims: Names of the dimensions, for readers of the files: ``("channel", "height", "width")``.
        ragged: The first dimension differs from record to record; such a field is stored unpadded, with two dimensions.
    """

    name: str
    dtype: str
    dims: tuple[str, ...]
    ragged: bool = False
