"""Segments as tar archives: each holds the records of one unit whose items have the same shapes.

A record is two members, ``<key>.safetensors`` and ``<key>.json``, so ``webdataset`` reads an archive as it stands. In
the safetensors data each item is followed by its crc32c, a tensor of its own, which makes it the one chunk that the
reader expects. A placement holds the item's byte offset: reading it needs none of the headers.
"""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Any

import numpy as np
from awscrt.checksums import crc32c

from cache_store.contract import (
    CHECKSUM_BYTES,
    ArrayLayout,
    Backend,
    Placement,
    SegmentArray,
    SegmentFiles,
    SegmentWriter,
    shape_name,
)
from cache_store.durable import NewFile, fsync_folder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from cache_store.contract import FieldSpec

_SAFETENSORS_DTYPES = {
    "bfloat16": "BF16",
    "float32": "F32",
    "float16": "F16",
    "int64": "I64",
    "int32": "I32",
    "uint8": "U8",
}
_HEADER_ALIGNMENT = 8
_TAR_END = bytes(2 * tarfile.BLOCKSIZE)


def layouts_of(unit: str, specs: Sequence[FieldSpec], shapes: Sequence[tuple[int, ...]]) -> list[ArrayLayout]:
    """Return where records with items of these shapes are stored: ``latents-16x1x64x48.tar``."""
    item_shapes = [spec.item_shape(shape) for spec, shape in zip(specs, shapes, strict=True)]
    file = f"{'-'.join((unit, *map(shape_name, item_shapes)))}.tar"
    return [
        ArrayLayout(spec=spec, item_shape=item_shape, chunk_rows=None, file=file)
        for spec, item_shape in zip(specs, item_shapes, strict=True)
    ]


def safetensors_header(specs: Sequence[FieldSpec], items: Sequence[NDArray[Any]]) -> bytes:
    """Return what stands before the data of a record: for each field the item, then its crc32c, without gaps."""
    tensors: dict[str, Any] = {}
    end = 0
    for spec, item in zip(specs, items, strict=True):
        for name, dtype, shape, num_bytes in (
            (spec.name, _SAFETENSORS_DTYPES[spec.dtype], item.shape, item.nbytes),
            (f"{spec.name}.crc32c", "U32", (), CHECKSUM_BYTES),
        ):
            tensors[name] = {"dtype": dtype, "shape": shape, "data_offsets": (end, end + num_bytes)}
            end += num_bytes
    text = json.dumps(tensors, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _HEADER_ALIGNMENT)
    return len(text).to_bytes(8, "little") + text


class _Archive:
    """One archive in the making; holds an open file and a few numbers, never the records."""

    def __init__(self, first_array: int, layouts: list[ArrayLayout], folder: Path) -> None:
        self.first_array = first_array
        self.layouts = layouts
        self.file = NewFile(folder / layouts[0].file)
        self.num_records = 0

    def append(self, unit: str, key: str, items: Sequence[NDArray[Any]]) -> list[Placement]:
        """Write a record as two members."""
        specs = [layout.spec for layout in self.layouts]
        bodies = [np.ascontiguousarray(item).reshape(-1).view(np.uint8) for item in items]
        checksums = [crc32c(body) for body in bodies]
        header = safetensors_header(specs, items)
        parts: list[bytes | NDArray[np.uint8]] = [header]
        placements = []
        start = self.file.num_bytes + tarfile.BLOCKSIZE + len(header)
        for number, (spec, item, body, checksum) in enumerate(zip(specs, items, bodies, checksums, strict=True)):
            parts += [body, checksum.to_bytes(CHECKSUM_BYTES, "little")]
            num_rows = len(item) if spec.ragged else 1
            placements.append(Placement(self.first_array + number, start, num_rows, checksum))
            start += body.nbytes + CHECKSUM_BYTES
        self._write_member(f"{key}.safetensors", parts)
        fields = {
            spec.name: {"shape": item.shape, "dims": spec.dims, "crc32c": checksum}
            for spec, item, checksum in zip(specs, items, checksums, strict=True)
        }
        description = {"unit": unit, "key": key, "fields": fields}
        self._write_member(f"{key}.json", [json.dumps(description, separators=(",", ":")).encode()])
        self.num_records += 1
        return placements

    def finish(self) -> list[SegmentArray]:
        """End the archive and make it durable."""
        self.file.write(_TAR_END)
        self.file.sync()
        self.file.close()
        return [SegmentArray(layout, self.num_records) for layout in self.layouts]

    def _write_member(self, name: str, parts: Sequence[bytes | NDArray[np.uint8]]) -> None:
        member = tarfile.TarInfo(name)
        member.size = sum(map(len, parts))
        for part in (member.tobuf(tarfile.USTAR_FORMAT), *parts, bytes(-member.size % tarfile.BLOCKSIZE)):
            self.file.write(part)


class TarSegment(SegmentWriter):
    """A folder of archives in the making: streams records into one per (unit, item shapes)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._archives: dict[str, _Archive] = {}
        self._num_arrays = 0

    @property
    def num_bytes(self) -> int:  # noqa: D102
        return sum(archive.file.num_bytes for archive in self._archives.values())

    @property
    def num_open_files(self) -> int:  # noqa: D102
        return len(self._archives)

    def append(  # noqa: D102
        self, unit: str, key: str, fields: Mapping[str, NDArray[Any]], specs: Sequence[FieldSpec]
    ) -> list[Placement]:
        items = [fields[spec.name] for spec in specs]
        layouts = layouts_of(unit, specs, [item.shape for item in items])
        file = layouts[0].file
        if file not in self._archives:
            self._archives[file] = _Archive(self._num_arrays, layouts, self._folder)
            self._num_arrays += len(layouts)
        return self._archives[file].append(unit, key, items)

    def finish(self) -> SegmentFiles:  # noqa: D102
        arrays = [array for archive in self._archives.values() for array in archive.finish()]
        fsync_folder(self._folder)
        return SegmentFiles(
            arrays, {name: (archive.file.num_bytes, archive.file.crc) for name, archive in self._archives.items()}
        )

    def close(self) -> None:  # noqa: D102
        for archive in self._archives.values():
            archive.file.close()


class WebDatasetBackend(Backend):
    """Tar archives of safetensors and JSON members."""

    name = "webdataset"

    def open_segment(self, folder: Path) -> TarSegment:  # noqa: D102
        return TarSegment(folder)

    def offset(self, layout: ArrayLayout, start: int) -> int:  # noqa: ARG002, D102
        return start

    def is_intact(self, fd: int, array: SegmentArray) -> bool:  # noqa: ARG002, D102
        return True


PLUGIN = WebDatasetBackend()
