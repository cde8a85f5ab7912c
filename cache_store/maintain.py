"""What keeps a cache whole and small: repair, garbage collection, compaction."""

from __future__ import annotations

import math
import os
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.backends import load_backend
from cache_store.contract import CacheError, CacheNotFound
from cache_store.durable import FolderLock, disk_errors, file_checksum, fsync_folder, local_folder, replace_file
from cache_store.journal import decode_line, read_journal, read_notes, retract
from cache_store.manifest import (
    JOURNAL,
    RECIPES,
    SCRATCH,
    SEGMENTS,
    SNAPSHOTS,
    check_folders,
    create_store,
    is_manifest_intact,
    read_manifest,
    read_recipe,
    write_manifest,
)
from cache_store.snapshot import (
    read_seal,
    refuse_newer_snapshots,
    seal_path,
    snapshot_numbers,
    snapshot_path,
    write_loss,
    write_seal,
)
from cache_store.store import Cache
from cache_store.verify import (
    check_snapshot,
    damaged_files,
    read_item,
    read_record,
    records_of,
    segments_without_line,
)

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from cache_store.journal import Commit
    from cache_store.object_path import Root
    from cache_store.snapshot import Snapshot
    from cache_store.writer import Writer

SEGMENT_BYTES = 256 << 20


@dataclass(slots=True)
class Repair:
    """What a repair did.

    Attributes:
        lines: One for each thing that was changed.
        num_rescued: Whole records that were copied out of damaged files.
        lost: By unit, the keys of records that must be encoded again.
        is_sealed: Whether the newest snapshot can be read again.
    """

    lines: list[str] = field(default_factory=list)
    num_rescued: int = 0
    lost: dict[str, set[str]] = field(default_factory=dict)
    is_sealed: bool = False


def repair(root: Root) -> Repair:
    """Bring a damaged cache into a state that verifies, as far as it can be done without encoding.

    Whole records are copied out of damaged files; the records there are retracted by a journal line, so that those that
    are lost are encoded again. Damaged lines of journals and damaged recipes go; of damaged snapshots the newest leaves
    its number behind, so that no older one is trained on in its stead.

    Raises:
        CacheNotFound, CacheCorrupt, CacheSchemaError: There is no cache that this version could repair.
        CacheError: A writer is at work, or the disk refuses.
    """
    root = _lockable(root, "delete the objects that `cache verify` names, and run data-process again")
    if not root.is_dir():
        raise CacheNotFound(f"{root} is not a cache: no such folder")
    done = Repair()
    with disk_errors(root), FolderLock(root) as lock:
        if not lock.try_exclude():
            raise CacheError(f"cache {root} is in use; repair it when nothing writes to it")
        read_journal(root)  # it and the next line refuse what a newer version wrote, before anything is changed
        refuse_newer_snapshots(root)
        _repair_manifest(root, done)
        backend = read_manifest(root)
        create_store(root, backend)
        _repair_journals(root, done)
        uncommitted = segments_without_line(root, read_journal(root))
        lock.share()
        newest = _repair_snapshots(root, backend, done)
        _repair_segments(root, newest, done)
        if uncommitted:
            retract(root, dict.fromkeys(uncommitted))
            done.lines += [f"{SEGMENTS}/{segment}: given up, it has no journal line" for segment in uncommitted]
        _drop_damaged_recipes(root, done)
        if newest is not None:
            _seal_again(Cache.open(root), newest, done)
    return done


def _lockable(root: Root, cure: str) -> Path:
    """Return a cache that can be kept from its writers.

    Raises:
        CacheError: It lies in an object store, which has no locks.
    """
    if isinstance(root, Path):
        return root
    raise CacheError(f"{root}: no lock keeps the writers of a cache in an object store away; instead, {cure}")


def _seal_again(cache: Cache, newest: Snapshot, done: Repair) -> None:
    committed = cache.committed_keys()
    needed = {record for sample in newest.samples() for record in sample.keys.items()}
    missing = {(unit, key) for unit, key in needed if key not in committed.get(unit, ())}
    for unit, key in missing:
        done.lost.setdefault(unit, set()).add(key)
    done.is_sealed = not missing
    if done.is_sealed and cache.seal(newest.samples(), newest.header, instead_of=newest.number).number != newest.number:
        done.lines.append(f"snapshot {newest.number}: its samples are sealed again")


def _repair_manifest(root: Path, done: Repair) -> None:
    if is_manifest_intact(root):
        return
    commits = read_journal(root).commits
    backend = commits[0].backend if commits else read_manifest(root)
    (root / SCRATCH).mkdir(exist_ok=True)
    write_manifest(root, backend)
    done.lines.append("store.json: written again")


def _repair_journals(root: Path, done: Repair) -> None:
    """Give each session a journal of all its whole lines, and of nothing else."""
    folder = root / JOURNAL
    found = {path.stem: path.read_bytes() for path in sorted(folder.glob("*.jsonl"))}
    lines: dict[str, dict[bytes, None]] = {}
    for data in found.values():
        for line in data.splitlines():
            entry = decode_line(line)
            if entry is not None and "session" in entry:
                lines.setdefault(entry["session"], {})[line + b"\n"] = None
    wanted = {session: b"".join(lines[session]) for session in lines}
    changed = {session for session, data in wanted.items() if data != found.get(session)}
    # a line is never in memory alone: all new files are there before the first old one goes
    for session in sorted(changed):
        replace_file(folder / f"{session}.repaired.jsonl", wanted[session], root / SCRATCH)
    for session in sorted(changed):
        (folder / f"{session}.repaired.jsonl").replace(folder / f"{session}.jsonl")
        done.lines.append(f"{JOURNAL}/{session}.jsonl: kept the lines that are whole")
    for session in sorted(found.keys() - wanted.keys()):
        (folder / f"{session}.jsonl").unlink(missing_ok=True)
        done.lines.append(f"{JOURNAL}/{session}.jsonl: removed, no line is whole")
    fsync_folder(folder)


def _repair_snapshots(root: Path, backend: str, done: Repair) -> Snapshot | None:
    """Return the newest snapshot, unless it was lost."""
    newest = None
    numbers = snapshot_numbers(root)
    for number in numbers:
        path, seal = snapshot_path(root, number), read_seal(root, number)
        newest = check_snapshot(root, backend, number)
        if newest is not None:
            if _is_seal_wrong(path, seal):
                write_seal(root, number)
                done.lines.append(f"{SNAPSHOTS}/{path.name}: sealed as it stands, it is whole")
        elif number != numbers[-1]:
            path.unlink(missing_ok=True)
            seal_path(root, number).unlink(missing_ok=True)
            done.lines.append(f"{SNAPSHOTS}/{path.name}: removed, it is lost")
        elif seal is None or "lost" not in seal:
            write_loss(root, number)
            path.unlink(missing_ok=True)
            done.lines.append(f"{SNAPSHOTS}/{path.name}: removed, it is lost")
    return newest


def _repair_segments(root: Path, newest: Snapshot | None, done: Repair) -> None:
    """Rewrite files that follow from the journal; rescue whole records from damaged ones, and retract these."""
    contents = read_journal(root)
    commits = contents.live_commits()
    affected: list[Commit] = []
    present: dict[str, set[str]] = {}
    lost: dict[str, set[str]] = {}
    for commit in commits:
        damaged = set(damaged_files(root / SEGMENTS / commit.segment, commit, full=True))
        damaged -= _restore_metadata(root, commit, damaged, done)
        whole = commit.without(damaged, {})
        for unit, records in whole.units.items():
            present.setdefault(unit, set()).update(records.keys)
        gone = commit.without((), {unit: records.keys for unit, records in whole.units.items()})
        if gone.units:
            affected.append(gone)
    known = {commit.segment for commit in contents.commits}
    unjournaled = [commit for commit in newest.commits() if commit.segment not in known] if newest is not None else []
    # of records with the same key the last counts
    notes = read_notes(root)
    for commit in reversed(unjournaled + affected):
        _rescue(root, commit, notes, present, lost, done)
    done.lost = {unit: keys - present[unit] for unit, keys in lost.items() if keys - present[unit]}
    if affected:
        retract(root, {c.segment: {unit: records.keys for unit, records in c.units.items()} for c in affected})
        done.lines += [f"{SEGMENTS}/{commit.segment}: retracted the records of damaged files" for commit in affected]


def _restore_metadata(root: Path, commit: Commit, damaged: Collection[str], done: Repair) -> set[str]:
    restored = set()
    metadata = load_backend(commit.backend).metadata(commit.arrays)
    for name in sorted(set(damaged) & metadata.keys()):
        path = root / SEGMENTS / commit.segment / name
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, metadata[name], root / SCRATCH)
        restored.add(name)
        done.lines.append(f"{SEGMENTS}/{commit.segment}/{name}: written again")
    return restored


def _rescue(
    root: Path,
    commit: Commit,
    notes: Mapping[tuple[str, str], str],
    present: dict[str, set[str]],
    lost: dict[str, set[str]],
    done: Repair,
) -> None:
    """Copy the whole records of a segment that lie nowhere else; note the others as lost."""
    with Cache.open(root).writer(commit_seconds=math.inf) as writer:
        for unit, key, items in records_of(commit):
            if key in present.setdefault(unit, set()):
                continue
            folder = root / SEGMENTS / commit.segment
            fields = {name: read_item(folder, commit.backend, *where) for name, where in items.items()}
            whole = {name: item for name, item in fields.items() if item is not None}
            if len(whole) < len(fields):
                lost.setdefault(unit, set()).add(key)
                continue
            writer.add(unit, key, whole, [layout.spec for layout, _ in items.values()], note=notes.get((unit, key), ""))
            present[unit].add(key)
            done.num_rescued += 1


def _drop_damaged_recipes(root: Path, done: Repair) -> None:
    for path in sorted((root / RECIPES).glob("*.json")):
        if read_recipe(root, path.stem) is None:
            path.unlink()
            done.lines.append(f"{RECIPES}/{path.name}: removed, it is damaged")


def _is_seal_wrong(path: Root, seal: Mapping[str, Any] | None) -> bool:
    if seal is None or "lost" in seal:
        return True
    return bool(path.stat().st_size != seal["bytes"] or file_checksum(path) != seal["crc32c"])


@dataclass(slots=True)
class Garbage:
    """What nobody needs.

    Attributes:
        snapshots: Numbers of superseded snapshots.
        segments: Committed segments that only those snapshots read, or whose records were all written again.
        leftovers: What killed processes left, relative to the cache.
        num_bytes: Bytes of all their files.
    """

    snapshots: list[int] = field(default_factory=list)
    segments: list[str] = field(default_factory=list)
    leftovers: list[str] = field(default_factory=list)
    num_bytes: int = 0

    def names(self) -> list[str]:
        """Return the paths of all, relative to the cache."""
        snapshots = [f"{SNAPSHOTS}/{number:06d}" for number in self.snapshots]
        return [*snapshots, *(f"{SEGMENTS}/{name}" for name in self.segments), *self.leftovers]


def collect_garbage(
    root: Root, *, keep: int = 2, grace_s: float = 86400.0, unsealed: bool = False, dry_run: bool = False
) -> Garbage:
    """Delete what no kept snapshot and no writer may need; return it.

    Segments are retracted by a journal line, then moved away, then deleted.

    Args:
        root: The cache.
        keep: How many snapshots stay, the newest ones.
        grace_s: What was written less than this long ago stays, for trainings that read an older snapshot.
        unsealed: Also delete committed segments that no snapshot ever named: work that will not be resumed.
        dry_run: Only say what would be deleted.

    Raises:
        CacheNotFound, CacheCorrupt, CacheSchemaError: There is no cache, or a folder of it, a snapshot to be kept or a
            file that the newest reads is missing or damaged.
        CacheError: A writer is at work, or the disk refuses.
    """
    root = _lockable(root, "`cache export` the newest snapshot into a new cache, and delete this one")
    cache = Cache.open(root)
    with disk_errors(root), FolderLock(root) as lock:
        if not lock.try_exclude():
            raise CacheError(f"cache {root} is in use; collect its garbage when nothing writes to it")
        check_folders(root)
        garbage = _find_garbage(cache, root, keep, time.time() - grace_s, unsealed)
        if not dry_run:
            _delete(root, garbage)
    return garbage


def _find_garbage(cache: Cache, root: Path, keep: int, oldest_s: float, unsealed: bool) -> Garbage:
    def is_old(path: Path) -> bool:
        return path.stat().st_mtime <= oldest_s

    garbage = Garbage()
    numbers = snapshot_numbers(root)
    lost = {number for number in numbers[:-1] if "lost" in (read_seal(root, number) or {})}
    newest = [number for number in numbers if number not in lost][-keep:]
    if newest:
        cache.snapshot(newest[-1]).check_files()  # what seems superseded may be all that is left of a record
    for number in numbers:
        if number not in newest and all(map(is_old, _files_of_snapshot(root, number))):
            garbage.snapshots.append(number)
    read: set[str] = set()
    superseded: set[str] = set()
    for number in numbers:
        if number not in garbage.snapshots and number not in lost:
            read.update(cache.snapshot(number).segments)
        elif (snapshot := check_snapshot(root, cache.backend, number)) is not None:
            superseded.update(snapshot.segments)
    commits = read_journal(root).live_commits()
    live = {commit.segment for commit in commits}
    superseded |= live if unsealed else _written_again(commits)
    for path in sorted((root / SEGMENTS).glob("*")):
        if path.name in read or not is_old(path):
            continue
        if path.name not in live:
            garbage.leftovers.append(f"{SEGMENTS}/{path.name}")
        elif path.name in superseded:
            garbage.segments.append(path.name)
    garbage.leftovers += [f"{SCRATCH}/{path.name}" for path in sorted((root / SCRATCH).glob("*")) if is_old(path)]
    paths = [root / name for name in garbage.leftovers] + [root / SEGMENTS / name for name in garbage.segments]
    paths += [path for number in garbage.snapshots for path in _files_of_snapshot(root, number)]
    garbage.num_bytes = sum(map(tree_bytes, paths))
    return garbage


def _written_again(commits: Sequence[Commit]) -> set[str]:
    """Return the segments all of whose records lie in later ones too."""
    later: dict[str, set[str]] = {}
    found = set()
    for commit in reversed(commits):
        if all(later.get(unit, set()).issuperset(records.keys) for unit, records in commit.units.items()):
            found.add(commit.segment)
        for unit, records in commit.units.items():
            later.setdefault(unit, set()).update(records.keys)
    return found


def _files_of_snapshot(root: Path, number: int) -> list[Path]:
    return [path for path in (root / SNAPSHOTS).glob(f"{number:06d}.*") if path.suffix in (".npz", ".seal")]


def _delete(root: Path, garbage: Garbage) -> None:
    # the snapshots last, for they tell which segments were once sealed
    if garbage.segments:
        retract(root, dict.fromkeys(garbage.segments))
    for number in garbage.snapshots:
        for path in _files_of_snapshot(root, number):
            path.unlink()
    fsync_folder(root / SNAPSHOTS)
    doomed = [root / SEGMENTS / name for name in garbage.segments] + [root / name for name in garbage.leftovers]
    if doomed:
        (root / SCRATCH).mkdir(exist_ok=True)  # copies may leave out an empty folder
    for path in doomed:
        # out of sight first: half a segment under its name would look like damage
        away = root / SCRATCH / path.name
        if path != away:
            path.replace(away)
    fsync_folder(root / SEGMENTS)
    for path in doomed:
        away = root / SCRATCH / path.name
        if away.is_dir():
            shutil.rmtree(away)
        else:
            away.unlink()
    _delete_spent_journals(root)


def _delete_spent_journals(root: Path) -> None:
    """Delete the journals whose segments are all gone, and retractions once they retract nothing that is left."""
    contents = read_journal(root)
    if contents.damage:
        return
    there = {path.name for path in (root / SEGMENTS).glob("*")}
    there |= {commit.segment for commit in contents.live_commits()}
    sessions: dict[str, set[str]] = {}
    for commit in contents.commits:
        sessions.setdefault(commit.segment.rpartition("-")[0], set()).add(commit.segment)
    spent = {session for session, segments in sessions.items() if not segments & there}
    left = set().union(*(segments for session, segments in sessions.items() if session not in spent))
    if not left & contents.retracted.keys():
        spent |= {path.stem for path in (root / JOURNAL).glob("*.jsonl")} - sessions.keys()
    # commits before retractions: a kill in between brings nothing back
    for session in sorted(spent, key=lambda session: session not in sessions):
        (root / JOURNAL / f"{session}.jsonl").unlink()
    fsync_folder(root / JOURNAL)


def tree_bytes(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    if not path.is_dir():
        return path.stat().st_size
    return sum((Path(folder) / name).stat().st_size for folder, _, names in os.walk(path) for name in names)


def compact(cache: Cache, *, segment_bytes: int = SEGMENT_BYTES) -> tuple[int, int]:
    """Copy the newest snapshot's records out of small segments into few large ones, and seal its samples again.

    The small ones stay, for older snapshots, until their garbage is collected.

    Args:
        cache: The cache.
        segment_bytes: What a segment should have; one of less than half of it is small.

    Returns:
        How many segments the newest snapshot read before, and reads now.

    Raises:
        CacheNotFound: There is no snapshot.
        CacheCorrupt: A folder or a file is missing, or a record is damaged.
        CacheSchemaError: A newer version wrote to the journal.
        CacheError: The disk refuses.
    """
    check_folders(cache.root)
    with disk_errors(cache.root):
        read_journal(cache.root)  # before segments are written that could not be sealed
    snapshot = cache.latest()
    if snapshot is None:
        raise CacheNotFound(f"{cache.root} has no snapshot to compact; run data-process first")
    snapshot.check_files()
    num_bytes = dict.fromkeys(snapshot.segments, 0)
    for number, file_bytes in enumerate(snapshot.array_bytes.tolist()):
        num_bytes[snapshot.segments[int(snapshot.array_segments[number])]] += file_bytes
    small = {segment for segment, size in num_bytes.items() if size < segment_bytes // 2}
    if len(small) <= 1 + sum(num_bytes[segment] for segment in small) // segment_bytes:
        return len(num_bytes), len(num_bytes)
    with cache.writer(commit_seconds=math.inf, segment_bytes=segment_bytes) as writer:
        # within the writer's block, where no garbage collection takes journals away
        notes = read_notes(cache.root)
        for commit in snapshot.commits():
            if commit.segment in small:
                with local_folder(cache.root / SEGMENTS / commit.segment) as folder:
                    _copy_records(folder, cache.root, commit, writer, notes)
    sealed = cache.seal(snapshot.samples(), snapshot.header, instead_of=snapshot.number)
    return len(num_bytes), len(sealed.segments)


def _copy_records(
    folder: Path, root: Root, commit: Commit, writer: Writer, notes: Mapping[tuple[str, str], str]
) -> None:
    for unit, key, items in records_of(commit):
        fields = read_record(folder, root, commit, unit, key, items)
        writer.add(unit, key, fields, [layout.spec for layout, _ in items.values()], note=notes.get((unit, key), ""))
