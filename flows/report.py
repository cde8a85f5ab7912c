"""What a run shows of itself: progress, table and markdown artifacts, and its closing lines."""

from __future__ import annotations

import json
import logging
import re
from contextvars import copy_context
from functools import partial
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Self

from httpx import HTTPError
from prefect.artifacts import (
    create_markdown_artifact,
    create_progress_artifact,
    create_table_artifact,
    update_progress_artifact,
)
from prefect.exceptions import PrefectException

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from types import TracebackType
    from uuid import UUID

    from diffsynth_pipe.stages.plan import StagePlan, StageResult

LOG = logging.getLogger("flows")
LOG.setLevel(logging.INFO)

_INTERVAL_S = 2.0
_CLOSE_S = 5.0
_KEY_LENGTH = 12
_PERCENT = re.compile(r"\b(\d{1,3})%\|[^|]*\|(.*)")


class Reporter:
    """Sends the artifacts of a run from a thread of its own: no server, slow or gone, holds up or fails a stage.

    Of several artifacts with one key only the newest is sent. Keys hold ``[a-z0-9-]`` only.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[], object]] = {}
        self._progress_ids: dict[str, UUID] = {}
        self._lock = Lock()
        self._wake, self._closing = Event(), Event()
        # The context tells Prefect which run the artifacts belong to.
        self._thread = Thread(target=copy_context().run, args=(self._send_all,), name="artifacts", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._wake.set()
        self._thread.join(_CLOSE_S)

    def line(self, key: str, line: str) -> None:
        """Log a line of a stage's output; a progress bar in it becomes the progress artifact ``key``."""
        LOG.info(line)
        if match := _PERCENT.search(line):
            self._put(key, partial(self._send_progress, key, float(match[1]), match[2].strip()))

    def plan(self, plans: Iterable[StagePlan]) -> None:
        """Publish what each stage will do, and why."""
        table = [
            {
                "stage": plan.stage,
                "verdict": plan.verdict,
                "why": plan.why,
                "key": plan.key[:_KEY_LENGTH],
                "path": str(plan.path),
            }
            for plan in plans
        ]
        self._put("plan", partial(create_table_artifact, table=table, key="plan"))

    def summary(self, results: Iterable[StageResult]) -> None:
        """Publish the closing lines."""
        markdown = "\n".join(["```", *closing_lines(results), "```"])
        self._put("summary", partial(create_markdown_artifact, markdown=markdown, key="summary"))

    def _put(self, key: str, send: Callable[[], object]) -> None:
        with self._lock:
            self._waiting[key] = send
        self._wake.set()

    def _send_all(self) -> None:
        while True:
            self._wake.wait()
            self._wake.clear()
            last = self._closing.is_set()
            with self._lock:
                waiting, self._waiting = self._waiting, {}
            for key, send in waiting.items():
                try:
                    send()
                except (PrefectException, HTTPError, OSError, RuntimeError, ValueError) as error:
                    LOG.warning("artifact %s was not sent: %s", key, error)
            if last:
                return
            self._closing.wait(_INTERVAL_S)

    def _send_progress(self, key: str, percent: float, description: str) -> None:
        """Send how far a stage is; the description is what its bar says behind it: count, time left, rate, values."""
        if key in self._progress_ids:
            update_progress_artifact(self._progress_ids[key], progress=percent, description=description)
        else:
            self._progress_ids[key] = create_progress_artifact(progress=percent, key=key, description=description)  # type: ignore[assignment]


def closing_lines(results: Iterable[StageResult]) -> list[str]:
    """Return what a person wants to know when the run has ended: per stage the state and the numbers, then the LoRA."""
    lines: list[str] = []
    for result in results:
        describe = _train_lines if result.stage == "train" else _data_process_lines
        lines += [f"{result.stage}: {result.state}", *(f"  {line}" for line in describe(result))]
    return lines


def _data_process_lines(result: StageResult) -> list[str]:
    summary = result.summary
    buckets = ", ".join(f"{name}: {count}" for name, count in summary["buckets"].items())
    lines = [
        f"{summary['num_samples']} samples, {summary['num_records']} records, "
        f"{_size(summary['payload_bytes'])} of tensors, {_size(summary['disk_bytes'])} on disk in {result.path}",
        f"buckets {buckets}",
    ]
    if encoded := summary.get("encoded"):
        lines.append("encoded in this run: " + ", ".join(f"{name} {count}" for name, count in encoded.items()))
    return lines


def _train_lines(result: StageResult) -> list[str]:
    summary = result.summary
    lines = [summary["engine"], f"{summary['num_steps']} steps"]
    if validation := summary["validation"]:
        samples = f"{validation['num_samples']} {'held-out' if validation['held_out'] else 'training'} samples"
        lines.append(f"loss at fixed noise {summary['loss_before']:.4f} -> {summary['loss_after']:.4f}, on {samples}")
        margin = (
            "" if validation["improvement_margin"] is None else f" +- {validation['improvement_margin']:.4f} (95 %)"
        )
        lines.append(f"base model {validation['base_loss']:.4f}, improved by {validation['improvement']:.4f}{margin}")
        lines.append(f"best at step {summary['best']['step']}: {summary['best']['loss']:.4f}")
    if summary["lora_path"] is None:
        return [*lines, *(f"weights {(result.path / file).resolve()}" for file in summary["files"])]
    lora_path = (result.path / summary["lora_path"]).resolve()
    pipeline = summary["pipeline_class"] or "DiffusionPipeline"
    return [
        *lines,
        f"LoRA {lora_path}",
        "load it in diffusers:",
        f"  pipe = {pipeline}.from_pretrained({_quoted(summary['base_model'])})",
        *([f"  # with the denoiser's weights from {initial}"] if (initial := summary.get("initial_weights")) else []),
        f"  pipe.load_lora_weights({_quoted(lora_path)}{summary.get('load_argument', '')})",
        '  image = pipe("your prompt")[0][0]',
    ]


def _quoted(value: Any) -> str:
    return json.dumps(str(value), ensure_ascii=False)


def _size(num_bytes: int) -> str:
    size = float(num_bytes)
    for unit in ("B", "KB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"
