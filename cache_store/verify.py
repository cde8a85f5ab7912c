"""Is a cache still what was written? Names what is not, down to the field of a sample."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from awscrt.checksums import crc32c

from cache_store.backends import load_backend
from cache_store.contract import CHECKSUM_BYTES, CacheCorrupt, CacheNotFound, Placement
from cache_store.durable import FolderLock, disk_errors, file_checksum, file_sizes, local_folder
from cache_store.journal import read_journal
from cache_store.manifest import (
    RECIPES,
    SEGMENTS,
    SNAPSHOTS,
    is_manifest_intact,
    missing_folders,
    read_manifest,
    read_recipe,
)
from cache_store.object_path import ObjectPath
from cache_store.snapshot import Snapshot, read_seal, seal_path, snapshot_numbers, snapshot_path

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from numpy.typing import NDArray

    from cache_store.contract import ArrayLayout
    from cache_store.journal import Commit, JournalContents
    from cache_store.object_path import Root

Items = dict[str, "tuple[ArrayLayout, Placement]"]
"""Where the items of one record lie, by field."""


def verify(root: Root, *, full: bool) -> list[str]:
    """Look for damage; change nothing.

    Args:
        root: The cache.
        full: Read every byte; otherwise look whether all files are there and of the right size.

    Returns:
        One line for each file that is damaged, and, if it is to be read in full, for each field of a sample that is.

    Raises:
        CacheNotFound, CacheCorrupt, CacheSchemaError: There is no cache that this version could read.
        CacheError: The disk refuses.
    """
    backend = read_manifest(root)
    with disk_errors(root), FolderLock(root) as lock:
        lines = [] if is_manifest_intact(root) else ["store.json is damaged"]
        lines += [f"{name} is missing" for name in missing_folders(root)]
        is_at_rest = lock.try_exclude()
        contents = read_journal(root)
        if is_at_rest or isinstance(root, ObjectPath):  # otherwise a writer may be in the middle of a line
            lines += contents.damage
        if is_at_rest:  # otherwise a writer may be between two steps of a commit
            lines += [
                f"{SEGMENTS}/{segment} has no journal line: it lost it, or its writer was killed"
                for segment in segments_without_line(root, contents)
            ]
        lock.share()
        snapshot_lines, newest = _check_snapshots(root, backend, full)
        lines += snapshot_lines
        lines += _check_recipes(root, newest)
        commits = contents.live_commits()
        lines += _check_commits(root, commits, newest, full)
        if newest is not None:
            lines += _check_references(root, commits, newest, full)
    return lines


def records_of(commit: Commit) -> Iterator[tuple[str, str, Items]]:
    """Yield the unit, the key and the items of each record of a segment."""
    for unit, records in commit.units.items():
        columns = {field: rows.tolist() for field, rows in records.placements.items()}
        for row, key in enumerate(records.keys):
            placements = {field: Placement(*rows[row]) for field, rows in columns.items() if rows[row][0] >= 0}
            yield (
                unit,
                key,
                {field: (commit.arrays[place.array].layout, place) for field, place in placements.items()},
            )


def read_item(folder: Path, backend_name: str, layout: ArrayLayout, place: Placement) -> NDArray[Any] | None:
    """Return an item of a segment, in its storage dtype; None if it cannot be read or is not what was written.

    Unlike the reader it takes an item that is whole from a file that is not.
    """
    chunk_bytes, num_chunks = layout.chunk_bytes(place.num_rows), layout.num_chunks(place.num_rows)
    try:
        with (folder / layout.file).open("rb") as file:
            file.seek(load_backend(backend_name).offset(layout, place.start))
            data = file.read(num_chunks * (chunk_bytes + CHECKSUM_BYTES))
    except OSError:
        return None
    if len(data) < num_chunks * (chunk_bytes + CHECKSUM_BYTES):
        return None
    chunks = np.frombuffer(data, np.uint8).reshape(num_chunks, chunk_bytes + CHECKSUM_BYTES)
    values = np.ascontiguousarray(chunks[:, :chunk_bytes]).reshape(-1)[: place.num_rows * layout.row_bytes]
    if crc32c(values) != place.digest:
        return None
    shape = (place.num_rows, *layout.item_shape) if layout.spec.ragged else layout.item_shape
    return values.view(layout.spec.storage_dtype).reshape(shape)


def read_record(folder: Path, root: Root, commit: Commit, unit: str, key: str, items: Items) -> dict[str, NDArray[Any]]:
    """Return the fields of a record that ``records_of`` yielded.

    Args:
        folder: The segment, or a copy of it on this machine.
        root: The cache, for messages.
        commit: The segment's commit.
        unit: The record's unit.
        key: Its key.
        items: Where its fields lie.

    Raises:
        CacheCorrupt: One of them cannot be read or is not what was written.
    """
    fields = {}
    for name, (layout, place) in items.items():
        item = read_item(folder, commit.backend, layout, place)
        if item is None:
            raise CacheCorrupt(
                f"{root / SEGMENTS / commit.segment / layout.file}: {name} of {unit} record {key} is damaged;"
                f" run `diffsynth-pipe cache repair {root}`"
            )
        fields[name] = item
    return fields


def damaged_files(folder: Root, commit: Commit, *, full: bool) -> dict[str, str]:
    """Return the files of a segment that are not as committed, and what is wrong; files without a record count not.

    To read them in full, the folder must be on this machine.
    """
    arrays = {array.layout.file for array in commit.arrays}
    live = commit.live_files()
    sizes = file_sizes(folder)
    problems = {}
    for name, (num_bytes, checksum) in commit.files.items():
        if name in arrays and name not in live:
            continue
        found = sizes.get(name)
        if found is None:
            problems[name] = "is missing"
        elif found != num_bytes:
            problems[name] = f"has {found} bytes, not {num_bytes}"
        elif full and _checksum_of(folder / name) != checksum:
            problems[name] = "fails its checksum"
    if full:
        assert isinstance(folder, Path)
        # A crc32c is blind to items that each come with their own: any others give the file the same checksum.
        for _, _, items in records_of(commit):
            for layout, place in items.values():
                if layout.file not in problems and read_item(folder, commit.backend, layout, place) is None:
                    problems[layout.file] = "holds other items than were written"
    return problems


def check_snapshot(root: Root, backend: str, number: int) -> Snapshot | None:
    """Return a snapshot; None if its file is missing or damaged."""
    try:
        return Snapshot.open(root, backend, number)
    except (CacheNotFound, CacheCorrupt):
        return None


def _checksum_of(path: Root) -> int | None:
    try:
        return file_checksum(path)
    except OSError:
        return None


def segments_without_line(root: Root, contents: JournalContents) -> list[str]:
    """Return the segments that no journal knows."""
    known = {commit.segment for commit in contents.commits} | contents.retracted.keys()
    return sorted(path.name for path in (root / SEGMENTS).glob("*") if path.name not in known)


def _check_snapshots(root: Root, backend: str, full: bool) -> tuple[list[str], Snapshot | None]:
    """Return the damage of all snapshots, and the newest one unless it is damaged."""
    lines: list[str] = []
    newest = None
    numbers = snapshot_numbers(root)
    for number in numbers:
        path, seal = snapshot_path(root, number), read_seal(root, number)
        newest = check_snapshot(root, backend, number)
        if seal is None:
            lines.append(f"{SNAPSHOTS}/{seal_path(root, number).name} is missing or damaged")
        elif "lost" in seal:
            if number == numbers[-1]:
                lines.append(f"{SNAPSHOTS}/{path.name} was lost: run data-process to seal the samples again")
            continue
        if newest is None:
            lines.append(f"{SNAPSHOTS}/{path.name} is missing or damaged")
        elif seal and (path.stat().st_size != seal["bytes"] or (full and _checksum_of(path) != seal["crc32c"])):
            lines.append(f"{SNAPSHOTS}/{path.name} fails its checksum")
    return lines, newest


def _check_recipes(root: Root, newest: Snapshot | None) -> list[str]:
    names = {path.stem for path in (root / RECIPES).glob("*.json")}
    if newest is not None:
        names |= set(newest.header.get("units", {}).values())
    return [f"{RECIPES}/{name}.json is missing or damaged" for name in sorted(names) if read_recipe(root, name) is None]


def _check_commits(root: Root, commits: list[Commit], newest: Snapshot | None, full: bool) -> list[str]:
    lines: list[str] = []
    damaged: dict[tuple[str, str], dict[str, str]] = {}
    for commit in commits:
        segment = root / SEGMENTS / commit.segment
        if full:
            with local_folder(segment) as folder:
                problems = damaged_files(folder, commit, full=True)
                for unit, key, items in _damaged_records(folder, commit, problems):
                    damaged[unit, key] = items
        else:
            problems = damaged_files(segment, commit, full=False)
        lines += [f"{SEGMENTS}/{commit.segment}/{name} {problem}" for name, problem in problems.items()]
    return lines + _name_samples(damaged, newest)


def _damaged_records(
    folder: Path, commit: Commit, files: Mapping[str, str] | None = None
) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Yield the unit and the key of damaged records, and by field the file; looks into some files, or all."""
    for unit, key, items in records_of(commit):
        lost = {
            field: f"{SEGMENTS}/{commit.segment}/{layout.file}"
            for field, (layout, place) in items.items()
            if (files is None or layout.file in files) and read_item(folder, commit.backend, layout, place) is None
        }
        if lost:
            yield unit, key, lost


def _name_samples(damaged: Mapping[tuple[str, str], Mapping[str, str]], newest: Snapshot | None) -> list[str]:
    """Return a line for each field of a sample whose record is damaged; of a record that no sample has, by its key."""
    if not damaged:
        return []
    lines = []
    named = set()
    for sample in newest.samples() if newest is not None else ():
        for record in sample.keys.items():
            for field, file in damaged.get(record, {}).items():
                lines.append(f"{field} of sample {sample.sample_id} ({sample.source}) is damaged in {file}")
                named.add(record)
    for record, fields in damaged.items():
        if record not in named:
            lines += [
                f"{field} of {record[0]} record {record[1]} is damaged in {file}" for field, file in fields.items()
            ]
    return lines


def _check_references(root: Root, commits: list[Commit], newest: Snapshot, full: bool) -> list[str]:
    """Return what the newest snapshot reads that no journal vouches for."""
    journaled = {commit.segment: commit for commit in commits}
    lines: list[str] = []
    damaged: dict[tuple[str, str], dict[str, str]] = {}
    for commit in newest.commits():
        known = journaled.get(commit.segment)
        names = {unit: set(records.keys) for unit, records in known.units.items()} if known else {}
        num_unknown = sum(len(set(records.keys) - names.get(unit, set())) for unit, records in commit.units.items())
        if num_unknown:
            lines.append(
                f"{SNAPSHOTS}/{newest.path.name} reads {num_unknown} records of {SEGMENTS}/{commit.segment} that no"
                " journal has"
            )
            if full:
                rest = commit.without((), names)
                if rest.units:
                    with local_folder(root / SEGMENTS / rest.segment) as folder:
                        damaged |= {(unit, key): lost for unit, key, lost in _damaged_records(folder, rest)}
    return lines + _name_samples(damaged, newest)
