"""Segments as zarr v3 groups: each array has one shard, so its shape is exact and its metadata is written once.

The chunks of a shard lie in order and without gaps: chunk i starts at i·(chunk bytes + 4), and the shard's index is a
pure function of how many there are. Reading needs no index; it is there for other zarr readers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from cache_store.contract import (
    CHECKSUM_BYTES,
    ArrayLayout,
    Backend,
    FieldSpec,
    Placement,
    SegmentArray,
    SegmentFiles,
    SegmentWriter,
)
from cache_store.durable import fsync_folder, write_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_CHUNK_BYTES = 2048
_MIN_CHUNK_ROWS = 4
"""Ragged rows are grouped to about 2 KiB, but four at least: an item wastes half a chunk on zeros, and each chunk costs
a checksum call, 20 bytes, and two destinations of the read that fetches it."""

_BYTES_CRC32C = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def layout_of(spec: FieldSpec, shape: tuple[int, ...]) -> ArrayLayout:
    """Return where an item of this shape is stored: ``latents/16x1x64x48/c/0/0/0/0/0``."""
    item_shape = shape[1:] if spec.ragged else shape
    folder = "x".join(map(str, item_shape)) or "scalar"
    file = f"{spec.name}/{folder}/c/0" + "/0" * len(item_shape)
    single = ArrayLayout(spec=spec, item_shape=item_shape, chunk_rows=1, file=file)
    if not spec.ragged:
        return single
    chunk_rows = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // single.row_bytes)
    return ArrayLayout(spec=spec, item_shape=item_shape, chunk_rows=chunk_rows, file=file)


def shard_index(array: SegmentArray) -> bytes:
    """Return the index of a shard as it stands at its end: (offset, bytes) of each chunk, uint64, and a crc32c."""
    stride = array.layout.chunk_bytes + CHECKSUM_BYTES
    index = np.full((array.num_chunks, 2), stride, "<u8")
    index[:, 0] *= np.arange(array.num_chunks, dtype="<u8")
    checksum: int = google_crc32c.value(index)
    return index.tobytes() + checksum.to_bytes(CHECKSUM_BYTES, "little")


def array_metadata(array: SegmentArray) -> dict[str, Any]:
    """Return the ``zarr.json`` of an array."""
    layout = array.layout
    spec = layout.spec
    shape = [array.num_chunks * layout.chunk_rows, *layout.item_shape]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": shape,
        "data_type": np.dtype(spec.storage_dtype).name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": shape}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0,
        "codecs": [
            {
                "name": "sharding_indexed",
                "configuration": {
                    "chunk_shape": [layout.chunk_rows, *layout.item_shape],
                    "codecs": _BYTES_CRC32C,
                    "index_codecs": _BYTES_CRC32C,
                    "index_location": "end",
                },
            }
        ],
        "dimension_names": list(spec.dims) if spec.ragged else ["item", *spec.dims],
        "attributes": {"field": spec.name, "torch_dtype": spec.dtype, "ragged": spec.ragged},
    }


class _Shard:
    """One shard in the making; holds an open file and two numbers, never the chunks."""

    def __init__(self, number: int, layout: ArrayLayout, folder: Path) -> None:
        self.number = number
        self.layout = layout
        self.path = folder / layout.file
        self.path.parent.mkdir(parents=True)
        # unbuffered: an error belongs to the write that met it, and closing writes nothing
        self.file = self.path.open("xb", buffering=0)
        self.num_chunks = 0
        self.num_bytes = 0
        self.crc = 0

    def append(self, item: NDArray[Any]) -> Placement:
        """Write an item as whole chunks, each followed by its checksum."""
        chunk_bytes = self.layout.chunk_bytes
        data = np.ascontiguousarray(item).reshape(-1).view(np.uint8)
        num_rows = data.nbytes // self.layout.row_bytes
        chunks = np.zeros((self.layout.num_chunks(num_rows), chunk_bytes + CHECKSUM_BYTES), np.uint8)
        num_full, rest = divmod(data.nbytes, chunk_bytes)
        chunks[:num_full, :chunk_bytes] = data[: data.nbytes - rest].reshape(num_full, chunk_bytes)
        if rest:
            chunks[num_full, :rest] = data[data.nbytes - rest :]
        checksums = [google_crc32c.value(chunk[:chunk_bytes]) for chunk in chunks]
        chunks[:, chunk_bytes:] = np.array(checksums, "<u4").view(np.uint8).reshape(-1, CHECKSUM_BYTES)
        start = self.num_chunks
        self._write(chunks.reshape(-1))
        self.num_chunks += len(chunks)
        return Placement(self.number, start, num_rows)

    def finish(self) -> SegmentArray:
        """Append the index and make the file durable."""
        array = SegmentArray(self.layout, self.num_chunks)
        self._write(np.frombuffer(shard_index(array), np.uint8))
        os.fsync(self.file.fileno())
        self.file.close()
        return array

    def _write(self, data: NDArray[np.uint8]) -> None:
        rest = data.data
        while rest:
            rest = rest[os.write(self.file.fileno(), rest) :]
        self.crc = google_crc32c.extend(self.crc, data)
        self.num_bytes += data.nbytes


class ZarrSegment(SegmentWriter):
    """A zarr group in the making: streams chunks into one shard per (field, item shape)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[tuple[str, tuple[int, ...]], _Shard] = {}

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return sum(shard.num_bytes for shard in self._shards.values())

    @property
    def num_open_files(self) -> int:  # noqa: D102
        return len(self._shards)

    def append(  # noqa: D102
        self,
        unit: str,  # noqa: ARG002
        key: str,  # noqa: ARG002
        fields: Mapping[str, NDArray[Any]],
        specs: Sequence[FieldSpec],
    ) -> list[Placement]:
        return [self._shard(spec, fields[spec.name].shape).append(fields[spec.name]) for spec in specs]

    def finish(self) -> SegmentFiles:  # noqa: D102
        arrays = [shard.finish() for shard in self._shards.values()]
        files = {shard.layout.file: (shard.num_bytes, shard.crc) for shard in self._shards.values()}
        metadata = {"": {"zarr_format": 3, "node_type": "group", "attributes": {}}}
        for array in arrays:
            folder = array.layout.file.partition("/c/")[0]
            metadata[array.layout.spec.name] = metadata[""]
            metadata[folder] = array_metadata(array)
        for folder, value in metadata.items():
            path = self._folder / folder / "zarr.json"
            data = json.dumps(value, separators=(",", ":")).encode()
            write_file(path, data)
            files[path.relative_to(self._folder).as_posix()] = (len(data), google_crc32c.value(data))
        for parent, _, _ in os.walk(self._folder, topdown=False):
            fsync_folder(Path(parent))
        return SegmentFiles(arrays, files)

    def close(self) -> None:  # noqa: D102
        for shard in self._shards.values():
            shard.file.close()

    def _shard(self, spec: FieldSpec, shape: tuple[int, ...]) -> _Shard:
        layout_key = (spec.name, shape[1:] if spec.ragged else shape)
        if layout_key not in self._shards:
            self._shards[layout_key] = _Shard(len(self._shards), layout_of(spec, shape), self._folder)
        return self._shards[layout_key]


class ZarrBackend(Backend):
    """Sharded zarr v3 arrays."""

    name = "zarr"

    def open_segment(self, folder: Path) -> ZarrSegment:  # noqa: D102
        return ZarrSegment(folder)

    def offset(self, layout: ArrayLayout, start: int) -> int:  # noqa: D102
        return start * (layout.chunk_bytes + CHECKSUM_BYTES)

    def is_intact(self, fd: int, array: SegmentArray) -> bool:  # noqa: D102
        index = shard_index(array)
        return os.pread(fd, len(index), self.offset(array.layout, array.num_chunks)) == index


PLUGIN = ZarrBackend()
