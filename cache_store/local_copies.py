"""Parts of remote files on this machine's disk, so that a second epoch need not fetch them again."""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
from typing import TYPE_CHECKING

from blake3 import blake3

from cache_store.durable import disk_errors, file_sizes

if TYPE_CHECKING:
    from collections.abc import Collection
    from pathlib import Path

    from cache_store.object_path import ObjectPath

_BLOCK_BYTES = 512  # of st_blocks, whatever the filesystem's own


class LocalCopies:
    """Copies of a cache's files in which all is a hole that was not read yet.

    What was read stands where it stands in the file. Nothing records what is there: a hole, or a part that a crash
    tore, fails its checksum and is fetched. Once full, it takes no more and gives up nothing: an epoch reads all once
    before it reads any twice, so that the part evicted would always be the next one wanted.

    Args:
        root: The cache.
        folder: Where copies of all caches are.
        max_bytes: What this cache may take on the disk; processes that start to read at once may each take as much.
        segments: Segments that are read; if the disk is over the limit, copies of others are deleted.

    Raises:
        CacheError: The disk refuses the folder.
    """

    def __init__(self, root: ObjectPath, folder: Path, max_bytes: int, segments: Collection[str]) -> None:
        self._folder = folder / blake3(str(root).encode()).hexdigest(length=16)
        with disk_errors(folder):
            self._folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._free_bytes = max_bytes - _disk_bytes(self._folder)
        if self._free_bytes <= 0:
            for path in self._folder.iterdir():
                if path.name not in segments:
                    shutil.rmtree(path, ignore_errors=True)
            self._free_bytes = max_bytes - _disk_bytes(self._folder)

    def open(self, segment: str, name: str, num_bytes: int) -> int:
        """Return a descriptor of the copy of a file of this size, for reading and writing.

        Raises:
            CacheError: The disk refuses.
        """
        path = self._folder / segment / name
        with disk_errors(self._folder):
            path.parent.mkdir(parents=True, exist_ok=True)
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if os.fstat(fd).st_size != num_bytes:
                os.ftruncate(fd, num_bytes)
        return fd

    def keep(self, fd: int, offset: int, data: memoryview) -> None:
        """Write a part that was read to its place, if there is room; without room on the disk, none is left."""
        with self._lock:
            if self._free_bytes < len(data):
                return
            self._free_bytes -= len(data)
        try:
            os.pwrite(fd, data, offset)
        except OSError:
            with self._lock:
                self._free_bytes = 0


def _disk_bytes(folder: Path) -> int:
    num_blocks = 0
    for name in file_sizes(folder):
        with contextlib.suppress(FileNotFoundError):  # another process may be deleting it
            num_blocks += (folder / name).stat().st_blocks
    return num_blocks * _BLOCK_BYTES
