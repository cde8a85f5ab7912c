"""The flow against Prefect's own test server, with the real stages on real photos."""

import time

import pytest
from prefect.exceptions import ParameterTypeError

from cache_store.contract import CacheNotFound
from cache_store.store import Cache
from diffsynth_pipe.errors import ConfigError, DataError, LaunchError
from flows.cache_then_train import cache_then_train
from flows.tasks import worth_retrying

DEADLINE_S = 60


def test_the_server_can_be_imported():
    """Prefect 3.8's server does not start beside fastapi >= 0.156; the pin in pyproject.toml sees to it."""
    import prefect.server.api.server  # noqa: F401


@pytest.fixture(scope="module")
def server():
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


def task_states(num_tasks):
    """Return the task runs of the newest flow run by name; they reach the server a moment after its end."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId
    from prefect.client.schemas.sorting import FlowRunSort

    deadline = time.monotonic() + DEADLINE_S
    with get_client(sync_client=True) as client:
        (flow_run,) = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=1)
        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run.id]))
        while True:
            runs = client.read_task_runs(flow_run_filter=chosen)
            if len(runs) == num_tasks and all(run.state.is_final() for run in runs):
                return {run.name: run for run in runs}
            assert time.monotonic() < deadline, [(run.name, run.state_name) for run in runs]


def state_names():
    return {name: run.state_name for name, run in task_states(2).items()}


def test_states_say_what_was_found_on_disk(server, run_config, edit_rows):
    config = run_config(num_validation_samples=1)
    first = cache_then_train(config)
    assert [result.state for result in first] == ["Completed", "Completed"]
    assert state_names() == {"data_process": "Completed", "train": "Completed"}

    second = cache_then_train(config)
    assert state_names() == {"data_process": "Cached", "train": "Cached"}
    assert [result.key for result in second] == [result.key for result in first]

    cache_then_train(config, overrides={"lora_rank": 2})
    assert state_names() == {"data_process": "Cached", "train": "Completed"}

    # The server still says that all is done; the disk does not.
    Cache.open(config.cache_dir).latest().array_path(0).unlink()
    cache_then_train(config)
    assert state_names() == {"data_process": "Resumed", "train": "Cached"}

    def recaption(rows):
        rows[0]["prompt"] += ", at night"

    edit_rows(recaption)
    cache_then_train(config)
    assert state_names() == {"data_process": "Resumed", "train": "Completed"}


def test_train_alone_without_a_cache_fails_at_once(server, run_config):
    with pytest.raises(CacheNotFound):
        cache_then_train(run_config(), stages=["train"])


def test_a_refused_input_is_not_tried_again(server, run_config, photos):
    image = next(photos.glob("*.jpg"))
    image.write_bytes(image.read_bytes()[:2000])
    with pytest.raises(Exception, match=image.name):
        cache_then_train(run_config(), stages=["data_process"])
    assert task_states(1)["data_process"].run_count == 1


def test_parameters_are_validated_before_the_run(server, run_parameters):
    with pytest.raises(ParameterTypeError, match="lora_rank"):
        cache_then_train({**run_parameters, "lora_rank": 0})


def test_a_wrong_override_is_refused_by_its_name(server, run_config):
    with pytest.raises(ConfigError, match="lora_rank"):
        cache_then_train(run_config(), overrides={"lora_rank": 0})


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (LaunchError("train ended with SIGKILL"), True),
        (OSError("no route to host"), True),
        (DataError("no such image"), False),
        (CacheNotFound("no cache"), False),
    ],
)
def test_what_is_worth_retrying(error, expected):
    from prefect.states import Failed

    assert worth_retrying(None, None, Failed(data=error)) is expected
