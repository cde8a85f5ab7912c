"""The journal: one line per committed segment, or per retraction. A segment without a line does not exist."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import numpy as np
from awscrt.checksums import crc32c

from cache_store.contract import ArrayLayout, CacheSchemaError, FieldSpec, Placement, SegmentArray
from cache_store.durable import file_sizes, fsync_folder, read_files
from cache_store.manifest import JOURNAL, SCHEMA, SEGMENTS
from cache_store.object_path import ObjectPath

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from cache_store.object_path import Root

KEY_DIGITS = 32
_SESSION_TIME = "%Y%m%dT%H%M%S%f"
PLACEMENT_COLUMNS = Placement._fields


@dataclass(frozen=True, slots=True)
class UnitRecords:
    """The records of one unit in a segment.

    Attributes:
        keys: One key per record.
        placements: By field: where each record's item lies, int64 ``[records, 4]``, columns as in ``Placement``.
    """

    keys: list[str]
    placements: dict[str, NDArray[np.int64]]


@dataclass(frozen=True, slots=True)
class Commit:
    """A segment as its journal line describes it.

    Attributes:
        segment: Its id.
        backend: The file format.
        arrays: Its arrays; placements name them by position.
        files: ``(bytes, crc32c)`` of each of its files, by relative path.
        units: Its records.
    """

    segment: str
    backend: str
    arrays: list[SegmentArray]
    files: dict[str, tuple[int, int]]
    units: dict[str, UnitRecords]

    def without(self, lost_files: Collection[str], retracted: Mapping[str, Collection[str]]) -> Commit:
        """Return it without the records that lie in certain files, or whose keys were retracted, by unit."""
        if not lost_files and not retracted:
            return self
        lost_arrays = [number for number, array in enumerate(self.arrays) if array.layout.file in lost_files]
        units = {}
        for unit, records in self.units.items():
            gone = retracted.get(unit, ())
            is_kept = np.array([key not in gone for key in records.keys], bool)
            for placements in records.placements.values():
                is_kept &= ~np.isin(placements[:, 0], lost_arrays)
            if is_kept.any():
                keys = [key for key, kept in zip(records.keys, is_kept, strict=True) if kept]
                units[unit] = UnitRecords(keys, {name: rows[is_kept] for name, rows in records.placements.items()})
        return Commit(self.segment, self.backend, self.arrays, self.files, units)

    def live_files(self) -> set[str]:
        """Return the files that hold its records."""
        placements = [rows[:, 0] for records in self.units.values() for rows in records.placements.values()]
        return {self.arrays[number].layout.file for number in np.unique(np.concatenate(placements)).tolist()}


@dataclass(frozen=True, slots=True)
class JournalContents:
    """What all journals say.

    Attributes:
        commits: In order of session and sequence, retracted or not.
        retracted: By segment and unit, keys of records that count no more; of a segment that is gone, None.
        damage: One line for each journal or line that is not what was written.
    """

    commits: list[Commit] = field(default_factory=list)
    retracted: dict[str, dict[str, set[str]] | None] = field(default_factory=dict)
    damage: list[str] = field(default_factory=list)

    def live_commits(self) -> list[Commit]:
        """Return the commits with the records that were not retracted; without those that have none left."""
        live = []
        for commit in self.commits:
            retracted = self.retracted.get(commit.segment, {})
            if retracted is not None and (rest := commit.without((), retracted)).units:
                live.append(rest)
        return live


class Journal:
    """The journal file of one session, which is its only author; in an object store each entry is a file."""

    _fd = -1

    def __init__(self, root: Root, session: str) -> None:
        self._session = session
        self._folder = root / JOURNAL
        self._num_entries = 0
        if isinstance(self._folder, ObjectPath):
            return
        path = self._folder / f"{session}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND, 0o666)
        fsync_folder(path.parent)

    def append(self, entry: Mapping[str, Any]) -> None:
        """Commit an entry: one write, then on disk.

        Raises:
            OSError: It may be there in part; nothing more may be appended to this file.
        """
        if isinstance(self._folder, ObjectPath):
            name = f"{self._session}-{self._num_entries:06d}"
            line = encode_line({"schema": SCHEMA, "session": name, **entry})
            (self._folder / f"{name}.jsonl").put(line, create=True)
            self._num_entries += 1
            return
        line = encode_line({"schema": SCHEMA, "session": self._session, **entry})
        if os.write(self._fd, line) != len(line):
            raise OSError(f"journal line of {len(line)} bytes was cut short")
        os.fdatasync(self._fd)

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)


def new_session(root: Root) -> str:
    """Return a name for a session that sorts behind all segments, though a writer's clock was ahead of this one."""
    begin = datetime.now(UTC)
    newest = max((path.name for path in (root / SEGMENTS).glob("[0-9]*T[0-9]*-*")), default="")
    with contextlib.suppress(ValueError, OverflowError):  # none, or not a segment
        begun = datetime.strptime(newest.partition("-")[0], _SESSION_TIME).replace(tzinfo=UTC)
        begin = max(begin, begun + timedelta(microseconds=1))
    return f"{begin.strftime(_SESSION_TIME)}-{os.getpid()}-{secrets.token_hex(3)}"


def encode_line(entry: Mapping[str, Any]) -> bytes:
    """Return an entry as a line that proves itself: the crc32c of its JSON, then the JSON."""
    payload = json.dumps(entry, separators=(",", ":")).encode()
    return b"%08x %b\n" % (crc32c(payload), payload)


def decode_line(line: bytes) -> dict[str, Any] | None:
    """Return the entry of a line, with or without its newline; None if it is not as it was written."""
    payload = line.removesuffix(b"\n")[9:]
    if line[:9] != b"%08x " % crc32c(payload):
        return None
    entry: dict[str, Any] = json.loads(payload)
    return entry


def retract(root: Root, segments: Mapping[str, Mapping[str, Collection[str]] | None]) -> None:
    """Declare that records count no more, or whole segments; see ``JournalContents.retracted``."""
    values = {
        segment: None if units is None else {unit: "".join(sorted(keys)) for unit, keys in units.items()}
        for segment, units in segments.items()
    }
    journal = Journal(root, new_session(root))
    try:
        journal.append({"retracted": values})
    finally:
        journal.close()


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


def read_commits(root: Root) -> list[Commit]:
    """Return the commits of all writers, in order of session and sequence.

    A line that fails its checksum was torn by a crash, and a file that is missing or of another size lost bytes: the
    records there are left out, so that they are encoded again.

    Raises:
        CacheSchemaError: A newer version wrote a line.
    """
    commits = []
    live = read_journal(root).live_commits()
    sizes = file_sizes(root / SEGMENTS)
    for commit in live:
        rest = commit.without(_lost_files(commit, sizes), {})
        if rest.units:
            commits.append(rest)
    return commits


def read_journal(root: Root) -> JournalContents:
    """Read the journals of all sessions.

    Raises:
        CacheSchemaError: A newer version wrote a line.
    """
    contents = JournalContents()
    for file_name, data in read_files(root / JOURNAL, "*.jsonl"):
        name, session = f"{JOURNAL}/{file_name}", file_name.removesuffix(".jsonl")
        lines = data.splitlines(keepends=True)
        if not lines:
            contents.damage.append(f"{name} is empty: it lost its lines, or its writer was killed")
        for number, line in enumerate(lines, 1):
            entry = decode_line(line)
            if entry is None or not line.endswith(b"\n"):
                contents.damage.append(f"{name} line {number} is damaged, or its writer was killed")
            elif entry.get("session") != session:
                contents.damage.append(f"{name} line {number} is of session {entry.get('session')!r}")
            if entry is not None:
                _add_entry(contents, root / JOURNAL / file_name, entry)
    # not in order of files: a renamed one must not change which of two records counts
    contents.commits.sort(key=lambda commit: commit.segment)
    return contents


def read_statistics(root: Root, segments: Collection[str]) -> dict[str, dict[str, tuple[float, float]]]:
    """Return, by field and statistic (min, max, mean, std), the range of its values over the records of segments."""
    ranges: dict[str, dict[str, tuple[float, float]]] = {}
    for _, records in unit_entries(root, segments):
        for name, columns in records["fields"].items():
            known = ranges.setdefault(name, {})
            for statistic, values in columns.items():
                if statistic not in PLACEMENT_COLUMNS:
                    low, high = known.get(statistic, (math.inf, -math.inf))
                    known[statistic] = min(low, *values), max(high, *values)
    return ranges


def read_notes(root: Root) -> dict[tuple[str, str], str]:
    """Return the notes on records, by unit and key; see ``Writer.add``. A note is lost with its journal line."""
    return {(unit, key): note for unit, records in unit_entries(root) for key, note in records.get("notes", {}).items()}


def unit_entries(root: Root, segments: Collection[str] | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what the whole journal lines say of each unit of certain segments, or of all; of no segment twice."""
    seen = set()
    for _, data in read_files(root / JOURNAL, "*.jsonl"):
        for line in data.splitlines():
            entry = decode_line(line)
            segment = None if entry is None else entry.get("segment")
            if entry is None or segment is None or segment in seen:
                continue
            seen.add(segment)
            if segments is None or segment in segments:
                yield from entry["units"].items()


def _add_entry(contents: JournalContents, path: Root, entry: Mapping[str, Any]) -> None:
    if entry["schema"] > SCHEMA:
        raise CacheSchemaError(f"{path}: schema {entry['schema']!r} is newer than {SCHEMA}; upgrade diffsynth-pipe")
    if "segment" in entry:
        contents.commits.append(_decode_commit(entry))
    for segment, units in entry.get("retracted", {}).items():
        known = contents.retracted.setdefault(segment, {})
        if units is None or known is None:
            contents.retracted[segment] = None
        else:
            for unit, digits in units.items():
                known.setdefault(unit, set()).update(_split_keys(digits))


def _split_keys(digits: str) -> list[str]:
    return [digits[i : i + KEY_DIGITS] for i in range(0, len(digits), KEY_DIGITS)]


def _decode_commit(entry: Mapping[str, Any]) -> Commit:
    units = {}
    for unit, records in entry["units"].items():
        keys = _split_keys(records["keys"])
        placements = {
            name: np.array([columns[column] for column in PLACEMENT_COLUMNS], np.int64).T
            for name, columns in records["fields"].items()
        }
        units[unit] = UnitRecords(keys, placements)
    files = {name: (num_bytes, crc) for name, (num_bytes, crc) in entry["files"].items()}
    arrays = [decode_array(array) for array in entry["arrays"]]
    return Commit(entry["segment"], entry["backend"], arrays, files, units)


def _lost_files(commit: Commit, sizes: Mapping[str, int]) -> set[str]:
    """Return the files that hold records and are missing or not of the committed size."""
    names = {array.layout.file for array in commit.arrays}
    return {name for name in names if sizes.get(f"{commit.segment}/{name}") != commit.files[name][0]}


class RecordIndex:
    """Where every committed record lies; of records with the same key the last counts.

    Attributes:
        segments: Segment ids.
        arrays: ``(segment number, array, bytes of its file)`` of every array of every segment.
        rows: By unit and key: the record's row in ``keys`` and ``placements``.
        keys: By unit: the raw keys, uint8 ``[records, 16]``.
        placements: By unit and field: int64 ``[records, 4]``, columns as in ``Placement`` with the number in
            ``arrays``; -1 where a record lacks the field.
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
    return part.placements[field] + np.array([first_array, 0, 0, 0], np.int64)
