"""A cache on disk: open it, write to it, seal it, read what was sealed."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from cache_store.backends import load_backend
from cache_store.contract import CacheCorrupt, CacheError, CacheNotFound, CacheSchemaError
from cache_store.durable import FolderLock, disk_errors
from cache_store.journal import RecordIndex, read_commits
from cache_store.manifest import SCHEMA, SCRATCH, create_store, read_manifest, recipe_id, write_recipe
from cache_store.snapshot import (
    RESERVED_BUCKET,
    SealedSample,
    Snapshot,
    latest_number,
    publish,
    read_seal,
    refuse_newer_snapshots,
    samples_digest,
    tabulate,
    write_seal,
)
from cache_store.writer import Writer

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from cache_store.object_path import Root
    from cache_store.snapshot import Columns

__all__ = ["RESERVED_BUCKET", "Cache", "SealedSample", "Snapshot", "Writer", "recipe_id", "samples_digest"]


class Cache:
    """A cache folder.

    Attributes:
        root: The folder.
        backend: Name of the file format of its segments.
    """

    def __init__(self, root: Root, backend: str) -> None:
        self.root = root
        self.backend = backend
        self._backend = load_backend(backend)

    @classmethod
    def open(cls, root: Root) -> Cache:
        """Open a cache.

        Raises:
            CacheNotFound: There is none.
            CacheCorrupt: ``store.json`` is damaged.
            CacheSchemaError: It has an unknown backend or a newer schema.
        """
        return cls(root, read_manifest(root))

    @classmethod
    def open_or_new(cls, root: Root, backend: str = "zarr") -> Cache:
        """Open a cache, or prepare one that the first record creates; nothing is written before.

        Raises:
            CacheError: The folder holds something else.
            CacheSchemaError: The cache there has another backend, or a newer schema in ``store.json`` or a snapshot.
        """
        is_cache = (root / "store.json").exists()
        if not is_cache and root.exists():
            if not root.is_dir():
                raise CacheError(f"{root} is a file, not a cache; choose another cache_path")
            with disk_errors(root):
                names = sorted(path.name for path in root.iterdir() if path.name != SCRATCH)
            is_cache = "store.json" in names  # another writer created it just now
            if names and not is_cache:
                raise CacheError(
                    f"{root} is not a cache and not empty: it holds {names[0]!r}; choose another cache_path"
                )
        if is_cache:
            cache = cls.open(root)
            if cache.backend != backend:
                raise CacheSchemaError(
                    f"cache {root} has backend {cache.backend!r}, not {backend!r}; set cache_backend, or choose another"
                    " cache_path"
                )
            with disk_errors(root):
                refuse_newer_snapshots(root)  # before work is done that could not be sealed
            return cache
        return cls(root, backend)

    def writer(self, *, commit_seconds: float = 30.0, segment_bytes: int = 256 << 20) -> Writer:
        """Return a writer, to be used in a ``with`` block.

        Args:
            commit_seconds: A record is committed with the first one that comes this much later.
            segment_bytes: Or when this much is written.
        """
        return Writer(self.root, self._backend, commit_seconds=commit_seconds, segment_bytes=segment_bytes)

    def committed_keys(self) -> dict[str, set[str]]:
        """Return the keys of the records that are whole, by unit."""
        keys: dict[str, set[str]] = {}
        with disk_errors(self.root):
            for commit in read_commits(self.root):
                for unit, records in commit.units.items():
                    keys.setdefault(unit, set()).update(records.keys)
        return keys

    def put_recipe(self, recipe: Mapping[str, Any]) -> str:
        """Store what a unit's records were made by; return its id. Creates the cache."""
        with disk_errors(self.root):
            create_store(self.root, self.backend)
            with self._held():
                return write_recipe(self.root, recipe)

    def seal(
        self, samples: Iterable[SealedSample], header: Mapping[str, Any], *, instead_of: int | None = None
    ) -> Snapshot:
        """Publish a snapshot of these samples, in this order.

        If the newest snapshot lists the same samples and reads the same files, it is returned, whatever its header. If
        its sealer was killed before it had vouched for it, that is done now.

        Args:
            samples: Their records must be committed; of records committed twice the last counts.
            header: JSON values to keep with it: ``family``, and ``units`` with the recipe id of each.
            instead_of: Publish only if this is the newest snapshot still; otherwise return the one that is.

        Raises:
            CacheError: A record is not committed, samples differ in units, or the disk refuses.
        """
        with disk_errors(self.root), self._held():
            columns, digest = tabulate(samples, RecordIndex(read_commits(self.root)))
            create_store(self.root, self.backend)
            while True:
                parent = latest_number(self.root)
                is_overtaken = instead_of is not None and parent != instead_of
                if parent is not None and is_overtaken:
                    return self.snapshot(parent)
                if parent is not None and self._has_columns(parent, columns):
                    if read_seal(self.root, parent) is None:
                        write_seal(self.root, parent)
                    return self.snapshot(parent)
                number = 1 if parent is None else parent + 1
                now = datetime.now(UTC).isoformat(timespec="seconds")
                origin = {"schema": SCHEMA, "digest": digest, "parent": parent, "created": now}
                with contextlib.suppress(FileExistsError):  # another sealer took the number
                    publish(self.root, number, columns, {**header, **origin})
                    return self.snapshot(number)

    def latest(self) -> Snapshot | None:
        """Return the newest snapshot, if any.

        Raises:
            CacheCorrupt: Its file is damaged.
            CacheNotFound: Its file is missing, though it was sealed.
        """
        number = latest_number(self.root)
        return None if number is None else self.snapshot(number)

    def snapshot(self, number: int) -> Snapshot:
        """Return a snapshot by its number.

        Raises:
            CacheNotFound: There is none.
            CacheCorrupt: Its file is damaged.
            CacheSchemaError: A newer version wrote it.
        """
        return Snapshot.open(self.root, self.backend, number)

    def _held(self) -> contextlib.AbstractContextManager[object]:
        """Keep ``collect_garbage`` away while records are looked up and named."""
        return FolderLock(self.root) if self.root.exists() else contextlib.nullcontext()

    def _has_columns(self, number: int, columns: Columns) -> bool:
        try:
            return self.snapshot(number).has_columns(columns)
        except (CacheCorrupt, CacheNotFound):  # sealing again is the cure
            return False
