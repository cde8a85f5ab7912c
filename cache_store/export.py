"""Copy what the newest snapshot of a cache names into a new cache, whose segments may be of another format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cache_store.contract import CacheCorrupt, CacheError, CacheNotFound
from cache_store.durable import disk_errors, local_folder
from cache_store.journal import read_notes
from cache_store.manifest import RECIPES, SEGMENTS, read_manifest, read_recipe
from cache_store.store import Cache
from cache_store.verify import read_record, records_of

if TYPE_CHECKING:
    from cache_store.object_path import Root
    from cache_store.snapshot import Snapshot
    from cache_store.writer import Writer


@dataclass(frozen=True, slots=True)
class Export:
    """What an export did.

    Attributes:
        snapshot: The newest snapshot of the target.
        was_complete: The target held it before; nothing was changed.
        num_copied: Records that were written; the others were there.
    """

    snapshot: Snapshot
    was_complete: bool
    num_copied: int


def export(source: Root, target: Root, backend: str, *, segment_bytes: int = 256 << 20) -> Export:
    """Copy the records and recipes of a cache's newest snapshot into a new cache, and seal its samples there.

    Samples, keys and their order stay, so both snapshots have one digest. What an interrupted export left in the target
    is not copied again.

    Args:
        source: The cache; only read.
        target: A folder that is not there, is empty, or holds an export of this snapshot, whole or in part.
        backend: The format of the target's segments.
        segment_bytes: What a segment of the target should have.

    Raises:
        CacheNotFound: The source is no cache, or has no snapshot.
        CacheCorrupt: A record or a recipe of the source is damaged; what was copied before stays committed.
        CacheError: The target holds something else, or the disk refuses.
    """
    snapshot = Cache.open(source).latest()
    if snapshot is None:
        raise CacheNotFound(f"{source} has no snapshot to export; run data-process to its end first")
    cache = _open_target(source, target, backend)
    there = _target_snapshot(cache)
    if there is not None:
        if there.digest != snapshot.digest:
            raise CacheError(f"{target} is a cache of other samples than those of {source}; name a new folder")
        if _is_whole(there):
            return Export(there, was_complete=True, num_copied=0)
    with disk_errors(source):
        recipes = _read_recipes(snapshot)
    with cache.writer(segment_bytes=segment_bytes) as writer:
        num_copied = _copy_missing(snapshot, cache, writer)
    for recipe in recipes:
        cache.put_recipe(recipe)
    return Export(cache.seal(snapshot.samples(), snapshot.header), was_complete=False, num_copied=num_copied)


def _open_target(source: Root, target: Root, backend: str) -> Cache:
    if f"{target.resolve()}/".startswith(f"{source.resolve()}/"):
        raise CacheError(f"{target} is or lies in the cache that is exported; name a new folder")
    if (target / "store.json").exists() and (found := read_manifest(target)) != backend:
        raise CacheError(f"{target} is a cache with backend {found!r}, not {backend!r}; name a new folder")
    return Cache.open_or_new(target, backend)


def _target_snapshot(cache: Cache) -> Snapshot | None:
    """Return the newest snapshot of the target; None also if it is damaged, which sealing again cures."""
    try:
        return cache.latest()
    except (CacheCorrupt, CacheNotFound):
        return None


def _is_whole(snapshot: Snapshot) -> bool:
    try:
        snapshot.check_files()
    except CacheCorrupt:
        return False
    return True


def _read_recipes(snapshot: Snapshot) -> list[dict[str, Any]]:
    recipes = []
    for name in snapshot.header.get("units", {}).values():
        recipe = read_recipe(snapshot.root, name)
        if recipe is None:
            raise CacheCorrupt(
                f"{snapshot.root / RECIPES / name}.json is missing or damaged;"
                f" run `diffsynth-pipe cache repair {snapshot.root} RUN.yaml`"
            )
        recipes.append(recipe)
    return recipes


def _copy_missing(snapshot: Snapshot, cache: Cache, writer: Writer) -> int:
    """Copy the records that the target lacks; return how many."""
    from tqdm import tqdm

    commits = snapshot.commits()
    # within the writer's block, where no garbage collection takes them away
    committed = cache.committed_keys()
    missing = [commit.without((), committed) for commit in commits]
    num_records = sum(snapshot.num_records.values())
    num_missing = sum(len(records.keys) for commit in missing for records in commit.units.values())
    if num_records - num_missing != sum(map(len, committed.values())):
        raise CacheError(f"{cache.root} holds records that {snapshot.root} does not name; name a new folder")
    notes = read_notes(snapshot.root)
    with tqdm(total=num_records, initial=num_records - num_missing, desc="export", unit="record") as progress:
        for commit in filter(lambda commit: commit.units, missing):
            with local_folder(snapshot.root / SEGMENTS / commit.segment) as folder:
                for unit, key, items in records_of(commit):
                    fields = read_record(folder, snapshot.root, commit, unit, key, items)
                    specs = [layout.spec for layout, _ in items.values()]
                    writer.add(unit, key, fields, specs, note=notes.get((unit, key), ""))
                    progress.update()
    return num_missing
