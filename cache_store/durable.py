"""Writes that survive a crash: data reaches the disk before the name that publishes it."""

from __future__ import annotations

import contextlib
import os
import secrets
from typing import TYPE_CHECKING

from cache_store.contract import CacheError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


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


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and fsync it; its folder is left to the caller."""
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
