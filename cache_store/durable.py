"""Writes that survive a crash: data reaches the disk before the name that publishes it."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
from typing import TYPE_CHECKING

import google_crc32c

from cache_store.contract import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path
    from typing import Self

    import numpy as np
    from numpy.typing import NDArray

_BLOCK_BYTES = 1 << 20


@contextlib.contextmanager
def disk_errors(root: Path) -> Iterator[None]:
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


def fsync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class FolderLock:
    """A kernel lock on a folder, let go of when it is closed or its process ends, however it ends.

    It is shared at first, and waits for an exclusive one to end. Locks bind the processes of one machine.
    """

    _fd = -1

    def __init__(self, folder: Path) -> None:
        self._fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        self.share()

    def share(self) -> None:
        """Let others share the folder, if they may not."""
        fcntl.flock(self._fd, fcntl.LOCK_SH)

    def try_exclude(self) -> bool:
        """Take the folder for this lock alone; False if another one shares it. Either way, hold at least a share."""
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
        self.crc = google_crc32c.extend(self.crc, data)
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


def file_checksum(path: Path) -> int:
    """Return the crc32c of a file's bytes."""
    checksum = 0
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK_BYTES):
            checksum = google_crc32c.extend(checksum, block)
    return checksum


def replace_file(path: Path, data: bytes, scratch: Path) -> None:
    """Publish a file whole under its name, by way of a file in the folder ``scratch`` on the same filesystem."""
    unfinished = scratch / f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}"
    write_file(unfinished, data)
    unfinished.replace(path)
    fsync_folder(path.parent)


def move_aside(path: Path) -> None:
    """Free a name without losing what bears it: ``metrics.jsonl`` becomes ``metrics.1.jsonl``, or the next free one."""
    if not path.exists():
        return
    number = 1
    while (aside := path.with_name(f"{path.stem}.{number}{path.suffix}")).exists():
        number += 1
    path.rename(aside)
