"""The checkpoints of a run directory: published whole, found again, thinned out. Knows no torch.

::

    step-000072/
      dit_lora.safetensors                                one file per LoRA
      text_encoder/config.json, model.safetensors         one folder per fully trained model
      training_state/weights.safetensors, ..., state.json    only in the newest two, until the run is finished
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import safetensors
from blake3 import blake3

from cache_store.durable import fsync_tree, publish_folder
from diffsynth_pipe.errors import LaunchError, RunDirBusy

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

STATE_FOLDER = "training_state"
STATE_FILE = "state.json"
NUM_STATES = 2
"""Checkpoints that keep the state of the optimizer: the newest, and one to go back to if that is damaged."""

_NAME = re.compile(r"step-(\d{6,})")
_SCRATCH = ".unfinished"
_REPLACED = f"{_SCRATCH}/replaced"
_LOCK = ".training"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One published checkpoint."""

    step: int
    path: Path

    @property
    def state_folder(self) -> Path:
        """Where its training state lies, if it has one."""
        return self.path / STATE_FOLDER

    @property
    def is_resumable(self) -> bool:
        """Whether training can go on from it."""
        return (self.state_folder / STATE_FILE).is_file()

    def read_state(self) -> Mapping[str, Any]:
        """Return what ``state.json`` says.

        Raises:
            LaunchError: It cannot be read.
        """
        try:
            state: dict[str, Any] = json.loads((self.state_folder / STATE_FILE).read_bytes())
        except (OSError, ValueError) as error:
            raise LaunchError(f"{self.state_folder} cannot be read: {error}") from error
        return state

    def verify_state(self) -> None:
        """Read every byte of the training state.

        Raises:
            LaunchError: A file is not what was written.
        """
        try:
            for name, digest in self.read_state()["files"].items():
                if file_digest(self.state_folder / name) != digest:
                    raise LaunchError(f"{self.state_folder / name} is not what was written")
        except (OSError, ValueError, KeyError) as error:
            raise LaunchError(f"{self.state_folder} cannot be read: {error}") from error


def checkpoint_of(run_dir: Path, step: int) -> Checkpoint:
    """Return the checkpoint of a step, published or not."""
    return Checkpoint(step, run_dir / f"step-{step:06d}")


@contextlib.contextmanager
def disk_errors(what: object) -> Iterator[None]:
    """Turn an error of the disk into one line that begins with ``what``.

    Raises:
        LaunchError: The disk is full, read-only, not permitted or broken.
    """
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        raise LaunchError(
            f"{what}: {error}; check permissions and free space, then run the same command again"
        ) from error


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write ``state.json`` beside the files of a training state, with their digests."""
    files = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    (folder / STATE_FILE).write_text(json.dumps({**state, "files": files}, indent=2) + "\n", encoding="utf-8")


@contextlib.contextmanager
def only_training(run_dir: Path) -> Iterator[None]:
    """Keep other processes of this machine from training into a run directory; a killed one lets go of it.

    A checkpoint that was about to be replaced when a run was killed is put back first.

    Raises:
        RunDirBusy: One is at it.
    """
    # A file, opened for writing: NFS locks no other.
    descriptor = os.open(run_dir / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = f"another process trains into {run_dir}: wait for it, or stop it with SIGTERM"
            raise RunDirBusy(message) from None
        for checkpoint in list_checkpoints(run_dir / _REPLACED):  # of a run that was killed between two renames
            if not (run_dir / checkpoint.path.name).exists():
                checkpoint.path.rename(run_dir / checkpoint.path.name)
        yield
    finally:
        os.close(descriptor)


def list_checkpoints(run_dir: Path) -> list[Checkpoint]:
    """Return the checkpoints of a run in order of their steps."""
    found = [(_NAME.fullmatch(path.name), path) for path in run_dir.glob("step-*")]
    return sorted((Checkpoint(int(match[1]), path) for match, path in found if match), key=lambda item: item.step)


def resumable(run_dir: Path) -> list[Checkpoint]:
    """Return the checkpoints from which training can go on, in order of their steps."""
    return [checkpoint for checkpoint in list_checkpoints(run_dir) if checkpoint.is_resumable]


def damaged_states(run_dir: Path) -> dict[int, str]:
    """Return what is wrong with the training states that are newer than the newest whole one, by step."""
    damaged = {}
    for checkpoint in reversed(resumable(run_dir)):
        try:
            checkpoint.verify_state()
        except LaunchError as error:
            damaged[checkpoint.step] = str(error)
        else:
            break
    return damaged


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes, 32 hex digits."""
    digest = blake3(max_threads=blake3.AUTO)
    digest.update_mmap(path)
    return digest.hexdigest(length=16)


def publish(run_dir: Path, step: int, write: Callable[[Path], None]) -> Checkpoint:
    """Write a checkpoint into a scratch folder, make it durable, and give it its name.

    Args:
        run_dir: The run.
        step: Optimizer steps taken.
        write: Writes the files into the folder it is given.

    Returns:
        The checkpoint; an older one of this step gives way to it.
    """
    scratch = run_dir / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)  # what a killed run left; the run directory is locked
    checkpoint = checkpoint_of(run_dir, step)
    folder = scratch / checkpoint.path.name
    folder.mkdir(parents=True)
    write(folder)
    fsync_tree(folder)
    if checkpoint.path.exists():
        (run_dir / _REPLACED).mkdir()
        checkpoint.path.rename(run_dir / _REPLACED / checkpoint.path.name)
    publish_folder(folder, checkpoint.path)
    shutil.rmtree(scratch)
    return checkpoint


def thin_out(
    run_dir: Path, *, is_due: Callable[[int], bool], limit: int | None, best: int | None, num_states: int = NUM_STATES
) -> None:
    """Delete what newer checkpoints have made superfluous.

    Args:
        run_dir: The run; it has a checkpoint.
        is_due: Whether a checkpoint of this step was asked for; others only serve to resume.
        limit: How many of those that were asked for to keep; None for all.
        best: Step of the checkpoint that is kept whatever its age.
        num_states: How many of the newest keep their training state.
    """
    *older, newest = list_checkpoints(run_dir)
    asked_for = [checkpoint for checkpoint in [*older, newest] if is_due(checkpoint.step)]
    kept = {checkpoint.step for checkpoint in (asked_for[-limit:] if limit else asked_for)} | {best, newest.step}
    states = resumable(run_dir)
    with_state = {checkpoint.step for checkpoint in states[max(0, len(states) - num_states) :]}
    for checkpoint in [*older, newest]:
        if checkpoint.step not in kept and checkpoint.step not in with_state:
            _delete(checkpoint.path, run_dir)
        elif checkpoint.is_resumable and checkpoint.step not in with_state:
            _delete(checkpoint.state_folder, run_dir)


def drop_states(run_dir: Path) -> None:
    """Delete what only serves to resume, of a finished run that was killed before it had done so.

    A run directory that another process is at is left alone.
    """
    if resumable(run_dir):
        # On a disk that this user may only read, they stay.
        with contextlib.suppress(RunDirBusy, OSError), only_training(run_dir):
            for checkpoint in resumable(run_dir):
                _delete(checkpoint.state_folder, run_dir)


def _delete(folder: Path, run_dir: Path) -> None:
    """Take away the name first, so that a crash leaves no half of a folder under it."""
    doomed = run_dir / _SCRATCH
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)
