"""One training at a time per GPU: a kernel lock per device, for all who share this machine's temporary folder.

Held by file descriptor, so it passes to the guard of a run and vanishes with the last process that has it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


DEVICE_ORDER = "PCI_BUS_ID"
"""``CUDA_DEVICE_ORDER`` of the processes that are launched: nvidia-smi's. CUDA's own begins with the fastest GPU."""


def visible_gpus() -> list[str]:
    """Return the UUIDs of the GPUs that ``CUDA_VISIBLE_DEVICES`` leaves to what is launched; none without a driver."""
    query = ["nvidia-smi", "--query-gpu=index,uuid", "--format=csv,noheader"]
    try:
        output = subprocess.run(query, capture_output=True, text=True, check=True, timeout=60).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    uuids = dict(line.split(", ", 1) for line in output.splitlines())
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is None:
        return list(uuids.values())
    names = [name.strip() for name in chosen.split(",") if name.strip() not in ("", "-1", "NoDevFiles")]
    if any(map(str.isdigit, names)) and os.environ.get("CUDA_DEVICE_ORDER", DEVICE_ORDER) != DEVICE_ORDER:
        return list(uuids.values())  # nvidia-smi cannot tell which of them these numbers are
    # CUDA takes the beginning of a UUID too. No GPU twice: who holds it would wait for itself.
    found = [uuids.get(name) or next((u for u in uuids.values() if u.startswith(name)), name) for name in names]
    return list(dict.fromkeys(found))


@contextlib.contextmanager
def hold(gpu: str, run_dir: Path, on_line: Callable[[str], None]) -> Iterator[BinaryIO]:
    """Wait until no other training uses a GPU, then keep it; who has it stands in the lock file."""
    path = Path(tempfile.gettempdir()) / f"diffsynth-pipe-{gpu.replace('/', '-')}.lock"
    # Without O_CREAT first: in a sticky folder the kernel refuses that on another user's file.
    with contextlib.suppress(FileExistsError):
        created = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC)
        os.fchmod(created, 0o666)
        os.close(created)
    with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b") as lock:
        wait_for_lock(lock, f"GPU {gpu}", on_line)
        lock.seek(0)
        lock.truncate()
        lock.write(f"{os.getpid()} ({run_dir})".encode())
        lock.flush()
        yield lock


def wait_for_lock(lock: BinaryIO, what: str, on_line: Callable[[str], None]) -> None:
    """Lock a file; if another process has it, say which, wait for it, and say how long that took."""
    with contextlib.suppress(BlockingIOError):
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    lock.seek(0)
    on_line(f"waiting for {what}, in use by process {lock.read().decode() or 'that just started'}")
    begin = time.monotonic()
    fcntl.flock(lock, fcntl.LOCK_EX)  # a signal that raises ends the wait
    on_line(f"waited {time.monotonic() - begin:.0f} s for {what}")
