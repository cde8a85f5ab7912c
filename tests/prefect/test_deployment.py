"""The deployments on a real server and worker, as a person uses them."""

import contextlib
import json
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from prefect.client.schemas.sorting import FlowRunSort

from cache_store.store import Cache
from diffsynth_pipe.launch import launch_data_process, launch_train
from flows.automations import NAME


@pytest.fixture
def deployment_run(stack, run_parameters):
    """Call ``prefect deployment run cache-then-train/local --watch`` with the small run and more parameters."""

    def start(check=True, **parameters):
        parameters = json.dumps({"config": run_parameters, **parameters})
        command = ("deployment", "run", "cache-then-train/local", "--watch", "--params", parameters)
        return stack.cli(*command, check=check)

    return start


def newest(stack):
    (run,) = stack.client.read_flow_runs(sort=FlowRunSort.EXPECTED_START_TIME_DESC, limit=1)
    return run


@pytest.fixture
def submit(stack, run_file):
    """Call ``diffsynth-pipe submit`` with the small run."""

    def start(*arguments, url=None):
        command = [sys.executable, "-m", "diffsynth_pipe.cli", "submit", str(run_file()), *arguments]
        env = stack.env | ({"PREFECT_API_URL": url} if url else {})
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)

    return start


def test_the_prefect_way(stack, deployment_run, run_parameters, run_config):
    """Run to the LoRA; run again; another rank; the cache damaged under a server that says that all is done."""
    deployment_run()
    first = newest(stack)
    assert stack.task_states(first.id) == {"data_process": "Completed", "train": "Completed"}
    assert first.name.startswith("qwen_image lora r4 on photos, ")
    output = Path(run_config().output_path)
    assert len(list(output.rglob("dit_lora.safetensors"))) == 1

    deployment_run()
    second = newest(stack)
    assert stack.task_states(second.id) == {"data_process": "Cached", "train": "Cached"}
    assert second.name == first.name

    Cache.open(run_config().cache_dir).latest().array_path(0).unlink()
    deployment_run(overrides={"lora_rank": 2})
    other = newest(stack)
    assert stack.task_states(other.id) == {"data_process": "Resumed", "train": "Completed"}
    assert other.name.startswith("qwen_image lora r2 on photos, ")
    assert len(list(output.rglob("dit_lora.safetensors"))) == 2


def test_a_new_database_changes_nothing(stack, run_config, run_parameters):
    """What is done is done, though the server has never heard of it."""
    launch_data_process(run_config())
    launch_train(run_config())
    stack.kill(stack.worker)
    stack.kill(stack.server)
    for file in Path(stack.env["PREFECT_HOME"]).glob("prefect.db*"):
        file.unlink()
    stack.start()
    run = stack.submit(run_parameters)
    assert stack.wait_for_state(run.id).state_name == "Completed"
    assert stack.task_states(run.id) == {"data_process": "Cached", "train": "Cached"}


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


def test_submit_says_that_nothing_is_to_do(submit, run_config):
    """Without a server: the disk says it. So a wiped database changes nothing."""
    launch_data_process(run_config())
    launch_train(run_config())
    done = submit(url="http://127.0.0.1:9/api")
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout


def test_submit_refuses_before_it_asks_the_server(submit):
    refused = submit("--lora_rank", "0", url="http://127.0.0.1:9/api")
    assert refused.returncode == 2
    assert refused.stderr.startswith("error: lora_rank")
    assert len(refused.stderr.splitlines()) == 1


def test_submit_watches_the_run_to_its_end(stack, submit):
    watched = submit("--stages", "data_process", "--watch")
    assert watched.returncode == 0, watched.stdout + watched.stderr
    run = newest(stack)
    assert run.name.startswith("qwen_image cache on photos, ")
    assert f"Created flow run '{run.name}'" in watched.stdout
    assert str(run.id) in watched.stdout
    assert stack.task_states(run.id) == {"data_process": "Completed"}

    failed = submit("--watch", "--accelerate_config_file", "missing.yaml")
    assert failed.returncode == 1, failed.stdout


@pytest.fixture
def automation(stack):
    """Install the automation, which then waits for 10 s, the least; afterwards as users have it."""

    def install(seconds):
        arguments = f"from flows import automations; automations.install(automations.timedelta(seconds={seconds}))"
        subprocess.run([sys.executable, "-c", arguments], env=stack.env, check=True, timeout=60)

    install(90)
    install(10)
    yield
    install(90)


def test_a_run_whose_machine_vanished_is_crashed_and_can_be_retried(stack, automation, run_parameters):
    assert len(stack.client.read_automations_by_name(NAME)) == 1
    run = stack.submit(run_parameters)
    stack.wait_for_state(run.id, "Running")
    server = {stack.server.pid, *(child.pid for child in psutil.Process(stack.server.pid).children(recursive=True))}
    for process in stack.processes():
        if process.pid not in server:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    stack.worker.wait(60)
    assert stack.wait_for_state(run.id).state_name == "Crashed"

    stack.worker = stack.spawn_worker()
    stack.cli("flow-run", "retry", run.id)
    assert stack.wait_for_state(run.id, "Completed", "Failed").state_name == "Completed"


def test_job_variables_are_those_of_the_pools(stack):
    """Prefect drops an unknown one without a word."""
    deployments = stack.client.read_deployments()
    assert {deployment.name for deployment in deployments} == {"local", "docker", "kubernetes"}
    for deployment in deployments:
        pool = stack.client.read_work_pool(deployment.work_pool_name)
        known = pool.base_job_template["variables"]["properties"]
        assert deployment.job_variables.keys() <= known.keys()
        limit = deployment.concurrency_options and deployment.concurrency_options.collision_strategy
        is_limited = "cache_then_train" in deployment.entrypoint and deployment.name != "kubernetes"
        assert limit == ("ENQUEUE" if is_limited else None)
