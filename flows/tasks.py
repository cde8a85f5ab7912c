"""Thin tasks: launch a stage and say Cached, Resumed or Completed, or launch a share of the first.

Prefect's own caching stays off: it reports a hit when the data is gone. The disk decides (``stages.plan``).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from cache_store.contract import CacheError
from diffsynth_pipe import launch
from diffsynth_pipe.errors import LaunchError, PipeError
from flows.report import Reporter

if TYPE_CHECKING:
    from prefect.client.schemas.objects import State, TaskRun

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.stages.plan import StageResult


def worth_retrying(task: Any, run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001 - Prefect's signature
    """Retry what may pass by itself: processes that died. A refused input will be refused again."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, LaunchError) or not isinstance(error, (PipeError, CacheError, ValueError, TypeError))


_OPTIONS: dict[str, Any] = {
    "cache_policy": NO_CACHE,
    "persist_result": False,
    "retries": 2,
    "retry_delay_seconds": 2,
    "retry_condition_fn": worth_retrying,
}


@task(name="data_process", task_run_name="data_process", **_OPTIONS)
def data_process(config: RunConfig, force: bool) -> Any:
    """Bring the cache up to date; the State that this returns becomes the task's own, with a StageResult."""
    with Reporter() as reporter:
        on_line = partial(reporter.line, "data-process-progress")
        return _state(launch.launch_data_process(config, force, on_line))


@task(name="encode_share", task_run_name="share {index} of {count}", **_OPTIONS)
def encode_share(config: RunConfig, index: int, count: int) -> None:
    """Encode one share of what the cache lacks."""
    with Reporter() as reporter:
        launch.launch_share(config, index, count, on_line=partial(reporter.line, f"share-{index}-progress"))


@task(name="train", task_run_name="train", **_OPTIONS)
def train(config: RunConfig, force: bool) -> Any:
    """Train from the cache; the State that this returns becomes the task's own, with a StageResult."""
    (plan,) = launch.plan_stages(config, ["train"])
    assert isinstance(plan.path, Path)
    run_dir = plan.path
    with Reporter() as reporter:

        def on_line(line: str) -> None:
            reporter.line("train-progress", line)
            reporter.loss(run_dir)

        result = launch.launch_train(config, force, on_line)
        reporter.loss(run_dir, now=True)
    return _state(result)


def _state(result: StageResult) -> State[StageResult]:
    return Completed(name=result.state, message=f"{result.stage} {result.key[:12]}", data=result)
