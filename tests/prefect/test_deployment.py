"""The deployments on a real server and worker, as a person uses them."""

import json
import subprocess
import sys

import pytest

from cache_store.store import Cache


@pytest.fixture
def deployment_run(stack, run_parameters):
    """Call ``prefect deployment run cache-then-train/local --watch`` with the small run and more parameters."""

    def start(check=True, **parameters):
        parameters = json.dumps({"config": run_parameters, **parameters})
        command = ("deployment", "run", "cache-then-train/local", "--watch", "--params", parameters)
        return stack.cli(*command, check=check)

    return start


def newest(stack):
    from prefect.client.schemas.sorting import FlowRunSort

    (run,) = stack.client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
    return run


@pytest.fixture
def submit(stack, cli_in):
    """Call ``diffsynth-pipe submit``."""
    return lambda *arguments: cli_in(stack.env, "submit", *arguments)


@pytest.fixture
def cli_in():
    def run(env, *arguments):
        command = [sys.executable, "-m", "diffsynth_pipe.cli", *map(str, arguments)]
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    return run


def test_the_prefect_way(stack, deployment_run, run_parameters, run_config):
    """Run to the LoRA; run again; another rank; the cache damaged under a server that says that all is done."""
    deployment_run()
    first = newest(stack)
    assert stack.task_states(first.id) == {"data_process": "Completed", "train": "Completed"}
    assert first.name.startswith("qwen_image lora r4 on photos, ")
    output = run_config().output_path
    assert len(list(_files(output, "dit_lora.safetensors"))) == 1

    deployment_run()
    second = newest(stack)
    assert stack.task_states(second.id) == {"data_process": "Cached", "train": "Cached"}
    assert second.name == first.name

    Cache.open(run_config().cache_dir).latest().array_path(0).unlink()
    deployment_run(overrides={"lora_rank": 2})
    other = newest(stack)
    assert stack.task_states(other.id) == {"data_process": "Resumed", "train": "Completed"}
    assert other.name.startswith("qwen_image lora r2 on photos, ")
    assert len(list(_files(output, "dit_lora.safetensors"))) == 2


def _files(folder, name):
    from pathlib import Path

    return Path(folder).rglob(name)


@pytest.mark.parametrize(
    ("parameters", "named"),
    [
        ({"overrides": {"lora_rank": 0}}, "overrides.lora_rank"),
        ({"overrides": {"lora_rank": "large"}}, "overrides.lora_rank"),
        ({"overrides": {"lora_rnak": 8}}, "lora_rnak"),
        ({"overrides": {"family": "qwen"}}, "overrides.family"),
        ({"stages": ["test"]}, "stages"),
    ],
)
def test_a_wrong_parameter_is_refused_before_a_run_exists(stack, deployment_run, parameters, named):
    before = {run.id for run in stack.client.read_flow_runs()}
    refused = deployment_run(check=False, **parameters)
    assert refused.returncode == 1
    assert named in refused.stdout + refused.stderr
    assert {run.id for run in stack.client.read_flow_runs()} == before
