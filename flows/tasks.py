"""Thin tasks: launch a stage and say Cached, Resumed or Completed, or launch a share of the first.

Prefect's own caching stays off: it reports a hit when the data is gone. The disk decides (``stages.plan``).
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from prefect import task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed

from cache_store.contract import CacheError
from diffsynth_pipe import launch
from diffsynth_pipe.errors import LaunchError, PipeError, RunDirBusy
from flows.report import Reporter

if TYPE_CHECKING:
    from collections.abc import Callable

    from prefect.client.schemas.objects import State, TaskRun

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.stages.plan import StageResult


def worth_retrying(task: Any, run: TaskRun, state: State[Any]) -> bool:  # noqa: ARG001 - Prefect's signature
    """Retry what may pass by itself: processes that died. A refused input will be refused again."""
    error = state.result(raise_on_failure=False)
    if isinstance(error, LaunchError):
        return not isinstance(error, RunDirBusy)
    return not isinstance(error, (PipeError, CacheError, ValueError, TypeError))


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
    return _run("data-process-progress", launch.launch_data_process, config, force)


@task(name="encode_share", task_run_name="share {index} of {count}", **_OPTIONS)
def encode_share(config: RunConfig, index: int, count: int) -> None:
    """Encode one share of what the cache lacks."""
    with Reporter() as reporter:
        launch.launch_share(config, index, count, on_line=partial(reporter.line, f"share-{index}-progress"))


@task(name="train", task_run_name="train", **_OPTIONS)
def train(config: RunConfig, force: bool) -> Any:
    """Train from the cache; the State that this returns becomes the task's own, with a StageResult."""
    return _run("train-progress", launch.launch_train, config, force)


def _run(key: str, launch_stage: Callable[..., StageResult], config: RunConfig, force: bool) -> State[StageResult]:
    with Reporter() as reporter:
        result = launch_stage(config, force, on_line=partial(reporter.line, key))
    return Completed(name=result.state, message=f"{result.stage} {result.key[:12]}", data=result)
