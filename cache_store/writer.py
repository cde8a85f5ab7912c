"""The writer: streams records into a segment, and commits it whole."""

from __future__ import annotations

import math
import re
import shutil
import time
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cache_store.channels import ChannelMoments, has_channels
from cache_store.contract import CacheError, RecordRefused
from cache_store.durable import FolderLock, disk_errors, publish_folder, scratch_folder
from cache_store.journal import KEY_DIGITS, PLACEMENT_COLUMNS, Journal, encode_array, new_session
from cache_store.manifest import SCRATCH, SEGMENTS, create_store

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path
    from types import TracebackType

    from numpy.typing import NDArray

    from cache_store.contract import Backend, FieldSpec, Placement, SegmentWriter
    from cache_store.object_path import Root

_KEY = re.compile(f"[0-9a-f]{{{KEY_DIGITS}}}")
_NAME = re.compile("[a-z][a-z0-9_]*")
_MAX_OPEN_FILES = 256
_STATS = ("min", "max", "mean", "std")


class Writer:
    """One writer session. Any number of sessions write to a cache at once: each owns its segments and its journal.

    Within the ``with`` block, and from its first record on, no garbage is collected from the cache.

    Leaving the ``with`` block commits what was added, also when an exception leaves it; only a killed process loses its
    open segment. Not for use by several threads.
    """

    def __init__(self, root: Root, backend: Backend, *, commit_seconds: float, segment_bytes: int) -> None:
        self._root = root
        self._backend = backend
        self._commit_seconds = commit_seconds
        self._segment_bytes = segment_bytes
        self._specs: dict[str, tuple[FieldSpec, ...]] = {}
        self._keys: dict[str, set[str]] = {}
        self._lock: FolderLock | None = None
        self._session = ""
        self._num_segments = 0
        self._journal: Journal | None = None
        self._segment: SegmentWriter | None = None
        self._folder: Path | None = None
        self._pending: dict[str, _PendingUnit] = {}
        self._commit_due_s = math.inf

    def __enter__(self) -> Self:
        with disk_errors(self._root):
            if self._root.exists():
                self._hold()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.commit()
        except CacheError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self._close_journal()
            if self._lock is not None:
                self._lock.close()
                self._lock = None

    def add(
        self,
        unit: str,
        key: str,
        fields: Mapping[str, NDArray[Any]],
        specs: Sequence[FieldSpec],
        *,
        label: str = "",
        note: str = "",
    ) -> bool:
        """Add one record.

        Args:
            unit: The encode unit that yielded it.
            key: 32 lowercase hex digits.
            fields: One array per spec; bfloat16 as uint16 bit patterns.
            specs: What the unit yields.
            label: The sample it comes from, for messages.
            note: What a person should know of the record, such as that its input was cut; ``read_notes`` returns it.

        Returns:
            False if this writer was given the key before; nothing is stored then.

        Raises:
            RecordRefused: A NaN, an Inf, or not what the specs say.
            CacheError: The disk refuses.
        """
        if not _KEY.fullmatch(key):
            raise ValueError(f"key {key!r} of unit {unit!r} is not {KEY_DIGITS} lowercase hex digits")
        self._check_specs(unit, tuple(specs))
        if key in self._keys.setdefault(unit, set()):
            return False
        subject = f"{unit} of {label or key}"
        if fields.keys() != {spec.name for spec in specs}:
            raise RecordRefused(f"{subject}: fields {sorted(fields)} are not {sorted(spec.name for spec in specs)}")
        stats = [_check_item(subject, spec, fields[spec.name]) for spec in specs]
        moments = {
            spec.name: ChannelMoments.of(_values_of(spec, fields[spec.name])) for spec in specs if has_channels(spec)
        }
        try:
            with disk_errors(self._root):
                placements = self._open_segment().append(unit, key, fields, specs)
        except BaseException:
            self._discard_segment()
            raise
        self._keys[unit].add(key)
        pending = self._pending.setdefault(unit, _PendingUnit())
        pending.add(key, specs, placements, stats)
        pending.add_moments(moments)
        if note:
            pending.notes[key] = note
        if self._is_commit_due():
            self.commit()
        return True

    def commit(self) -> None:
        """Make all records added so far durable and visible; without any, do nothing.

        Raises:
            CacheError: The disk refuses; the records since the last commit are lost and may be added again.
        """
        if self._segment is None:
            return
        segment_id = self._segment_id()
        try:
            with disk_errors(self._root):
                arrays, files = self._segment.finish()
                assert self._folder is not None
                publish_folder(self._folder, self._root / SEGMENTS / segment_id)
                if self._journal is None:
                    self._journal = Journal(self._root, self._session)
                self._journal.append(
                    {
                        "segment": segment_id,
                        "backend": self._backend.name,
                        "arrays": [encode_array(array) for array in arrays],
                        "files": files,
                        "units": {unit: pending.encode() for unit, pending in self._pending.items()},
                    }
                )
            self._segment = None
            self._pending = {}
            self._num_segments += 1
        except BaseException:
            self._discard_segment()
            raise

    def _check_specs(self, unit: str, specs: tuple[FieldSpec, ...]) -> None:
        """Raise ValueError unless the unit's specs are the same for all records and their names its own."""
        if unit in self._specs:
            if self._specs[unit] != specs:
                raise ValueError(f"unit {unit!r} was declared as {self._specs[unit]}, now as {specs}")
            return
        if not _NAME.fullmatch(unit):
            raise ValueError(f"unit {unit!r} is not lower-case letters, digits and _")
        names = [spec.name for spec in specs]
        taken = {spec.name for others in self._specs.values() for spec in others}
        for name in names:
            if not _NAME.fullmatch(name) or name in taken or names.count(name) > 1:
                raise ValueError(f"field {name!r} of unit {unit!r}: taken, or not lower-case letters, digits and _")
        self._specs[unit] = specs

    def _open_segment(self) -> SegmentWriter:
        if self._segment is None:
            create_store(self._root, self._backend.name)
            self._hold()
            self._session = self._session or new_session(self._root)
            self._folder = scratch_folder(self._root / SCRATCH, self._segment_id())
            self._segment = self._backend.open_segment(self._folder)
            self._commit_due_s = time.monotonic() + self._commit_seconds
        return self._segment

    def _hold(self) -> None:
        """Keep ``collect_garbage`` and ``repair`` away from what this writer may need."""
        if self._lock is None:
            self._lock = FolderLock(self._root)

    def _is_commit_due(self) -> bool:
        assert self._segment is not None
        return (
            self._segment.num_bytes >= self._segment_bytes
            or self._segment.num_open_files >= _MAX_OPEN_FILES
            or time.monotonic() >= self._commit_due_s
        )

    def _segment_id(self) -> str:
        return f"{self._session}-{self._num_segments:06d}"

    def _discard_segment(self) -> None:
        """Forget the open segment and its records; begin a new session, as the journal may end in half a line."""
        if self._segment is not None:
            self._segment.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
        for unit, pending in self._pending.items():
            self._keys[unit].difference_update(pending.keys)
        self._segment = None
        self._pending = {}
        self._close_journal()
        self._session = ""
        self._num_segments = 0

    def _close_journal(self) -> None:
        if self._journal is not None:
            self._journal.close()
            self._journal = None


class _PendingUnit:
    """The records of one unit in the open segment, as columns."""

    def __init__(self) -> None:
        self.keys: list[str] = []
        self.notes: dict[str, str] = {}
        self._columns: dict[str, dict[str, list[float]]] = {}
        self._moments: dict[tuple[str, int], ChannelMoments] = {}

    def add(
        self, key: str, specs: Sequence[FieldSpec], placements: Sequence[Placement], stats: Sequence[tuple[float, ...]]
    ) -> None:
        """Add one record."""
        self.keys.append(key)
        for spec, placement, numbers in zip(specs, placements, stats, strict=True):
            names = (*PLACEMENT_COLUMNS, *_STATS)
            columns = self._columns.setdefault(spec.name, {name: [] for name in names})
            for name, value in zip(names, (*placement, *numbers), strict=True):
                columns[name].append(value)

    def add_moments(self, moments: Mapping[str, ChannelMoments]) -> None:
        """Add the moments of one record's fields to those of the records with as many channels."""
        for name, found in moments.items():
            group = name, len(found.sums)
            self._moments[group] = found if group not in self._moments else self._moments[group].plus(found)

    def encode(self) -> dict[str, Any]:
        """Return the columns as JSON values; moments and notes only where there are any."""
        values: dict[str, Any] = {"keys": "".join(self.keys), "fields": self._columns}
        if self._moments:
            values["channels"] = [{"field": name, **found.encode()} for (name, _), found in self._moments.items()]
        if self.notes:
            values["notes"] = self.notes
        return values


def _values_of(spec: FieldSpec, item: NDArray[Any]) -> NDArray[Any]:
    return (item.astype(np.uint32) << 16).view(np.float32) if spec.dtype == "bfloat16" else item


def _check_item(subject: str, spec: FieldSpec, item: NDArray[Any]) -> tuple[float, ...]:
    """Return min, max, mean and standard deviation of an item that may be stored, to four digits."""
    if item.dtype != np.dtype(spec.storage_dtype):
        raise RecordRefused(f"{subject}: {spec.name} is {item.dtype}, not {spec.storage_dtype} for {spec.dtype}")
    if item.ndim != len(spec.dims) or (spec.ragged and item.ndim != 2):
        raise RecordRefused(f"{subject}: {spec.name} has shape {item.shape}, not {spec.dims}")
    if item.size == 0:
        raise RecordRefused(f"{subject}: {spec.name} is empty: shape {item.shape}")
    values = _values_of(spec, item)
    with np.errstate(invalid="ignore"):
        low, high = float(values.min()), float(values.max())
    if not (math.isfinite(low) and math.isfinite(high)):
        num_bad = values.size - int(np.isfinite(values).sum())
        raise RecordRefused(
            f"{subject}: {num_bad} of {values.size} values of {spec.name} are NaN or Inf;"
            " check the encoder's weights and dtype, or remove the sample"
        )
    stats = (low, high, float(values.mean(dtype=np.float64)), float(values.std(dtype=np.float64)))
    return tuple(float(f"{value:.4g}") for value in stats)
