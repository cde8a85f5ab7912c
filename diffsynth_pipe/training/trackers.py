"""Where the numbers of a run go beside ``metrics.jsonl``: CSV, TensorBoard, Weights & Biases, SwanLab."""

from __future__ import annotations

import csv
import importlib.util
import os
from typing import TYPE_CHECKING, Any, Protocol

from cache_store.durable import move_aside
from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path
    from typing import TextIO

    from diffsynth_pipe.config import RunConfig

PACKAGES = {"enable_tensorboard_log": "tensorboardX", "enable_wandb_log": "wandb", "enable_swanlab_log": "swanlab"}


class Tracker(Protocol):
    """Takes the numbers of one run."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Take the numbers of an optimizer step; some steps have several calls, with other names."""

    def close(self) -> None:
        """Send what is waiting."""


class CsvTracker:
    """``metrics.csv`` with the reference's columns: step, key, value."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        self._file = open_lines(run_dir / "metrics.csv", resume_step, _step_of_row)
        self._writer = csv.writer(self._file, lineterminator="\n")
        if not self._file.tell():
            self._writer.writerow(["step", "key", "value"])

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Append one row per number."""
        self._writer.writerows([step, name, value] for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """Event files in ``tensorboard_log``; ``tensorboard --logdir`` of it or of any folder above shows them."""

    def __init__(self, run_dir: Path, resume_step: int | None) -> None:
        from tensorboardX import SummaryWriter

        # Readers forget what an earlier attempt wrote from the step on at which this one begins.
        begin = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(run_dir / "tensorboard_log"), purge_step=begin)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add one scalar per number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, its files in ``wandb_log``; ``WANDB_MODE=offline`` sends nothing.

    A resumed run goes on under the same id; W&B leaves out the steps that it has.
    """

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import wandb

        folder = run_dir / "wandb_log"
        folder.mkdir(exist_ok=True)
        self._run: Any = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or config.wandb_project,
            dir=str(folder),
            id=run_dir.name,
            name=run_dir.name,
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


class SwanLabTracker:
    """An experiment of SwanLab, its files in ``swanlab_log``; ``SWANLAB_MODE=offline`` sends nothing."""

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import swanlab

        self._run: Any = swanlab.init(
            project=os.environ.get("SWANLAB_PROJECT") or config.swanlab_project,
            log_dir=str(run_dir / "swanlab_log"),
            id=run_dir.name,
            name=run_dir.name,
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Send the numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


def check_packages(config: RunConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: As it says.
    """
    for name, package in PACKAGES.items():
        if getattr(config, name) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{name}: needs a package that is not installed; pip install {package}")


def open_trackers(config: RunConfig, run_dir: Path, resume_step: int | None) -> list[Tracker]:
    """Start the trackers that the run asks for; on rank 0 only."""
    trackers: list[Tracker] = []
    if config.enable_csv_log:
        trackers.append(CsvTracker(run_dir, resume_step))
    if config.enable_tensorboard_log:
        trackers.append(TensorBoardTracker(run_dir, resume_step))
    if config.enable_wandb_log:
        trackers.append(WandbTracker(config, run_dir))
    if config.enable_swanlab_log:
        trackers.append(SwanLabTracker(config, run_dir))
    return trackers


def open_lines(path: Path, resume_step: int | None, step_of: Callable[[str], int]) -> TextIO:
    """Open a log of lines, their steps ascending, to append to.

    Args:
        path: The log.
        resume_step: Later steps are cut off, and a last line that a crash cut short; None moves the whole log aside.
        step_of: Returns the step of a line.
    """
    if resume_step is None:
        move_aside(path)
    elif path.exists():
        with path.open("r+b") as file:
            end = 0
            for line in file:
                if not line.endswith(b"\n") or step_of(line.decode()) > resume_step:
                    break
                end += len(line)
            file.truncate(end)
            os.fsync(file.fileno())
    return path.open("a", encoding="utf-8")


def _step_of_row(line: str) -> int:
    step = line.partition(",")[0]
    return -1 if step == "step" else int(step)
