"""Tiny repositories with random weights: the real classes and the real folder layout, for tests and trials on a CPU."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffsynth_pipe.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable


def write_repository(folder: Path, build: Callable[[], Any], complete: Callable[[Path], None] | None = None) -> None:
    """Write a pipeline to a folder, the same bytes on every call; leave a repository that exists as it is.

    Args:
        folder: Of the repository.
        build: Builds the diffusers pipeline; torch's generator is seeded for it, and put back after.
        complete: Adds to the new folder what the pipeline cannot save.

    Raises:
        ModelError: The folder holds something else.
    """
    import torch

    if (folder / "model_index.json").exists():
        return
    if folder.exists() and not folder.is_dir():
        raise ModelError(f"{str(folder)!r} is not a folder; choose a new one")
    if folder.exists() and any(folder.iterdir()):
        raise ModelError(f"{str(folder)!r} is not empty and holds no model_index.json; choose a new folder")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        pipeline = build()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as scratch:
        new = Path(scratch) / folder.name
        pipeline.save_pretrained(new, safe_serialization=True)
        if complete is not None:
            complete(new)
        new.rename(folder)
