"""The words of the store: fields, records, errors, and what a backend does.

A **record** is what one encode unit yields for one key: one array per field. A **segment** is an immutable directory of
records that one writer wrote and renamed into place whole. A **sample** names one record per unit. A **snapshot** is a
sealed list of samples.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

STORAGE_DTYPES = {
    "bfloat16": "<u2",
    "float32": "<f4",
    "float16": "<f2",
    "int64": "<i8",
    "int32": "<i4",
    "uint8": "|u1",
}
"""The numpy dtype in which values of a field's dtype are handed over, stored and returned."""

CHECKSUM_BYTES = 4
"""Every stored chunk is followed by its crc32c, little-endian."""


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

    @property
    def storage_dtype(self) -> str:
        """The numpy dtype of the stored array."""
        return STORAGE_DTYPES[self.dtype]

    def item_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return an item's shape without a ragged first dimension."""
        return shape[1:] if self.ragged else shape


def shape_name(item_shape: tuple[int, ...]) -> str:
    """Return how paths spell an item shape: ``16x1x64x48``."""
    return "x".join(map(str, item_shape)) or "scalar"


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrayLayout:
    """How the items of one field and one item shape lie in a file of a segment.

    An item is a run of rows, each of shape ``item_shape``: as many as it has if the field is ragged, else one. It is
    one chunk, or its rows are grouped into chunks of the same size, and zeros fill the last.

    Attributes:
        spec: The field.
        item_shape: Shape of one row: of a whole item, or of a ragged item without its first dimension.
        chunk_rows: Rows per chunk; None where each item is one chunk, whatever its rows.
        file: Path of the file in its segment.
    """

    spec: FieldSpec
    item_shape: tuple[int, ...]
    chunk_rows: int | None
    file: str

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return math.prod(self.item_shape) * int(self.spec.storage_dtype[-1])

    def chunk_bytes(self, num_rows: int) -> int:
        """Return the bytes of one chunk, without its checksum, of an item of this many rows."""
        return (num_rows if self.chunk_rows is None else self.chunk_rows) * self.row_bytes

    def num_chunks(self, num_rows: int) -> int:
        """Return how many chunks an item of this many rows takes."""
        return 1 if self.chunk_rows is None else -(-num_rows // self.chunk_rows)


class Placement(NamedTuple):
    """Where one item lies: the array of its segment, where it starts there (backend's unit), its rows, and its digest.

    The digest, a crc32c of the item's bytes, ties it to its record: what is whole but another item is not taken for it.
    """

    array: int
    start: int
    num_rows: int
    digest: int


class SegmentArray(NamedTuple):
    """One array of a finished segment."""

    layout: ArrayLayout
    num_chunks: int


class SegmentFiles(NamedTuple):
    """What a finished segment holds: its arrays, and ``(bytes, crc32c)`` of each of its files by relative path."""

    arrays: list[SegmentArray]
    files: dict[str, tuple[int, int]]


class SegmentWriter(ABC):
    """Writes one segment into a folder that nobody reads before it is finished and renamed.

    The same records in the same order give the same bytes. After an error in ``append`` the segment is unusable.
    """

    @property
    @abstractmethod
    def num_bytes(self) -> int:
        """Bytes written so far."""

    @property
    @abstractmethod
    def num_open_files(self) -> int:
        """Files held open until the segment is finished."""

    @abstractmethod
    def append(
        self, unit: str, key: str, fields: Mapping[str, NDArray[Any]], specs: Sequence[FieldSpec]
    ) -> list[Placement]:
        """Store one record whose fields were checked; return one placement per spec, in their order."""

    @abstractmethod
    def finish(self) -> SegmentFiles:
        """Complete all files and fsync them and their folders."""

    @abstractmethod
    def close(self) -> None:
        """Let go of open files."""


class Backend(ABC):
    """A file format for segments; a module in ``backends/`` named ``<name>_shards`` that ends in ``PLUGIN = ...``.

    The store reads any format in which an item is one run of chunks, each followed by its crc32c.
    """

    name: str

    @abstractmethod
    def open_segment(self, folder: Path) -> SegmentWriter:
        """Start a segment in a folder that is there and empty."""

    def metadata(self, arrays: Sequence[SegmentArray]) -> dict[str, bytes]:  # noqa: ARG002
        """Return the files of a segment that hold no item, by relative path: they follow from its arrays."""
        return {}

    @abstractmethod
    def offset(self, layout: ArrayLayout, start: int) -> int:
        """Return the byte in the file of ``layout`` at which an item's first chunk begins."""

    @abstractmethod
    def is_intact(self, fd: int, array: SegmentArray) -> bool:
        """Tell whether what else the file needs to be read, such as its index, is whole; called once per file."""
