"""The reader: whole batches, straight from disk into reused buffers, every byte checked.

An item is read in pieces by ``preadv``: its chunks land side by side in the batch where they belong, the checksums
between them nowhere, and each piece is checked in place while the processor's cache still holds it.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Self

import numpy as np
from awscrt.checksums import crc32c

from cache_store.backends import load_backend
from cache_store.contract import CHECKSUM_BYTES, CacheCorrupt, CacheError
from cache_store.object_path import ObjectPath

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from numpy.typing import NDArray

    from cache_store.local_copies import LocalCopies
    from cache_store.snapshot import Snapshot

    Bytes = NDArray[np.uint8]

_IOV_MAX = 1024
_PIECE_BYTES = 1 << 19
_IGNORED = memoryview(bytearray(CHECKSUM_BYTES))
"""Where the checksums between chunks go: an item is checked as a whole, against the digest in the snapshot."""
_MAX_OPEN_FILES = 256
_NUM_ATTEMPTS = 2


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Samples of one bucket, in storage dtypes. Its arrays are views of the buffers they were read into.

    Attributes:
        fields: ``[batch, *shape]``; a ragged field ``[batch, longest, width]``, zeros behind each item.
        lengths: The rows of each item of a ragged field, int64 ``[batch]``.
        positions: The samples' positions in the snapshot.
        sample_ids: The samples' ids.
    """

    fields: dict[str, NDArray[Any]]
    lengths: dict[str, NDArray[np.int64]]
    positions: NDArray[np.int64]
    sample_ids: tuple[str, ...]


def whole_pages(num_bytes: int) -> Bytes:
    """Return this much memory, uint8, from the start of a page on.

    A kernel's copy into an address a few bytes further into its page than the source is in its own takes several times
    as long on common processors, and numpy's large arrays start 16 bytes into a page.
    """
    memory = np.empty(num_bytes + mmap.PAGESIZE, np.uint8)
    start = -memory.ctypes.data % mmap.PAGESIZE
    return memory[start : start + num_bytes]


class Buffers:
    """Memory for one batch, by field; grows and is used again.

    Args:
        allocate: Returns this many bytes, uint8: pinned memory, say.
    """

    def __init__(self, allocate: Callable[[int], Bytes]) -> None:
        self._allocate = allocate
        self._memory: dict[str, Bytes] = {}

    def take(self, field: str, num_bytes: int) -> Bytes:
        """Return memory for a field of the next batch; what it holds is left from an earlier one."""
        memory = self._memory.get(field)
        if memory is None or memory.nbytes < num_bytes:
            slack = 0 if memory is None else memory.nbytes // 4
            memory = self._memory[field] = self._allocate(num_bytes + slack)
        return memory[:num_bytes]


class _File:
    """An open file that closes when its last user lets go of it, so that no reader ever holds a recycled number."""

    __slots__ = ("fd",)

    def __init__(self, fd: int) -> None:
        self.fd = fd

    def __del__(self) -> None:
        os.close(self.fd)


@dataclass(slots=True)
class _Item:
    """One item to be read.

    Attributes:
        field: Its field.
        position: Its sample.
        array: Number of its array.
        offset: Byte at which it starts.
        chunk_bytes: Bytes of each chunk, without its checksum.
        body: Where it goes.
        digest: The crc32c that it must have.
    """

    field: str
    position: int
    array: int
    offset: int
    chunk_bytes: int
    body: memoryview
    digest: int

    @property
    def num_bytes(self) -> int:
        """Bytes in the file from its first to its last, with the checksums between its chunks."""
        return len(self.body) + max(0, len(self.body) - 1) // self.chunk_bytes * CHECKSUM_BYTES

    def fill(self, read: Callable[[list[memoryview], int, int], bool]) -> bool:
        """Read it piece by piece, and check each while the processor's cache holds it.

        Args:
            read: Fills views with this many bytes from an offset on, and tells whether there were so many.

        Returns:
            Whether it is what was written.

        Raises:
            EOFError: It is cut short.
        """
        body, chunk_bytes = self.body, self.chunk_bytes
        piece_bytes = _PIECE_BYTES // chunk_bytes * chunk_bytes or _PIECE_BYTES
        checksum = 0
        for start in range(0, len(body), piece_bytes):
            end = min(start + piece_bytes, len(body))
            next_chunk = start - start % chunk_bytes + chunk_bytes
            until_end = body[:end]
            views = [until_end[start:next_chunk]]
            for chunk in range(next_chunk, end, chunk_bytes):
                views += (_IGNORED, until_end[chunk : chunk + chunk_bytes])
            num_bytes = end - start + len(views) // 2 * CHECKSUM_BYTES
            if not read(views, num_bytes, self.offset + start + start // chunk_bytes * CHECKSUM_BYTES):
                raise EOFError
            checksum = crc32c(body[start:end], checksum)
        return checksum == self.digest


class BatchReader:
    """Reads batches of a snapshot. Safe to share between threads, and to use on both sides of a fork.

    Args:
        snapshot: What to read from.
        fields: Which fields to read; of other fields no byte is touched.
        num_threads: Read the items of one batch in parallel, for storage with latency; 0 reads them in turn.
        allocate: Where batches get their memory, see ``Buffers``.
        copies: What was read before of a cache in an object store.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        fields: Sequence[str],
        *,
        num_threads: int = 0,
        allocate: Callable[[int], Bytes] | None = None,
        copies: LocalCopies | None = None,
    ) -> None:
        for name in fields:
            if name not in snapshot.fields:
                raise CacheError(f"{snapshot.path} has no field {name!r}, only {', '.join(snapshot.fields)}")
        self.snapshot = snapshot
        self.fields = tuple(fields)
        self._num_threads = num_threads
        self._allocate = allocate or whole_pages
        self._backend = load_backend(snapshot.backend)
        self._copies = copies
        self._checked: set[int] = set()
        self._start_process()

    def buffers(self) -> Buffers:
        """Return new memory for one batch."""
        return Buffers(self._allocate)

    def read(
        self,
        positions: Sequence[int] | NDArray[np.int64],
        buffers: Buffers | None = None,
        instead: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> RawBatch:
        """Read one batch.

        Args:
            positions: Samples of one bucket.
            buffers: Memory to read into, which overwrites the batch read into it before; None takes new memory.
            instead: Fields that are read of other samples, of any bucket: their positions in the place of these.

        Raises:
            ValueError: No positions, or of several buckets.
            CacheCorrupt: Bytes are missing or wrong; names the sample.
        """
        if os.getpid() != self._pid:
            self._start_process()
        snapshot = self.snapshot
        where = np.asarray(positions, np.int64)
        if where.size == 0 or (snapshot.buckets[where] != snapshot.buckets[where[0]]).any():
            raise ValueError(f"a batch takes samples of one bucket, not positions {where.tolist()}")
        buffers = buffers or self.buffers()
        arrays, lengths, items = {}, {}, []
        for name in self.fields:
            sources = where if instead is None else instead.get(name, where)
            arrays[name], lengths_of_items, items_of_field = self._lay_out(name, sources, buffers)
            items += items_of_field
            if snapshot.fields[name].ragged:
                lengths[name] = lengths_of_items
        if self._pool is None:
            for item in items:
                self._load(item)
        else:
            list(self._pool.map(self._load, items))
        ids = tuple(snapshot.sample_id(position) for position in where.tolist())
        return RawBatch(arrays, lengths, where, ids)

    def close(self) -> None:
        """Close files and stop threads."""
        with self._lock:
            self._files.clear()
        if self._pool is not None:
            self._pool.shutdown()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start_process(self) -> None:
        """Begin with no open file, lock or thread that a fork may have left in the middle of something."""
        self._lock = threading.Lock()
        self._files: OrderedDict[int, _File] = OrderedDict()
        self._pool = ThreadPoolExecutor(self._num_threads) if self._num_threads else None
        self._pid = os.getpid()

    def _lay_out(
        self, field: str, positions: NDArray[np.int64], buffers: Buffers
    ) -> tuple[NDArray[Any], NDArray[np.int64], list[_Item]]:
        """Give each item its place in the batch: the array to return, the items' rows, what to read."""
        snapshot = self.snapshot
        placements = snapshot.placements(field, positions)
        num_rows = placements[:, 2]
        longest = int(num_rows.max())
        first = snapshot.arrays[placements[0, 0]].layout
        row_bytes = first.row_bytes
        slots = buffers.take(field, len(positions) * longest * row_bytes).reshape(len(positions), -1)
        items = []
        for position, slot, placement in zip(positions.tolist(), slots, placements.tolist(), strict=True):
            array, start, rows, digest = placement
            layout = snapshot.arrays[array].layout
            if layout.item_shape != first.item_shape:
                raise CacheError(
                    f"{field} of sample {snapshot.sample_id(position)} ({snapshot.source(position)}) has shape"
                    f" {layout.item_shape}, others of its bucket have {first.item_shape}; encode into a new cache_path"
                )
            used, chunk_bytes = rows * row_bytes, layout.chunk_bytes(rows)
            if used < slot.nbytes:
                slot[used:] = 0
            offset = self._backend.offset(layout, start)
            items.append(_Item(field, position, array, offset, chunk_bytes, slot.data[:used], digest))
        values = slots.reshape(-1).view(first.spec.storage_dtype)
        rows_shape = (longest,) if first.spec.ragged else ()
        return values.reshape(len(positions), *rows_shape, *first.item_shape), num_rows, items

    def _load(self, item: _Item) -> None:
        if isinstance(self.snapshot.root, ObjectPath):
            self._fetch(item)
            return
        file = self._open(item)
        for _ in range(_NUM_ATTEMPTS):
            try:
                if item.fill(partial(_read_scattered, file.fd)):
                    return
            except OSError as error:
                raise self._corrupt(item, f"cannot be read: {error.strerror}") from error
            except EOFError:
                raise self._corrupt(item, "is cut short") from None
        raise self._corrupt(item, "fails its checksum")

    def _fetch(self, item: _Item) -> None:
        """Read an item from its copy on this machine, or else from the object store."""
        path = self.snapshot.array_path(item.array)
        assert isinstance(path, ObjectPath)
        copy = self._open_copy(item) if self._copies is not None else None
        if copy is not None:
            with suppress(EOFError):
                if item.fill(partial(_read_scattered, copy.fd)):
                    return
        for _ in range(_NUM_ATTEMPTS):
            try:
                data = path.read_range(item.offset, item.num_bytes)
            except FileNotFoundError:
                raise self._corrupt(item, "is in a file that is missing") from None
            if len(data) < item.num_bytes:
                raise self._corrupt(item, "is cut short")
            if item.fill(partial(_scatter, data, item.offset)):
                if self._copies is not None and copy is not None:
                    self._copies.keep(copy.fd, item.offset, data)
                return
        raise self._corrupt(item, "fails its checksum")

    def _open_copy(self, item: _Item) -> _File:
        assert self._copies is not None
        number = item.array
        with self._lock:
            file = self._files.get(number)
            if file is None:
                snapshot = self.snapshot
                segment = snapshot.segments[int(snapshot.array_segments[number])]
                name, num_bytes = snapshot.arrays[number].layout.file, int(snapshot.array_bytes[number])
                file = self._remember(number, _File(self._copies.open(segment, name, num_bytes)))
            self._files.move_to_end(number)
            return file

    def _remember(self, number: int, file: _File) -> _File:
        """Keep a file open; the lock is held."""
        self._files[number] = file
        if len(self._files) > _MAX_OPEN_FILES:
            self._files.popitem(last=False)
        return file

    def _open(self, item: _Item) -> _File:
        """Return the open file of an item; check it at its first use in this process."""
        number = item.array
        with self._lock:
            file = self._files.get(number)
            if file is not None:
                self._files.move_to_end(number)
                return file
        path = self.snapshot.array_path(number)
        assert isinstance(path, Path)
        try:
            file = _File(os.open(path, os.O_RDONLY | os.O_CLOEXEC))
            num_bytes = os.fstat(file.fd).st_size
            if num_bytes != self.snapshot.array_bytes[number]:
                raise self._corrupt(item, f"is in a file of {num_bytes} bytes, not {self.snapshot.array_bytes[number]}")
            if number not in self._checked and not self._backend.is_intact(file.fd, self.snapshot.arrays[number]):
                raise self._corrupt(item, "is in a file with a damaged index")
        except (FileNotFoundError, NotADirectoryError):
            raise self._corrupt(item, "is in a file that is missing") from None
        except OSError as error:
            raise CacheError(f"{path} cannot be read: {error.strerror}") from error
        self._checked.add(number)
        with self._lock:
            return self._remember(number, file)

    def _corrupt(self, item: _Item, problem: str) -> CacheCorrupt:
        snapshot = self.snapshot
        return CacheCorrupt(
            f"{snapshot.array_path(item.array)}: {item.field} of sample {snapshot.sample_id(item.position)}"
            f" ({snapshot.source(item.position)}) {problem};"
            f" run `diffsynth-pipe cache repair {snapshot.root}`"
        )


def _read_scattered(fd: int, views: list[Any], num_bytes: int, offset: int) -> bool:
    """Fill all views, ``num_bytes`` in sum, with what stands from ``offset`` on; False if the file ends before."""
    while views:
        num_read = os.preadv(fd, views[:_IOV_MAX], offset)
        if num_read == 0:
            return False
        if num_read == num_bytes:
            break
        offset += num_read
        num_bytes -= num_read
        num_filled = 0
        while num_filled < len(views) and num_read >= views[num_filled].nbytes:
            num_read -= views[num_filled].nbytes
            num_filled += 1
        views = views[num_filled:]
        if num_read:
            views[0] = views[0][num_read:]
    return True


def _scatter(data: memoryview, origin: int, views: list[memoryview], num_bytes: int, offset: int) -> bool:
    """Fill all views as ``_read_scattered`` does, from ``data``, which starts at the offset ``origin``."""
    start = offset - origin
    for view in views:
        view[:] = data[start : start + view.nbytes]
        start += view.nbytes
    return start - (offset - origin) == num_bytes


class Prefetcher:
    """Iterates over ``(tag, batch)`` in order, and reads ahead into a ring of buffers; whoever has to wait reads too.

    The arrays of a batch are valid until the next one is asked for. An error of the reader, or of what names the
    batches, is raised in place of the batch that it befell, and ends the iteration.

    Args:
        reader: What reads.
        batches: The tag and the positions of each batch, and what its reader is to read instead, if anything; consumed
            at most ``depth`` ahead, by any thread, one at a time.
        depth: How many batches to read ahead; more are asked for when half of them are used up.
        num_threads: How many threads read ahead.
        finish: Makes of a tag and a batch what is yielded in its place; called by whoever read it.
    """

    def __init__(
        self,
        reader: BatchReader,
        batches: Iterable[tuple[Any, ...]],
        *,
        depth: int = 4,
        num_threads: int = 1,
        finish: Callable[[Any, RawBatch], Any] | None = None,
    ) -> None:
        self._reader = reader
        self._batches = iter(batches)
        self._finish = finish
        self._depth = depth
        self._lock = threading.Lock()
        self._num_taken = self._num_given = 0
        self._is_exhausted = self._is_closed = False
        self._free: SimpleQueue[Buffers | None] = SimpleQueue()
        for _ in range(depth):
            self._free.put(reader.buffers())
        self._used = [reader.buffers()]
        self._read_batches: SimpleQueue[tuple[int, tuple[Any, Any] | Exception, Buffers]] = SimpleQueue()
        self._early: dict[int, tuple[tuple[Any, Any] | Exception, Buffers]] = {}
        self._threads = [
            threading.Thread(target=self._read_ahead, name=f"cache-reader-{number}", daemon=True)
            for number in range(num_threads)
        ]
        for thread in self._threads:
            thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> tuple[Any, Any]:
        if self._is_closed:
            raise StopIteration
        while self._num_given not in self._early:
            if self._used and self._read_batches.empty():
                self._read_next(self._used.pop())
            number, read, buffers = self._read_batches.get()
            self._early[number] = read, buffers
        batch, buffers = self._early.pop(self._num_given)
        self._num_given += 1
        # Many at once: a thread that wakes up takes the interpreter from whoever asks for batches.
        if 2 * len(self._used) >= self._depth:
            while self._used:
                self._free.put(self._used.pop())
        if isinstance(batch, Exception):
            self.close()
            raise batch
        self._used.append(buffers)
        return batch

    def close(self) -> None:
        """Stop reading; iteration ends."""
        self._is_exhausted = self._is_closed = True
        for _ in self._threads:
            self._free.put(None)
        for thread in self._threads:
            thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_ahead(self) -> None:
        while (buffers := self._free.get()) is not None:
            self._read_next(buffers)

    def _read_next(self, buffers: Buffers) -> None:
        """Read the next batch that nobody reads yet, if there is one."""
        with self._lock:
            if self._is_exhausted:
                return
            number = self._num_taken
            self._num_taken += 1
            request: tuple[Any, ...] | Exception
            try:
                request = next(self._batches)
            except Exception as error:  # noqa: BLE001 - it belongs to the batch of this number
                request, self._is_exhausted = error, True
        self._read_batches.put((number, self._read(request, buffers), buffers))

    def _read(self, request: tuple[Any, ...] | Exception, buffers: Buffers) -> tuple[Any, Any] | Exception:
        """Return a batch, or the error that takes its place."""
        if isinstance(request, Exception):
            return request
        try:
            tag, positions, *instead = request
            batch = self._reader.read(positions, buffers, *instead)
            return tag, batch if self._finish is None else self._finish(tag, batch)
        except Exception as error:  # noqa: BLE001 - raised where the batch is asked for
            return error
