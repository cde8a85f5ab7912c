"""Progress for people on stderr, and the numbers of a run for programs; rank 0 only."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from cache_store.durable import move_aside
from diffsynth_pipe.errors import LaunchError
from diffsynth_pipe.training.run_dir import disk_errors
from diffsynth_pipe.training.trackers import failures_named, open_file_trackers, open_service_trackers

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import TracebackType

    from torch import Tensor

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.training.trackers import Tracker

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes ``metrics.jsonl`` of a run and shows a bar; on other ranks than 0 it does nothing.

    Args:
        config: Says which trackers get the same numbers.
        run_dir: Gets the files.
        num_steps: Optimizer steps of the whole run.
        resume_step: The step that the run goes on from; what the files say of later ones is dropped, as those come
            again. None for a new run: a file of an unfinished attempt is moved aside to ``metrics.<n>.jsonl``.
        enabled: Whether this is rank 0.
    """

    def __init__(
        self, config: RunConfig, run_dir: Path, num_steps: int, *, resume_step: int | None = None, enabled: bool
    ) -> None:
        self._bar = tqdm(total=num_steps, initial=resume_step or 0, desc="train", unit="step", disable=not enabled)
        self._file: TextIO | None = None
        self._trackers: list[Tracker] = []
        if enabled:
            path = run_dir / METRICS_FILE
            with disk_errors(path):
                if resume_step is None:
                    move_aside(path)
                self._trackers = open_file_trackers(config, run_dir)
                self._file = path.open("a+", encoding="utf-8")
                self._replay(resume_step or 0)
            self._trackers += open_service_trackers(config, run_dir)

    def _replay(self, last_step: int) -> None:
        """Give the trackers what the file holds, and cut off its later steps and a line that a crash cut short."""
        assert self._file
        path, end = Path(self._file.name), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if not line.endswith(b"\n"):
                    break
                try:
                    entry = json.loads(line)
                    if entry["step"] > last_step:
                        break
                except (ValueError, KeyError, TypeError) as error:
                    raise LaunchError(f"{path} line {number} is damaged; move the file away, then run again") from error
                self._log(entry)
                end += len(line)
        self._file.truncate(end)
        os.fsync(self._file.fileno())

    def write(self, step: int, **values: Any) -> None:
        """Append one line; it is on its way to the disk when this returns. Trackers get the numbers in it."""
        if self._file:
            entry = {"step": step, **values, "time": round(time.time(), 3)}
            with disk_errors(self._file.name):
                self._file.write(json.dumps(entry) + "\n")
                self._file.flush()
            self._log(entry)

    def _log(self, entry: Mapping[str, Any]) -> None:
        values = _numbers({name: value for name, value in entry.items() if name not in ("step", "time")})
        for tracker in self._trackers:
            with failures_named(tracker.flag, LaunchError, "run the same command again, or without it"):
                tracker.log(entry["step"], values, entry["time"])

    def advance(self, values: Mapping[str, float]) -> None:
        """Move the bar by one step and show its values."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._bar.update()

    def say(self, line: object) -> None:
        """Print a line for people, on stdout, past the bar."""
        if self._file:
            tqdm.write(str(line))

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        hiding = contextlib.suppress(Exception) if error else contextlib.nullcontext()  # a second error hides the first
        with hiding, contextlib.ExitStack() as closing:
            for tracker in self._trackers:
                closing.callback(self._close_tracker, tracker)
            if self._file:
                closing.callback(self._close_file, self._file)

    @staticmethod
    def _close_tracker(tracker: Tracker) -> None:
        with failures_named(tracker.flag, LaunchError, "run the same command again, or without it"):
            tracker.close()

    @staticmethod
    def _close_file(file: TextIO) -> None:
        with disk_errors(file.name):
            file.close()


class LossByDecile:
    """Mean training loss per tenth of the noise levels that the run draws, the noisiest first.

    Attributes:
        sums: One per decile.
        counts: One per decile.
    """

    NUM_DECILES = 10

    def __init__(self) -> None:
        self.sums, self.counts = [0.0] * self.NUM_DECILES, [0] * self.NUM_DECILES

    def add(self, deciles: Tensor, losses: Tensor) -> None:
        """Add losses, ``[batch]``, with the number of each one's decile, ``[batch]``."""
        for decile, loss in zip(deciles.tolist(), losses.tolist(), strict=True):
            self.sums[int(decile)] += loss
            self.counts[int(decile)] += 1

    def take(self) -> list[float | None]:
        """Return the means since the last call; None for a decile without losses."""
        means = [total / count if count else None for total, count in zip(self.sums, self.counts, strict=True)]
        self.sums, self.counts = [0.0] * self.NUM_DECILES, [0] * self.NUM_DECILES
        return means


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """Flatten lists to ``name/0``, ``name/1`` ..., and leave out what is no number."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        is_list = isinstance(value, list | tuple)
        items = {f"{name}/{number}": item for number, item in enumerate(value)} if is_list else {name: value}
        flat |= {key: item for key, item in items.items() if type(item) in (int, float)}
    return flat
