"""Writes that survive a crash: data reaches the disk before the name that publishes it."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import os
import secrets
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from awscrt.checksums import crc32c

from cache_store.contract import CacheError
from cache_store.object_path import ObjectPath

if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

    from cache_store.object_path import Root

NUM_REQUESTS = 32
"""How many requests are in flight to an object store."""

_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def disk_errors(root: Root) -> Iterator[None]:
    """Turn an OSError into a CacheError that names the cache.

    Raises:
        CacheError: The disk is full, read-only, not permitted or broken.
    """
    try:
        yield
    except CacheError:
        raise
    except OSError as error:
        raise CacheError(f"cache {root}: {error}; check permissions and free space, then run again") from error


def fsync_folder(folder: Root) -> None:
    """Make the names in a folder durable; in an object store they are."""
    if isinstance(folder, ObjectPath):
        return
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def fsync_tree(folder: Path) -> None:
    """Make all files below a folder durable, and their names."""
    for path in folder.rglob("*"):
        if path.is_dir():
            fsync_folder(path)
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
    fsync_folder(folder)


class FolderLock:
    """A kernel lock on a folder, let go of when it is closed or its process ends, however it ends.

    It is shared at first, and waits for an exclusive one to end. Locks bind the processes of one machine. In an object
    store there are none: whoever needs to be alone never is.
    """

    _fd = -1

    def __init__(self, folder: Root) -> None:
        if isinstance(folder, Path):
            self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.share()

    def share(self) -> None:
        """Let others share the folder, if they may not."""
        if self._fd >= 0:
            fcntl.flock(self._fd, fcntl.LOCK_SH)

    def try_exclude(self) -> bool:
        """Take the folder for this lock alone; False if another one shares it. Either way, hold at least a share."""
        if self._fd < 0:
            return False
        try:
            fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            # the kernel gives up a shared lock before it tries for an exclusive one
            self.share()
            return False
        return True

    def close(self) -> None:
        """Let go of the folder."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


class NewFile:
    """A file written from front to back, with the crc32c of what it holds.

    Unbuffered: an error belongs to the write that met it, and closing writes nothing.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("xb", buffering=0)
        self.num_bytes = 0
        self.crc = 0

    def write(self, data: bytes | NDArray[np.uint8]) -> None:
        """Append bytes."""
        rest = memoryview(data) if isinstance(data, bytes) else data.data
        while rest:
            rest = rest[os.write(self._file.fileno(), rest) :]
        self.crc = crc32c(data, self.crc)
        self.num_bytes += len(data)

    def sync(self) -> None:
        """Make it durable; its name is left to the caller."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close it."""
        self._file.close()


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and fsync it; its folder is left to the caller."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def file_checksum(path: Root) -> int:
    """Return the crc32c of a file's bytes."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = crc32c(block, checksum)
    return checksum


def replace_file(path: Root, data: bytes, scratch: Root) -> None:
    """Publish a file whole under its name, by way of a file in the folder ``scratch`` on the same filesystem."""
    if isinstance(path, ObjectPath):
        path.put(data)
        return
    assert isinstance(scratch, Path)
    unfinished = scratch / f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    write_file(unfinished, data)
    unfinished.replace(path)
    fsync_folder(path.parent)


def scratch_folder(scratch: Root, name: str) -> Path:
    """Make a new folder for what is unfinished: in a cache's own scratch folder, or near its writer if it is remote."""
    folder = (_local_scratch() if isinstance(scratch, ObjectPath) else scratch) / name
    folder.mkdir()
    return folder


def _local_scratch() -> Path:
    """Return this process's own folder on this machine's disk, for parts of caches in object stores."""
    folder, _ = _lock_scratch(Path(tempfile.gettempdir()) / f"diffsynth-pipe-{os.getuid()}")
    return folder


@functools.cache
def _lock_scratch(base: Path) -> tuple[Path, FolderLock]:
    """Delete the folders of processes that ended; make one that is locked while this process lives."""
    base.mkdir(mode=0o700, exist_ok=True)
    if base.is_symlink() or base.stat().st_uid != os.getuid():
        raise CacheError(f"{base} belongs to another user; set TMPDIR to a folder of your own")
    for folder in base.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError), FolderLock(folder) as abandoned:
            if abandoned.try_exclude():
                shutil.rmtree(folder, ignore_errors=True)
    while True:
        own = Path(tempfile.mkdtemp(dir=base))
        with contextlib.suppress(FileNotFoundError):  # another process took it for abandoned before it was locked
            lock = FolderLock(own)
            if own.exists():
                return own, lock


def publish_folder(unfinished: Path, published: Root) -> None:
    """Give a finished folder its name. Of an upload that was broken off some files may be there."""
    if isinstance(published, ObjectPath):
        files = [path for path in unfinished.rglob("*") if path.is_file()]
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            list(pool.map(lambda path: (published / str(path.relative_to(unfinished))).put(path), files))
        shutil.rmtree(unfinished)
        return
    unfinished.rename(published)
    fsync_folder(published.parent)


def publish_new_file(unfinished: Path, path: Root) -> None:
    """Give a finished file its name, unless another one bears it.

    Raises:
        FileExistsError: It is taken; what is there stays as it is.
    """
    if isinstance(path, ObjectPath):
        path.put(unfinished, create=True)
        return
    # unlike a rename, a link never replaces what is there
    path.hardlink_to(unfinished)
    fsync_folder(path.parent)


@contextlib.contextmanager
def local_folder(folder: Root) -> Iterator[Path]:
    """Yield a folder as one on this machine: itself, or a copy for the time being."""
    if isinstance(folder, Path):
        yield folder
        return
    with tempfile.TemporaryDirectory(dir=_local_scratch()) as copy:
        with ThreadPoolExecutor(NUM_REQUESTS) as pool:
            list(pool.map(lambda name: (folder / name).download(Path(copy) / name), folder.sizes()))
        yield Path(copy)


def read_files(folder: Root, pattern: str) -> list[tuple[str, bytes]]:
    """Return name and bytes of the files right in a folder whose names fit a pattern, in order of names.

    One that is deleted meanwhile is left out: ``cache info`` needs no lock to look at a cache that is cleaned.
    """

    def read(path: Root) -> list[tuple[str, bytes]]:
        try:
            return [(path.name, path.read_bytes())]
        except FileNotFoundError:
            return []

    found: Iterator[Root] = folder.glob(pattern)
    paths = sorted(found, key=lambda path: path.name)
    if isinstance(folder, Path):
        return list(chain.from_iterable(map(read, paths)))
    with ThreadPoolExecutor(NUM_REQUESTS) as pool:
        return list(chain.from_iterable(pool.map(read, paths)))


def file_sizes(folder: Root) -> dict[str, int]:
    """Return the bytes of all files below a folder by relative path."""
    if isinstance(folder, ObjectPath):
        return folder.sizes()
    sizes = {}
    for parent, _, names in os.walk(folder, followlinks=True):
        for name in names:
            path = os.path.join(parent, name)  # noqa: PTH118 - a Path for each of a million files takes seconds
            with contextlib.suppress(FileNotFoundError):  # another process may be deleting it
                sizes[os.path.relpath(path, folder)] = os.stat(path).st_size  # noqa: PTH116
    return sizes


def move_aside(path: Path) -> None:
    """Free a name without losing what bears it: ``metrics.jsonl`` becomes ``metrics.1.jsonl``, or the next free one."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
