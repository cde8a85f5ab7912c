"""What a run shows of itself: progress, table and markdown artifacts, and its closing lines."""

from __future__ import annotations

import json
import logging
import re
import time
from contextvars import copy_context
from datetime import timedelta
from functools import partial
from pathlib import Path
from threading import Event, Lock, Thread
from typing import TYPE_CHECKING, Any, Self

from httpx import HTTPError
from prefect.artifacts import create_markdown_artifact, create_progress_artifact, update_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactUpdate
from prefect.exceptions import PrefectException

from flows.charts import decile_chart, loss_chart, read_metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence
    from types import TracebackType
    from uuid import UUID

    from diffsynth_pipe.stages.plan import StagePlan, StageResult

LOG = logging.getLogger("flows")
LOG.setLevel(logging.INFO)

_INTERVAL_S = 2.0
_CLOSE_S = 5.0
_LOSS_INTERVAL_S = 30.0
_KEY_LENGTH = 12
_BAR = re.compile(r"([^:|]*): *(\d{1,3})%\|[^|]*\| *(\d+)/(\d+) \[[^<]*<([^,]*), *(.*)\]")
"""A bar of tqdm: its name, percent, count, total, time left, rate and values."""


class Reporter:
    """Sends the artifacts of a run from a thread of its own: no server, slow or gone, holds up or fails a stage.

    Of several artifacts with one key only the newest is sent. Keys hold ``[a-z0-9-]`` only.
    """

    def __init__(self) -> None:
        self._waiting: dict[str, Callable[[], object]] = {}
        self._ids: dict[str, UUID] = {}
        self._loss_at = -_LOSS_INTERVAL_S
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
        if match := _BAR.search(line):
            name, percent, count, total, left, rate = match.groups()
            description = f"{name.strip()}: {count} of {total}, {left} left, {rate}"
            self._put(key, partial(self._send_progress, key, float(percent), description))

    def loss(self, run_dir: Path, *, now: bool = False) -> None:
        """Publish the losses of a training so far, every half minute or ``now``."""
        if now or time.monotonic() - self._loss_at >= _LOSS_INTERVAL_S:
            self._loss_at = time.monotonic()
            self._put("loss", partial(self._send_loss, run_dir))

    def plan(self, plans: Iterable[StagePlan], changes: Mapping[str, Sequence[str]]) -> None:
        """Publish what each stage will do, and why; ``changes`` has lines on what is not as before, by stage."""
        plans = list(plans)
        lines = _table(("stage", "verdict", "why"), [(plan.stage, plan.verdict, plan.why) for plan in plans])
        for plan in plans:
            lines += ["", f"**{plan.stage}** {_code(plan.key[:_KEY_LENGTH])} in {_code(plan.path)}"]
            if texts := changes.get(plan.stage):
                lines += ["", "Not as before:", "", *(f"- {text}" for text in texts)]
        self._put("plan", partial(create_markdown_artifact, markdown="\n".join(lines), key="plan"))

    def report(self, results: Sequence[StageResult], elapsed_s: Sequence[float]) -> None:
        """Publish what the run did, with the seconds that each stage took."""
        markdown = partial(_report, list(results), list(elapsed_s))
        self._put("report", lambda: create_markdown_artifact(markdown=markdown(), key="report"))

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
                except (PrefectException, HTTPError, OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
                    LOG.warning("artifact %s was not sent: %s", key, error)
            if last:
                return
            self._closing.wait(_INTERVAL_S)

    def _send_progress(self, key: str, percent: float, description: str) -> None:
        if key in self._ids:
            update_progress_artifact(self._ids[key], progress=percent, description=description)
        else:
            self._ids[key] = create_progress_artifact(progress=percent, key=key, description=description)  # type: ignore[assignment]

    def _send_loss(self, run_dir: Path) -> None:
        """Update one artifact: a version per half minute would fill the database of the server."""
        if (markdown := loss_chart(read_metrics(run_dir))) is None:
            return
        if "loss" in self._ids:
            with get_client(sync_client=True) as client:
                client.update_artifact(self._ids["loss"], ArtifactUpdate(data=markdown))
        else:
            self._ids["loss"] = create_markdown_artifact(markdown=markdown, key="loss")  # type: ignore[assignment]


def _report(results: Sequence[StageResult], elapsed_s: Sequence[float]) -> str:
    rows = [
        (result.stage, result.state, str(timedelta(seconds=round(seconds))), _code(result.key[:_KEY_LENGTH]))
        for result, seconds in zip(results, elapsed_s, strict=True)
    ]
    lines = _table(("stage", "state", "time", "key"), rows)
    for result in results:
        numbers = _train_numbers(result) if result.stage == "train" else _data_process_lines(result)
        lines += ["", f"## {result.stage}", "", *(f"- {number}" for number in numbers)]
        if result.stage == "train":
            assert isinstance(result.path, Path)
            metrics = read_metrics(result.path)
            charts = [chart for chart in (loss_chart(metrics), decile_chart(metrics)) if chart]
            lines += ["", *"\n\n".join(charts).splitlines(), "", "## Weights", ""]
            lines += [
                f"- {_code((result.path / file).resolve())}, digest {_code(digest[:_KEY_LENGTH])}"
                for file, digest in result.summary["digests"].items()
            ]
            if load := _load_lines(result):
                lines += ["", "```python", *load, "```"]
    return "\n".join(lines)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    cells = [head, ["---"] * len(head), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return ["| " + " | ".join(row) + " |" for row in cells]


def _code(value: object) -> str:
    return f"`{value}`"


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
    lines = _train_numbers(result)
    if not (load := _load_lines(result)):
        return [*lines, *(f"weights {(result.path / file).resolve()}" for file in result.summary["files"])]
    lora_path = (result.path / result.summary["lora_path"]).resolve()
    return [*lines, f"LoRA {lora_path}", "load it in diffusers:", *(f"  {line}" for line in load)]


def _train_numbers(result: StageResult) -> list[str]:
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
    return lines


def _load_lines(result: StageResult) -> list[str]:
    """Return the Python code that loads the LoRA; none if whole models were trained alone."""
    summary = result.summary
    if summary["lora_path"] is None:
        return []
    lora_path = (result.path / summary["lora_path"]).resolve()
    pipeline = summary["pipeline_class"] or "DiffusionPipeline"
    return [
        f"pipe = {pipeline}.from_pretrained({_quoted(summary['base_model'])})",
        *([f"# with the denoiser's weights from {initial}"] if (initial := summary.get("initial_weights")) else []),
        f"pipe.load_lora_weights({_quoted(lora_path)}{summary.get('load_argument', '')})",
        'image = pipe("your prompt")[0][0]',
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
