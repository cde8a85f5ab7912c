"""Where the numbers of a run go beside ``metrics.jsonl``: CSV, TensorBoard, Weights & Biases, SwanLab."""

from __future__ import annotations

import contextlib
import csv
import importlib.util
import os
import shutil
from typing import TYPE_CHECKING, Any, Protocol

from diffsynth_pipe.errors import ConfigError, PipeError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from diffsynth_pipe.config import RunConfig

CSV_FILE = "metrics.csv"
TENSORBOARD_FOLDER = "tensorboard_log"
PACKAGES = {"enable_tensorboard_log": "tensorboardX", "enable_wandb_log": "wandb", "enable_swanlab_log": "swanlab"}


class Tracker(Protocol):
    """Takes the numbers of one run.

    Attributes:
        flag: The parameter that asks for it.
    """

    flag: str

    def log(self, step: int, values: Mapping[str, float], time_s: float) -> None:
        """Take the numbers of an optimizer step; a step can have several calls, with other names.

        Args:
            step: Its number.
            values: The numbers by name.
            time_s: When they were measured, in seconds since 1970.
        """

    def close(self) -> None:
        """Store or send what is waiting."""


class CsvTracker:
    """``metrics.csv`` with the reference's columns: step, key, value."""

    flag = "enable_csv_log"

    def __init__(self, run_dir: Path) -> None:
        self._file = (run_dir / CSV_FILE).open("w", encoding="utf-8", newline="")
        self._writer = csv.writer(self._file)
        self._writer.writerow(["step", "key", "value"])

    def log(self, step: int, values: Mapping[str, float], time_s: float) -> None:  # noqa: ARG002
        """Append one row per number."""
        self._writer.writerows([step, name, value] for name, value in values.items())
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class TensorBoardTracker:
    """Event files in ``tensorboard_log``; ``tensorboard --logdir`` of it or of any folder above shows them."""

    flag = "enable_tensorboard_log"

    def __init__(self, run_dir: Path) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / TENSORBOARD_FOLDER))

    def log(self, step: int, values: Mapping[str, float], time_s: float) -> None:
        """Add one scalar per number."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step, walltime=time_s)

    def close(self) -> None:
        """Write what is waiting."""
        self._writer.close()


class WandbTracker:
    """A run of Weights & Biases, its files in ``wandb_log``; ``WANDB_MODE=offline`` sends nothing.

    A resumed run goes on under the same id; W&B leaves out the steps that it has.
    """

    flag = "enable_wandb_log"

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

    def log(self, step: int, values: Mapping[str, float], time_s: float) -> None:  # noqa: ARG002
        """Send the numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


class SwanLabTracker:
    """An experiment of SwanLab, its files in ``swanlab_log``; ``SWANLAB_MODE=offline`` sends nothing."""

    flag = "enable_swanlab_log"

    def __init__(self, config: RunConfig, run_dir: Path) -> None:
        import swanlab

        # Taken out of the environment: swanlab 0.10 reads it as JSON of a setting of its own, and fails.
        project = os.environ.pop("SWANLAB_PROJECT", None)
        self._run: Any = swanlab.init(
            project=project or config.swanlab_project,
            log_dir=str(run_dir / "swanlab_log"),
            id=run_dir.name,
            name=run_dir.name,
            resume="allow",
            config=config.model_dump(mode="json"),
        )

    def log(self, step: int, values: Mapping[str, float], time_s: float) -> None:  # noqa: ARG002
        """Send the numbers."""
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        """Wait until all is sent."""
        self._run.finish()


@contextlib.contextmanager
def failures_named(flag: str, kind: type[PipeError], cure: str) -> Iterator[None]:
    """Turn whatever a tracker raises into one line that names its flag and a cure.

    Raises:
        PipeError: Of this kind.
    """
    try:
        yield
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise kind(f"{flag}: {reason}; {cure}") from error


def check_packages(config: RunConfig) -> None:
    """Refuse a tracker whose package is not installed.

    Raises:
        ConfigError: As it says.
    """
    for name, package in PACKAGES.items():
        if getattr(config, name) and importlib.util.find_spec(package) is None:
            raise ConfigError(f"{name}: needs a package that is not installed; pip install {package}")


def open_file_trackers(config: RunConfig, run_dir: Path) -> list[Tracker]:
    """Start the trackers that write into the run directory, empty; on rank 0 only.

    They hold nothing that ``metrics.jsonl`` does not: what an earlier attempt left of them is replaced.
    """
    (run_dir / CSV_FILE).unlink(missing_ok=True)
    shutil.rmtree(run_dir / TENSORBOARD_FOLDER, ignore_errors=True)
    trackers: list[Tracker] = [CsvTracker(run_dir)] if config.enable_csv_log else []
    return [*trackers, TensorBoardTracker(run_dir)] if config.enable_tensorboard_log else trackers


def open_service_trackers(config: RunConfig, run_dir: Path) -> list[Tracker]:
    """Start the trackers that send to a service; on rank 0 only.

    Raises:
        ConfigError: A service refuses, or does not know who is logging in.
    """
    trackers: list[Tracker] = []
    for kind, enabled in ((WandbTracker, config.enable_wandb_log), (SwanLabTracker, config.enable_swanlab_log)):
        if enabled:
            package = PACKAGES[kind.flag]
            cure = f"log in with `{package} login`, or set {package.upper()}_MODE=offline"
            with failures_named(kind.flag, ConfigError, cure):
                trackers.append(kind(config, run_dir))
    return trackers
