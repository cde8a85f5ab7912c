"""Segments as zarr v3 groups: each array has one shard, so its shape is exact and its metadata is written once.

The chunks of a shard lie in order and without gaps: chunk i starts at i·(chunk bytes + 4), and the shard's index is a
pure function of how many there are. Reading needs no index; it is there for other zarr readers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from awscrt.checksums import crc32c

from cache_store.contract import (
    CHECKSUM_BYTES,
    ArrayLayout,
    Backend,
    FieldSpec,
    Placement,
    SegmentArray,
    SegmentFiles,
    SegmentWriter,
    shape_name,
)
from cache_store.durable import NewFile, fsync_folder, write_file

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

_CHUNK_BYTES = 1024
_MIN_CHUNK_ROWS = 4
"""Ragged rows are grouped to about 1 KiB, but four at least: an item wastes half a chunk on zeros, and each chunk costs
a checksum call, 20 bytes, and two destinations of the read that fetches it."""

_BYTES_CRC32C = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]


def layout_of(spec: FieldSpec, shape: tuple[int, ...]) -> ArrayLayout:
    """Return where an item of this shape is stored: ``latents/16x1x64x48/c/0/0/0/0/0``."""
    item_shape = spec.item_shape(shape)
    file = f"{spec.name}/{shape_name(item_shape)}/c/0" + "/0" * len(item_shape)
    single = ArrayLayout(spec=spec, item_shape=item_shape, chunk_rows=1, file=file)
    if not spec.ragged:
        return single
    chunk_rows = max(_MIN_CHUNK_ROWS, _CHUNK_BYTES // single.row_bytes)
    return ArrayLayout(spec=spec, item_shape=item_shape, chunk_rows=chunk_rows, file=file)


def _chunk_bytes(layout: ArrayLayout) -> int:
    """Return the bytes of a chunk, the same for any item."""
    return layout.chunk_bytes(num_rows=1)


def shard_index(array: SegmentArray) -> bytes:
    """Return the index of a shard as it stands at its end: (offset, bytes) of each chunk, uint64, and a crc32c."""
    stride = _chunk_bytes(array.layout) + CHECKSUM_BYTES
    index = np.full((array.num_chunks, 2), stride, "<u8")
    index[:, 0] *= np.arange(array.num_chunks, dtype="<u8")
    checksum: int = crc32c(index)
    return index.tobytes() + checksum.to_bytes(CHECKSUM_BYTES, "little")


def array_metadata(array: SegmentArray) -> dict[str, Any]:
    """Return the ``zarr.json`` of an array."""
    layout = array.layout
    spec = layout.spec
    assert layout.chunk_rows is not None
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


def segment_metadata(arrays: Sequence[SegmentArray]) -> dict[str, bytes]:
    """Return the ``zarr.json`` files of a segment: of its arrays, and of the groups above them."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": {}}
    nodes = {"zarr.json": group}
    for array in arrays:
        nodes[f"{array.layout.spec.name}/zarr.json"] = group
        nodes[array.layout.file.partition("/c/")[0] + "/zarr.json"] = array_metadata(array)
    return {name: json.dumps(node, separators=(",", ":")).encode() for name, node in nodes.items()}


class _Shard:
    """One shard in the making; holds an open file and two numbers, never the chunks."""

    def __init__(self, number: int, layout: ArrayLayout, folder: Path) -> None:
        self.number = number
        self.layout = layout
        path = folder / layout.file
        path.parent.mkdir(parents=True)
        self.file = NewFile(path)
        self.num_chunks = 0

    def append(self, item: NDArray[Any]) -> Placement:
        """Write an item as whole chunks, each followed by its checksum."""
        chunk_bytes = _chunk_bytes(self.layout)
        data = np.ascontiguousarray(item).reshape(-1).view(np.uint8)
        num_rows = data.nbytes // self.layout.row_bytes
        chunks = np.zeros((self.layout.num_chunks(num_rows), chunk_bytes + CHECKSUM_BYTES), np.uint8)
        num_full, rest = divmod(data.nbytes, chunk_bytes)
        chunks[:num_full, :chunk_bytes] = data[: data.nbytes - rest].reshape(num_full, chunk_bytes)
        if rest:
            chunks[num_full, :rest] = data[data.nbytes - rest :]
        checksums = np.array([crc32c(chunk[:chunk_bytes]) for chunk in chunks], "<u4")
        chunks[:, chunk_bytes:] = checksums.view(np.uint8).reshape(-1, CHECKSUM_BYTES)
        start = self.num_chunks
        self.file.write(chunks.reshape(-1))
        self.num_chunks += len(chunks)
        return Placement(self.number, start, num_rows, crc32c(data))

    def finish(self) -> SegmentArray:
        """Append the index and make the file durable."""
        array = SegmentArray(self.layout, self.num_chunks)
        self.file.write(shard_index(array))
        self.file.sync()
        self.file.close()
        return array


class ZarrSegment(SegmentWriter):
    """A zarr group in the making: streams chunks into one shard per (field, item shape)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: dict[tuple[str, tuple[int, ...]], _Shard] = {}

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return sum(shard.file.num_bytes for shard in self._shards.values())

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
        files = {shard.layout.file: (shard.file.num_bytes, shard.file.crc) for shard in self._shards.values()}
        for name, data in segment_metadata(arrays).items():
            write_file(self._folder / name, data)
            files[name] = (len(data), crc32c(data))
        for parent, _, _ in os.walk(self._folder, topdown=False):
            fsync_folder(Path(parent))
        return SegmentFiles(arrays, files)

    def close(self) -> None:  # noqa: D102
        for shard in self._shards.values():
            shard.file.close()

    def _shard(self, spec: FieldSpec, shape: tuple[int, ...]) -> _Shard:
        layout_key = (spec.name, spec.item_shape(shape))
        if layout_key not in self._shards:
            self._shards[layout_key] = _Shard(len(self._shards), layout_of(spec, shape), self._folder)
        return self._shards[layout_key]


class ZarrBackend(Backend):
    """Sharded zarr v3 arrays."""

    name = "zarr"

    def open_segment(self, folder: Path) -> ZarrSegment:  # noqa: D102
        return ZarrSegment(folder)

    def metadata(self, arrays: Sequence[SegmentArray]) -> dict[str, bytes]:  # noqa: D102
        return segment_metadata(arrays)

    def offset(self, layout: ArrayLayout, start: int) -> int:  # noqa: D102
        return start * (_chunk_bytes(layout) + CHECKSUM_BYTES)

    def is_intact(self, fd: int, array: SegmentArray) -> bool:  # noqa: D102
        index = shard_index(array)
        return os.pread(fd, len(index), self.offset(array.layout, array.num_chunks)) == index


PLUGIN = ZarrBackend()
