"""What a cache holds, in lines for people; read from the journal and the newest snapshot, not from the data."""

from __future__ import annotations

import json
from math import prod
from typing import TYPE_CHECKING

import numpy as np

from cache_store.channels import MAX_MEAN, MAX_STD, MIN_STD, has_channels, read_channels
from cache_store.contract import CacheError, CacheNotFound
from cache_store.durable import disk_errors, file_sizes
from cache_store.journal import read_journal, read_notes, read_statistics
from cache_store.manifest import check_folders, read_manifest, read_recipe
from cache_store.store import Cache

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cache_store.object_path import Root
    from cache_store.snapshot import SealedSample, Snapshot


MAX_NOTES = 10


def list_caches(folder: Root) -> Iterator[str]:
    """Yield a line for each cache below a folder.

    Raises:
        CacheNotFound: There is none.
        CacheError: Some cannot be read; raised after the last line.
    """
    found: Iterator[Root] = folder.rglob("store.json")
    roots = [root for root in sorted((path.parent for path in found), key=str) if _is_cache(root)]
    if not roots:
        raise CacheNotFound(f"{folder} holds no cache: no store.json of one below it")
    num_unreadable = 0
    for root in roots:
        try:
            cache = Cache.open(root)
            check_folders(root)
            snapshot = cache.latest()
        except CacheError as error:
            num_unreadable += 1
            yield f"{root}  {error}"
            continue
        size = f"{sum(file_sizes(root).values()) / 1e6:.1f} MB"
        if snapshot is None:
            yield f"{root}  not sealed  {size}"
        else:
            yield f"{root}  {len(snapshot)} samples  {size}  sealed {snapshot.header['created']}"
    if num_unreadable:
        raise CacheError(f"{folder}: {num_unreadable} of {len(roots)} caches cannot be read; see their lines")


def _is_cache(root: Root) -> bool:
    try:
        read_manifest(root)
    except CacheNotFound:
        return False
    except CacheError:
        pass
    return True


def describe(root: Root) -> list[str]:
    """Return what a cache holds.

    Raises:
        CacheNotFound, CacheCorrupt, CacheSchemaError: There is no cache, or it cannot be read.
    """
    cache = Cache.open(root)
    check_folders(root)
    with disk_errors(root):
        snapshot = cache.latest()
        contents = read_journal(root)
        live = contents.live_commits()
        statistics = read_statistics(root, {commit.segment for commit in live})
        disk_bytes = sum(file_sizes(root).values())
    lines = [f"backend     {cache.backend}", f"segments    {len(live)}", f"on disk     {disk_bytes / 1e6:.2f} MB"]
    lines += ["snapshots   none is sealed"] if snapshot is None else _describe_snapshot(snapshot)
    for field, ranges in statistics.items():
        spans = ", ".join(f"{name} {low:.4g} to {high:.4g}" for name, (low, high) in ranges.items())
        lines.append(f"{field}: {spans}")
    if snapshot is not None:
        lines += _describe_channels(snapshot)
        lines += _describe_notes(snapshot)
    return lines


def explain(root: Root, sample_id: str | None) -> Iterator[str]:
    """Yield what the samples of the newest snapshot are made of: their source, and the key of each record; then how.

    Args:
        root: The cache.
        sample_id: The first digits of an id; None yields all samples.

    Raises:
        CacheNotFound: There is no cache, no snapshot, or no such sample.
    """
    snapshot = Cache.open(root).latest()
    if snapshot is None:
        raise CacheNotFound(f"{root} has no snapshot; run data-process to its end first")
    found = False
    for sample in snapshot.samples():
        if sample_id is None or sample.sample_id.startswith(sample_id):
            found = True
            yield from _explain_sample(sample)
    if not found:
        raise CacheNotFound(f"{root} has no sample {sample_id!r}; `diffsynth-pipe cache explain {root}` lists them")
    for unit, name in snapshot.header.get("units", {}).items():
        recipe = read_recipe(root, name)
        yield f"recipe {name} of {unit}: {'lost' if recipe is None else json.dumps(recipe, sort_keys=True)}"


def _explain_sample(sample: SealedSample) -> Iterator[str]:
    yield f"sample {sample.sample_id}  {sample.bucket}  {sample.source}"
    for unit, key in sorted(sample.keys.items()):
        yield f"  {unit} {key}"


def _describe_channels(snapshot: Snapshot) -> Iterator[str]:
    """Yield the mean and the deviation of each channel, and whether they are what a normalised latent has.

    The journal counts whole segments, so they are approximate if the snapshot reads only a part of one.
    """
    found = read_channels(snapshot.root, snapshot.segments)
    for (field, num_channels), count in _values_per_channel(snapshot).items():
        moments = found.get((field, num_channels))
        if moments is None:
            yield f"{field} channels: not in the journal"
            continue
        yield f"{field} channel means: {' '.join(f'{value:.3g}' for value in moments.mean)}"
        yield f"{field} channel stds: {' '.join(f'{value:.3g}' for value in moments.std)}"
        far = moments.far_channels()
        if far:
            yield (
                f"{field} channels {', '.join(map(str, far))} of {num_channels} are far from mean 0 and std 1: |mean|"
                f" above {MAX_MEAN:g}, or std outside {MIN_STD:g} to {MAX_STD:g}; check the VAE and its normalisation"
            )
        else:
            yield f"{field} channels: all {num_channels} are near mean 0 and std 1"
        if moments.count != count:
            yield f"{field} channels: approximate, the segments hold {moments.count} values each, the snapshot {count}"


def _values_per_channel(snapshot: Snapshot) -> dict[tuple[str, int], int]:
    """Return how many values the snapshot's records have in one channel, by field and number of channels."""
    counts: dict[tuple[str, int], int] = {}
    for commit in snapshot.commits():
        for records in commit.units.values():
            for field, rows in records.placements.items():
                if not has_channels(snapshot.fields[field]):
                    continue
                for number, num_items in zip(*np.unique(rows[:, 0], return_counts=True), strict=True):
                    num_channels, *shape = commit.arrays[number].layout.item_shape
                    counts[field, num_channels] = counts.get((field, num_channels), 0) + int(num_items) * prod(shape)
    return counts


def _describe_notes(snapshot: Snapshot) -> list[str]:
    """Return the notes on records of the snapshot, with the samples that have them."""
    notes = read_notes(snapshot.root)
    if not notes:
        return []
    noted = [
        f"  {sample.sample_id}  {sample.source}  {unit}: {notes[unit, key]}"
        for sample in snapshot.samples()
        for unit, key in sample.keys.items()
        if (unit, key) in notes
    ]
    rest = [f"  and {len(noted) - MAX_NOTES} more"] if len(noted) > MAX_NOTES else []
    return [f"notes       {len(noted)}", *noted[:MAX_NOTES], *rest] if noted else []


def _describe_snapshot(snapshot: Snapshot) -> list[str]:
    snapshot.check_files()
    buckets = ", ".join(f"{name} ({len(members)})" for name, members in snapshot.bucket_members.items())
    duplicates = snapshot.num_duplicates
    records = ", ".join(
        f"{unit} {count} ({duplicates[unit]} duplicates saved)" for unit, count in snapshot.num_records.items()
    )
    header = snapshot.header
    lines = [
        f"payload     {snapshot.payload_bytes / 1e6:.2f} MB",
        f"snapshot    {snapshot.number}, sealed {header['created']}, family {header.get('family')}, {snapshot.digest}",
        f"samples     {len(snapshot)}",
        f"buckets     {buckets}",
        f"records     {records}",
    ]
    return lines + [f"recipe      {unit} {name}" for unit, name in header.get("units", {}).items()]
