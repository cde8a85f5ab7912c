"""Progress for people on stderr, and one JSON line per optimizer step for programs; rank 0 only."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any, TextIO

from tqdm import tqdm

from cache_store.durable import move_aside

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import TracebackType

METRICS_FILE = "metrics.jsonl"


class Metrics:
    """Writes ``metrics.jsonl`` of a run and shows a bar; on other ranks than 0 it does nothing.

    A file that an unfinished attempt left behind is moved aside to ``metrics.<n>.jsonl``.
    """

    def __init__(self, run_dir: Path, num_steps: int, *, enabled: bool) -> None:
        self._bar = tqdm(total=num_steps, desc="train", unit="step", disable=not enabled)
        self._file: TextIO | None = None
        if enabled:
            path = run_dir / METRICS_FILE
            move_aside(path)
            self._file = path.open("x", encoding="utf-8")

    def write(self, step: int, **values: Any) -> None:
        """Append one line; it is on its way to the disk when this returns."""
        if self._file:
            self._file.write(json.dumps({"step": step, **values, "time": round(time.time(), 3)}) + "\n")
            self._file.flush()

    def advance(self, values: Mapping[str, float]) -> None:
        """Move the bar by one step and show its values."""
        self._bar.set_postfix({name: f"{value:.4g}" for name, value in values.items()}, refresh=False)
        self._bar.update()

    def __enter__(self) -> Metrics:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
        if self._file:
            self._file.close()
