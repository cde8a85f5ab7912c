"""The journal: one line per committed segment. A segment without a line does not exist."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import google_crc32c
import numpy as np

from cache_store.contract import ArrayLayout, CacheSchemaError, FieldSpec, SegmentArray
from cache_store.durable import fsync_folder
from cache_store.manifest import JOURNAL, SCHEMA, SEGMENTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

KEY_DIGITS = 32
PLACEMENT_COLUMNS = ("array", "start", "num_rows")


@dataclass(frozen=True, slots=True)
class UnitRecords:
    """The records of one unit in a segment.

    Attributes:
        keys: One key per record.
        placements: By field: where each record's item lies, int64 ``[records, 3]`` (array, start, rows).
    """

    keys: list[str]
    placements: dict[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Commit:
    """One journal line."""

    segment: str
    arrays: list[SegmentArray]
    files: dict[str, tuple[int, int]]
    units: dict[str, UnitRecords]


class Journal:
    """The journal file of one writer session, which is its only author."""

    def __init__(self, root: Path, session: str) -> None:
        path = root / JOURNAL / f"{session}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        fsync_folder(path.parent)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Commit an entry: one write, then on disk.

        Raises:
            OSError: It may be there in part; nothing more may be appended to this file.
        """
        payload = json.dumps(entry, separators=(",", ":")).encode()
        line = b"%08x %b\n" % (google_crc32c.value(payload), payload)
        if os.write(self._fd, line) != len(line):
            raise OSError(f"journal line of {len(line)} bytes was cut short")
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def encode_array(array: SegmentArray) -> dict[str, Any]:
    """Return an array's description as JSON values."""
    layout = array.layout
    return {
        "field": layout.spec.name,
        "dtype": layout.spec.dtype,
        "dims": layout.spec.dims,
        "ragged": layout.spec.ragged,
        "item_shape": layout.item_shape,
        "chunk_rows": layout.chunk_rows,
        "file": layout.file,
        "num_chunks": array.num_chunks,
    }


def decode_array(value: Mapping[str, Any]) -> SegmentArray:
    """Return what ``encode_array`` was given."""
    spec = FieldSpec(name=value["field"], dtype=value["dtype"], dims=tuple(value["dims"]), ragged=value["ragged"])
    layout = ArrayLayout(
        spec=spec, item_shape=tuple(value["item_shape"]), chunk_rows=value["chunk_rows"], file=value["file"]
    )
    return SegmentArray(layout, value["num_chunks"])


def read_commits(root: Path) -> list[Commit]:
    """Return the commits of all writers, in order of session and sequence.

    A line that fails its checksum was torn by a crash, and a segment with a missing file or one of another size lost
    bytes: both are left out, so that their records are encoded again.

    Raises:
        CacheSchemaError: A newer version wrote a line.
    """
    commits = []
    for path in sorted((root / JOURNAL).glob("*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            payload = line[9:]
            if line[:9] != b"%08x " % google_crc32c.value(payload):
                continue
            entry = json.loads(payload)
            if entry["schema"] > SCHEMA:
                raise CacheSchemaError(
                    f"{path}: schema {entry['schema']!r} is newer than {SCHEMA}; upgrade diffsynth-pipe"
                )
            commit = _decode_commit(entry)
            if _is_whole(root / SEGMENTS / commit.segment, commit.files):
                commits.append(commit)
    return commits


def _decode_commit(entry: Mapping[str, Any]) -> Commit:
    units = {}
    for unit, records in entry["units"].items():
        digits = records["keys"]
        keys = [digits[i : i + KEY_DIGITS] for i in range(0, len(digits), KEY_DIGITS)]
        placements = {
            name: np.array([columns[column] for column in PLACEMENT_COLUMNS], np.int64).T
            for name, columns in records["fields"].items()
        }
        units[unit] = UnitRecords(keys, placements)
    files = {name: (num_bytes, crc) for name, (num_bytes, crc) in entry["files"].items()}
    return Commit(entry["segment"], [decode_array(array) for array in entry["arrays"]], files, units)


def _is_whole(folder: Path, files: Mapping[str, tuple[int, int]]) -> bool:
    try:
        return all((folder / name).stat().st_size == num_bytes for name, (num_bytes, _) in files.items())
    except (FileNotFoundError, NotADirectoryError):
        return False


class RecordIndex:
    """Where every committed record lies; of records with the same key the last counts.

    Attributes:
        segments: Segment ids.
        arrays: ``(segment number, array, bytes of its file)`` of every array of every segment.
        rows: By unit and key: the record's row in ``keys`` and ``placements``.
        keys: By unit: the raw keys, uint8 ``[records, 16]``.
        placements: By unit and field: int64 ``[records, 3]`` (number in ``arrays``, start, rows); array -1 where a
            record lacks the field.
    """

    def __init__(self, commits: Sequence[Commit]) -> None:
        self.segments = [commit.segment for commit in commits]
        self.arrays: list[tuple[int, SegmentArray, int]] = []
        self.rows: dict[str, dict[str, int]] = {}
        self.keys: dict[str, NDArray[np.uint8]] = {}
        self.placements: dict[str, dict[str, NDArray[np.int64]]] = {}
        first_arrays = []
        for number, commit in enumerate(commits):
            first_arrays.append(len(self.arrays))
            self.arrays.extend((number, array, commit.files[array.layout.file][0]) for array in commit.arrays)
        for unit in sorted({unit for commit in commits for unit in commit.units}):
            parts = [
                (first, commit.units[unit])
                for first, commit in zip(first_arrays, commits, strict=True)
                if unit in commit.units
            ]
            rows = self.rows.setdefault(unit, {})
            num_rows = 0
            for _, part in parts:
                rows.update(zip(part.keys, range(num_rows, num_rows + len(part.keys)), strict=True))
                num_rows += len(part.keys)
            digits = "".join("".join(part.keys) for _, part in parts)
            self.keys[unit] = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(num_rows, KEY_DIGITS // 2)
            fields = sorted({field for _, part in parts for field in part.placements})
            self.placements[unit] = {
                field: np.concatenate([_global_placements(part, field, first) for first, part in parts])
                for field in fields
            }


def _global_placements(part: UnitRecords, field: str, first_array: int) -> NDArray[np.int64]:
    if field not in part.placements:
        return np.full((len(part.keys), len(PLACEMENT_COLUMNS)), -1, np.int64)
    return part.placements[field] + np.array([first_array, 0, 0], np.int64)
