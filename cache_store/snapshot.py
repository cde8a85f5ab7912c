"""Snapshots: sealed, ordered lists of samples, as numpy columns in one file."""

from __future__ import annotations

import json
import os
import secrets
import shutil
import zipfile
from array import array
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from blake3 import blake3

from cache_store.contract import CacheCorrupt, CacheError, CacheNotFound, CacheSchemaError, SegmentArray
from cache_store.durable import file_checksum, file_sizes, publish_new_file, replace_file, scratch_folder
from cache_store.journal import (
    KEY_DIGITS,
    PLACEMENT_COLUMNS,
    Commit,
    UnitRecords,
    decode_array,
    decode_line,
    encode_array,
    encode_line,
)
from cache_store.manifest import SCHEMA, SCRATCH, SEGMENTS, SNAPSHOTS

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from numpy.typing import NDArray

    from cache_store.contract import FieldSpec
    from cache_store.journal import RecordIndex
    from cache_store.object_path import Root

Columns = dict[str, "NDArray[Any]"]

RESERVED_BUCKET = ""
"""Samples of this bucket, the last ones of a snapshot, stand for no row of the data set. Their records are kept as any
others', but no count has them and no batch is made of them; ``Snapshot.reserved`` tells where they are."""

# One table per field and one for the arrays: each column of its own would cost a member of the file, some 250 bytes.
_PLACEMENT = np.dtype([("array", "<i4"), ("start", "<i8"), ("num_rows", "<i4"), ("digest", "<u4")])
_ARRAY = np.dtype([("segment", "<i4"), ("layout", "<i4"), ("num_chunks", "<i8"), ("num_bytes", "<i8")])


@dataclass(frozen=True, slots=True)
class SealedSample:
    """One sample of a snapshot.

    Attributes:
        sample_id: 32 lowercase hex digits.
        bucket: Samples of one bucket can share a batch. ``RESERVED_BUCKET`` is for those that stand for no row.
        source: Where it comes from, for messages; no part of the digest.
        keys: The key of its record in each unit.
    """

    sample_id: str
    bucket: str
    source: str
    keys: Mapping[str, str]


class _SamplesDigest:
    """The digest of an ordered list of samples, fed one by one."""

    def __init__(self) -> None:
        self._hasher = blake3()

    def update(self, sample: SealedSample) -> None:
        line = [sample.sample_id, sample.bucket, *sorted(sample.keys.items())]
        self._hasher.update(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    def hexdigest(self) -> str:
        return self._hasher.hexdigest(length=16)


def samples_digest(samples: Iterable[SealedSample]) -> str:
    """Return the digest that a snapshot of these samples has: 32 hex digits over ids, buckets and keys, in order."""
    digest = _SamplesDigest()
    for sample in samples:
        digest.update(sample)
    return digest.hexdigest()


class Snapshot:
    """A sealed list of samples, and where their records lie. Opening it reads columns, and makes no object per sample.

    Attributes:
        root: The cache.
        backend: Name of the cache's backend.
        number: Counts the snapshots of a cache.
        path: Its file.
        header: The digest of its samples, its parent's number, when it was made, and what the sealer added.
        fields: The fields of all its records.
        field_units: By field, the unit that yields it.
        segments: Ids of the segments it reads from.
        arrays: The arrays it reads from; ``array_segments`` and ``array_bytes`` tell the segment and the file size of
            each.
        buckets: The bucket of each sample, as a position in ``bucket_names``.
    """

    def __init__(self, root: Root, backend: str, number: int, path: Root, columns: Columns) -> None:
        self.root = root
        self.backend = backend
        self.number = number
        self.path = path
        document = json.loads(columns["document"].tobytes())
        self._columns = columns
        self.header: dict[str, Any] = json.loads(columns["header"].tobytes())
        self.bucket_names: list[str] = document["buckets"]
        self.field_units: dict[str, str] = document["field_units"]
        self.segments: list[str] = document["segments"]
        layouts = [decode_array(value) for value in document["layouts"]]
        self.fields: dict[str, FieldSpec] = {}
        for layout, _ in layouts:
            self.fields[layout.spec.name] = layout.spec
        self.arrays = [
            SegmentArray(layouts[layout].layout, num_chunks) for _, layout, num_chunks, _ in columns["arrays"].tolist()
        ]
        self.array_segments: NDArray[np.int32] = columns["arrays"]["segment"]
        self.array_bytes: NDArray[np.int64] = columns["arrays"]["num_bytes"]
        self.buckets: NDArray[np.int32] = columns["sample_bucket"]

    @classmethod
    def open(cls, root: Root, backend: str, number: int) -> Self:
        """Open a snapshot by its number.

        Raises:
            CacheNotFound: No such snapshot.
            CacheCorrupt: Its file is damaged.
            CacheSchemaError: A newer version wrote it.
        """
        path = snapshot_path(root, number)
        try:
            with path.open("rb") as opened, np.load(opened, allow_pickle=False) as file:
                _check_schema(path, int(file["schema"]))
                columns = {name: file[name] for name in file.files}
            snapshot = cls(root, backend, number, path, columns)
            if snapshot.header["number"] != number:
                raise ValueError(f"it is snapshot {snapshot.header['number']!r}")
            # besides the columns that are counted: document, header, schema
            if len(columns) != json.loads(columns["document"].tobytes())["num_columns"] + 3:
                raise ValueError(f"it has {len(columns)} columns")
        except FileNotFoundError:
            raise CacheNotFound(f"{path} is missing; run data-process to seal the cache again") from None
        except CacheSchemaError:
            raise
        except (zipfile.BadZipFile, ValueError, KeyError, EOFError, RuntimeError, OSError) as error:
            # All that flipping each bit of a snapshot raises; RuntimeError is zipfile's for a member that now says it
            # is encrypted, or compressed in an unknown way.
            raise CacheCorrupt(f"{path} is damaged: {error}; run data-process to seal the cache again") from error
        return snapshot

    def __len__(self) -> int:
        """Return the number of samples, without reserved ones."""
        return len(self.buckets) - len(self.reserved)

    @property
    def digest(self) -> str:
        """The digest of its samples, as ``samples_digest`` computes it."""
        return str(self.header["digest"])

    def sample_id(self, position: int) -> str:
        """Return the id of a sample."""
        return str(self._columns["sample_id"][position].tobytes().hex())

    def source(self, position: int) -> str:
        """Return where a sample comes from."""
        start, end = self._columns["source_offset"][position : position + 2]
        return self._columns["source"][start:end].tobytes().decode()

    @cached_property
    def _members(self) -> dict[str, NDArray[np.int64]]:
        order = np.argsort(self.buckets, kind="stable")
        ends = np.cumsum(np.bincount(self.buckets, minlength=len(self.bucket_names)))
        return dict(zip(self.bucket_names, np.split(order, ends[:-1]), strict=True))

    @property
    def bucket_members(self) -> dict[str, NDArray[np.int64]]:
        """The positions of the samples of each bucket, in sample order; without the reserved bucket."""
        return {name: members for name, members in self._members.items() if name != RESERVED_BUCKET}

    @cached_property
    def reserved(self) -> dict[str, int]:
        """The positions of the reserved samples, by id."""
        return {self.sample_id(position): position for position in self._members.get(RESERVED_BUCKET, ())}

    @property
    def num_records(self) -> dict[str, int]:
        """The number of records of each unit; samples can share one."""
        return {unit: len(self._columns[f"{unit}.key"]) for unit in sorted(set(self.field_units.values()))}

    @property
    def num_duplicates(self) -> dict[str, int]:
        """By unit, how many samples have a record that an earlier sample has too; reserved ones do not count."""
        rows = {unit: self._columns[f"{unit}.record"][: len(self)] for unit in self.num_records}
        return {unit: len(self) - len(np.unique(column)) for unit, column in rows.items()}

    @property
    def payload_bytes(self) -> int:
        """Bytes of all its records' values."""
        row_bytes = np.array([array.layout.row_bytes for array in self.arrays], np.int64)
        tables = (self._columns[f"{field}.placement"] for field in self.fields)
        return sum(int((row_bytes[table["array"]] * table["num_rows"]).sum()) for table in tables)

    def has_columns(self, columns: Columns) -> bool:
        """Tell whether it lists the same samples, and reads their records from the same places."""
        return all(np.array_equal(column, self._columns.get(name, ())) for name, column in columns.items())

    def field_shapes(self) -> dict[str, set[tuple[int, ...]]]:
        """Return the item shapes of each field; of a ragged one without its first dimension."""
        shapes: dict[str, set[tuple[int, ...]]] = {name: set() for name in self.fields}
        for layout, _ in self.arrays:
            shapes[layout.spec.name].add(layout.item_shape)
        return shapes

    def placements(self, field: str, positions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return where the items of some samples lie: int64 ``[samples, 4]``, columns as in ``Placement``.

        The array is a number in ``arrays``.
        """
        rows = self._columns[f"{self.field_units[field]}.record"][positions]
        return _placement_rows(self._columns[f"{field}.placement"][rows])

    def samples(self) -> Iterator[SealedSample]:
        """Yield its samples as they were sealed, reserved ones too."""
        keys = {unit: self._record_keys(unit) for unit in self.num_records}
        for position in range(len(self.buckets)):
            yield SealedSample(
                sample_id=self.sample_id(position),
                bucket=self.bucket_names[self.buckets[position]],
                source=self.source(position),
                keys={unit: keys[unit][self._columns[f"{unit}.record"][position]] for unit in keys},
            )

    def commits(self) -> list[Commit]:
        """Return its records by segment, in the journal's form but without sizes and checksums of files."""
        units: list[dict[str, UnitRecords]] = [{} for _ in self.segments]
        for unit in self.num_records:
            fields = [field for field, owner in self.field_units.items() if owner == unit]
            keys = np.array(self._record_keys(unit))
            placements = {field: _placement_rows(self._columns[f"{field}.placement"]) for field in fields}
            segments = self.array_segments[placements[fields[0]][:, 0]]
            order = np.argsort(segments, kind="stable")
            ends = np.cumsum(np.bincount(segments, minlength=len(self.segments)))
            for number, rows in enumerate(np.split(order, ends[:-1])):
                if rows.size:
                    chosen = {field: values[rows] for field, values in placements.items()}
                    units[number][unit] = UnitRecords(keys[rows].tolist(), chosen)
        return [
            Commit(segment, self.backend, self.arrays, {}, records)
            for segment, records in zip(self.segments, units, strict=True)
        ]

    def _record_keys(self, unit: str) -> list[str]:
        digits = self._columns[f"{unit}.key"].tobytes().hex()
        return [digits[i : i + KEY_DIGITS] for i in range(0, len(digits), KEY_DIGITS)]

    def segment_folder(self, array_number: int) -> Root:
        """Return the folder of the segment that an array belongs to."""
        return self.root / SEGMENTS / self.segments[int(self.array_segments[array_number])]

    def array_path(self, array_number: int) -> Root:
        """Return the file of an array."""
        return self.segment_folder(array_number) / self.arrays[array_number].layout.file

    def check_files(self) -> None:
        """Look whether every file is there and of the committed size; reads none.

        Raises:
            CacheCorrupt: Names the first that is not.
        """
        sizes = file_sizes(self.root / SEGMENTS)
        for number, num_bytes in enumerate(self.array_bytes.tolist()):
            path = self.array_path(number)
            segment = self.segments[int(self.array_segments[number])]
            found = sizes.get(f"{segment}/{self.arrays[number].layout.file}")
            if found is None:
                raise CacheCorrupt(f"{path} is missing; run data-process again")
            if found != num_bytes:
                raise CacheCorrupt(f"{path} has {found} bytes, not {num_bytes}; run data-process again")


def snapshot_path(root: Root, number: int) -> Root:
    """Return the file of a snapshot."""
    return root / SNAPSHOTS / f"{number:06d}.npz"


def seal_path(root: Root, number: int) -> Root:
    """Return the file that vouches for a snapshot: one line with its size and crc32c, or that it was lost."""
    return root / SNAPSHOTS / f"{number:06d}.seal"


def snapshot_numbers(root: Root) -> list[int]:
    """Return the numbers of all snapshots, in order; also of one whose file is missing and whose seal tells of it."""
    paths = (root / SNAPSHOTS).glob("*")
    return sorted({int(path.stem) for path in paths if path.suffix in (".npz", ".seal") and path.stem.isdigit()})


def latest_number(root: Root) -> int | None:
    """Return the number of the newest snapshot, if any."""
    return max(snapshot_numbers(root), default=None)


def refuse_newer_snapshots(root: Root) -> None:
    """Look by their seals whether all snapshots are of a version that this one knows.

    Raises:
        CacheSchemaError: A newer version wrote one.
    """
    for number in snapshot_numbers(root):
        seal = read_seal(root, number)
        if seal is not None:
            _check_schema(seal_path(root, number), seal["schema"])


def _check_schema(path: Root, schema: int) -> None:
    if schema > SCHEMA:
        raise CacheSchemaError(f"{path}: schema {schema} is newer than {SCHEMA}; upgrade diffsynth-pipe")


def tabulate(samples: Iterable[SealedSample], index: RecordIndex) -> tuple[Columns, str]:
    """Return the columns of a snapshot of these samples, and their digest.

    Raises:
        CacheError: A record is not committed, samples differ in units, or there is no sample.
    """
    ids, sources, offsets, buckets = bytearray(), bytearray(), array("q", [0]), array("i")
    bucket_numbers: dict[str, int] = {}
    rows: dict[str, array[int]] = {}
    digest = _SamplesDigest()
    for sample in samples:
        if not buckets:
            rows = {unit: array("q") for unit in sorted(sample.keys)}
        if sample.keys.keys() != rows.keys():
            raise CacheError(
                f"{sample.source}: units {sorted(sample.keys)} are not {sorted(rows)} as of the first sample"
            )
        for unit, key in sample.keys.items():
            row = index.rows.get(unit, {}).get(key)
            if row is None:
                raise CacheError(f"{sample.source}: {unit} record {key} is not in the cache; run data-process again")
            rows[unit].append(row)
        ids += bytes.fromhex(sample.sample_id)
        sources += sample.source.encode()
        offsets.append(len(sources))
        buckets.append(bucket_numbers.setdefault(sample.bucket, len(bucket_numbers)))
        digest.update(sample)
    if not buckets:
        raise CacheError("there are no samples to seal; check the metadata")
    columns: Columns = {
        "sample_id": np.frombuffer(ids, np.uint8).reshape(len(buckets), -1),
        "sample_bucket": np.frombuffer(buckets, np.int32),
        "source": np.frombuffer(sources, np.uint8),
        "source_offset": np.frombuffer(offsets, np.int64),
    }
    field_units: dict[str, str] = {}
    for unit, unit_rows in rows.items():
        used, record = np.unique(np.frombuffer(unit_rows, np.int64), return_inverse=True)
        columns[f"{unit}.record"] = record.astype(np.int32)
        columns[f"{unit}.key"] = index.keys[unit][used]
        for field, placements in index.placements[unit].items():
            items = placements[used]
            if (items[:, 0] < 0).all():
                continue
            if (items[:, 0] < 0).any() or field in field_units:
                raise CacheError(
                    f"field {field!r} of unit {unit!r} is not in all records; encode into a new cache_path"
                )
            field_units[field] = unit
            table = columns[f"{field}.placement"] = np.empty(len(items), _PLACEMENT)
            for name, values in zip(PLACEMENT_COLUMNS, items.T, strict=True):
                table[name] = values
    document: dict[str, Any] = {"buckets": list(bucket_numbers), "field_units": field_units}
    document |= _tabulate_arrays(columns, field_units, index)
    document["num_columns"] = len(columns)
    columns["document"] = _json_column(document)
    return columns, digest.hexdigest()


def _tabulate_arrays(columns: Columns, fields: Iterable[str], index: RecordIndex) -> dict[str, Any]:
    """Renumber the arrays that the placements use, and describe them."""
    tables = [columns[f"{field}.placement"] for field in fields]
    used = np.unique(np.concatenate([np.unique(table["array"]) for table in tables]))
    for table in tables:
        table["array"] = np.searchsorted(used, table["array"])
    arrays = [index.arrays[number] for number in used.tolist()]
    layouts = {layout: number for number, layout in enumerate(dict.fromkeys(found.layout for _, found, _ in arrays))}
    specs = {layout.spec.name: layout.spec for layout in layouts}
    for layout in layouts:
        if layout.spec != specs[layout.spec.name]:
            raise CacheError(f"field {layout.spec.name!r} is stored as {layout.spec} and {specs[layout.spec.name]}")
    segments = {number: place for place, number in enumerate(dict.fromkeys(segment for segment, _, _ in arrays))}
    columns["arrays"] = np.array(
        [
            (segments[segment], layouts[found.layout], found.num_chunks, num_bytes)
            for segment, found, num_bytes in arrays
        ],
        _ARRAY,
    )
    return {
        "segments": [index.segments[number] for number in segments],
        "layouts": [encode_array(SegmentArray(layout, 0)) for layout in layouts],
    }


def publish(root: Root, number: int, columns: Columns, header: Mapping[str, Any]) -> None:
    """Write a snapshot, then its seal.

    Raises:
        FileExistsError: There is one of this number.
        OSError: The disk refuses.
    """
    members: dict[str, Any] = {
        "schema": np.int64(SCHEMA),
        "header": _json_column({**header, "number": number}),
        **columns,
    }
    folder = scratch_folder(root / SCRATCH, f"snapshot-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with (folder / "unfinished.npz").open("xb") as file:
            np.savez(file, **members)
            file.flush()
            os.fsync(file.fileno())
        publish_new_file(folder / "unfinished.npz", snapshot_path(root, number))
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    write_seal(root, number)


def _json_column(value: Mapping[str, Any]) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value, separators=(",", ":")).encode(), np.uint8)


def _placement_rows(table: NDArray[Any]) -> NDArray[np.int64]:
    """Return a table of placements as int64 ``[rows, 4]``."""
    return np.stack([table[column] for column in PLACEMENT_COLUMNS], axis=1, dtype=np.int64)


def write_seal(root: Root, number: int) -> None:
    """Vouch for the file of a snapshot as it stands."""
    path = snapshot_path(root, number)
    entry = {"schema": SCHEMA, "number": number, "bytes": path.stat().st_size, "crc32c": file_checksum(path)}
    replace_file(seal_path(root, number), encode_line(entry), root / SCRATCH)


def write_loss(root: Root, number: int) -> None:
    """Put on record that a snapshot was lost, so that no older one is taken for the newest."""
    entry = {"schema": SCHEMA, "number": number, "lost": True}
    replace_file(seal_path(root, number), encode_line(entry), root / SCRATCH)


def read_seal(root: Root, number: int) -> dict[str, Any] | None:
    """Return what vouches for a snapshot; None if it is missing, damaged, or of another snapshot."""
    try:
        line = seal_path(root, number).read_bytes()
    except FileNotFoundError:
        return None
    entry = decode_line(line)
    return entry if entry is not None and line.endswith(b"\n") and entry.get("number") == number else None
