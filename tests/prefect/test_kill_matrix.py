"""A run of a deployment that is stopped in every place, and runs that meet in one place."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import yaml
from PIL import Image
from prefect.client.schemas.actions import DeploymentUpdate
from prefect.client.schemas.filters import LogFilter, LogFilterFlowRunId
from prefect.states import Cancelling
from small_trainings import LAUNCH_FILES, free_port

from cache_store.verify import verify
from diffsynth_pipe.launch import launch_train, stage_config
from diffsynth_pipe.stages.data_process import data_process as run_data_process
from diffsynth_pipe.stages.plan import read_run

DEADLINE_S = 60
HOLD_POLL_S = 0.02

NUM_PICTURES = 140
DATA_PROCESS_MOVES = r"data_process \w+: +\d+%\|[^|]*\| [1-9]"
TRAIN_MOVES = r"saved step-"


class Stage:
    """The processes of a stage of one run.

    Frozen at a moment that its log shows, they go on when the kernel holds a SIGTERM for them: however slow the way
    of a request is, it meets the stage at work.
    """

    def __init__(self, stack, module: str, log: Path) -> None:
        self._stack, self._module, self.log = stack, module, log
        self._begin = 0

    def hold(self, pattern: str, num_processes: int):
        """Freeze the stage when what the present attempt logs matches; return the processes."""
        deadline = time.monotonic() + 2 * DEADLINE_S
        while not (self.log.exists() and re.search(pattern, self.log.read_text()[self._begin :])):
            assert time.monotonic() < deadline, f"no {pattern} in {self.log}"
            time.sleep(HOLD_POLL_S)
        held = [process for process in self._stack.processes() if self._is_ours(process.cmdline())]
        for process in held:
            process.suspend()
        assert len(held) == num_processes, held
        # A SIGTERM that comes before the process has stopped would overtake SIGSTOP, and never be seen pending.
        self._stack.wait(lambda: all(process.status() == psutil.STATUS_STOPPED for process in held), DEADLINE_S)
        return held

    def let_go_at_sigterm(self, processes) -> None:
        """Wait until SIGTERM is pending for each, let them go on, and wait until they are gone."""
        for process in processes:
            self._stack.wait(lambda process=process: _is_pending(process, signal.SIGTERM), DEADLINE_S)
            process.resume()
        wait_until_gone(self._stack, processes)
        self._begin = len(self.log.read_text())

    def _is_ours(self, command) -> bool:
        launchers = {"diffsynth_pipe.guard", "accelerate.commands.launch"}
        return self._module in command and launchers.isdisjoint(command)


def _is_pending(process, number: int) -> bool:
    status = Path(f"/proc/{process.pid}/status").read_text()
    return bool(int(re.search(r"ShdPnd:\s*(\w+)", status)[1], 16) >> (number - 1) & 1)


def guard_of(process):
    return next(parent for parent in process.parents() if "diffsynth_pipe.guard" in parent.cmdline())


def wait_until_gone(stack, processes) -> None:
    def gone():
        return set(stack.processes()).isdisjoint(processes)

    stack.wait(gone, DEADLINE_S)


def wait_until_idle(stack) -> None:
    """Wait until nothing lives that the stack started, but the server and the worker themselves."""

    def idle():
        server = psutil.Process(stack.server.pid)
        own = {server, *server.children(recursive=True)}
        if stack.worker.poll() is None:
            own.add(psutil.Process(stack.worker.pid))
        return own.issuperset(stack.processes())

    stack.wait(idle, DEADLINE_S)


@pytest.fixture
def parameters(run_parameters, tmp_path):
    """A run whose training takes two ranks, with work enough to be met at it in each stage again and again."""
    settings = yaml.safe_load((LAUNCH_FILES / "ddp.yaml").read_text()) | {"main_process_port": free_port()}
    launch_file = tmp_path / "ddp.yaml"
    launch_file.write_text(yaml.safe_dump(settings))
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    rows = []
    for number in range(NUM_PICTURES):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{number}.png")
        rows.append({"image": f"{number}.png", "prompt": f"picture {number}"})
    (folder / "metadata.json").write_text(json.dumps(rows))
    return run_parameters | {
        "dataset_base_path": str(folder),
        "dataset_metadata_path": str(folder / "metadata.json"),
        "accelerate_config_file": str(launch_file),
        "save_steps": 5,
        "checkpoints_total_limit": 1,
        "num_validation_samples": 0,
        "cache_commit_seconds": 0.05,
    }


@pytest.mark.torture
@pytest.mark.parametrize(
    ("in_data_process", "in_train"),
    [(["cancel", "kill_flow", "kill_worker"], []), (["cancel"], ["cancel", "kill_flow", "kill_worker"])],
)
def test_a_run_that_is_stopped_everywhere_ends_as_if_left_alone(
    stack, parameters, run_config, tmp_path, in_data_process, in_train
):
    config = run_config(**parameters)
    left_alone = config.model_copy(
        update={"output_path": str(tmp_path / "left_alone"), "cache_path": str(tmp_path / "other_cache")}
    )
    run_data_process(stage_config(left_alone, "data_process"))
    expected = launch_train(left_alone)

    run = stack.submit(parameters)
    data_process = Stage(stack, "diffsynth_pipe.cli", tmp_path / "cache-logs" / "data_process.log")
    run_dir = tmp_path / "output" / expected.path.name
    train = Stage(stack, "diffsynth_pipe.train", run_dir / "train.log")

    def cancel(_):
        stack.client.set_flow_run_state(run.id, Cancelling())
        return "Cancelled"

    def kill_flow(guard):
        guard.parent().kill()
        return "Crashed"

    def kill_worker(_):
        stack.kill(stack.worker)
        return "Crashed"

    stops = {"cancel": cancel, "kill_flow": kill_flow, "kill_worker": kill_worker}

    def tried_again():
        # Prefect's worker may report a killed flow twice; the second report undoes a retry that came before it.
        state = stack.client.read_flow_run(run.id).state
        if state.is_final():
            stack.cli("flow-run", "retry", run.id)
        return state.is_running()

    def stop_in(stage, pattern, num_processes, stop):
        held = stage.hold(pattern, num_processes)
        state = stops[stop](guard_of(held[0]))
        stage.let_go_at_sigterm(held)
        assert stack.wait_for_state(run.id).state_name == state
        wait_until_idle(stack)
        assert verify(config.cache_dir, full=True) == []
        assert read_run(run_dir) is None
        if stop == "kill_worker":
            stack.restart_worker()
        stack.wait(tried_again)

    for stop in in_data_process:
        stop_in(data_process, DATA_PROCESS_MOVES, 1, stop)
    for stop in in_train:
        stop_in(train, TRAIN_MOVES, 2, stop)

    # SIGKILL of the launcher, and of one rank: the task tries again by itself.
    held = train.hold(TRAIN_MOVES, 2)
    family = [*held, held[0].parent(), guard_of(held[0])]
    held[0].parent().kill()
    train.let_go_at_sigterm(held)
    wait_until_gone(stack, family)
    assert verify(config.cache_dir, full=True) == []

    killed, other = held = train.hold(TRAIN_MOVES, 2)
    family = [*held, killed.parent(), guard_of(killed)]
    killed.kill()
    train.let_go_at_sigterm([other])
    wait_until_gone(stack, family)
    assert verify(config.cache_dir, full=True) == []

    # SIGKILL of the server: the run goes on.
    held = train.hold(TRAIN_MOVES, 2)
    stack.restart_server()
    for process in held:
        process.resume()
    assert stack.wait_for_state(run.id).state_name == "Completed"
    wait_until_idle(stack)
    assert verify(config.cache_dir, full=True) == []
    assert train.log.read_text().count("goes on after step") == len(in_train) + 2
    assert read_run(run_dir)["digests"] == expected.summary["digests"]


@pytest.fixture
def second_worker(stack):
    """A worker beside the first, and a deployment that lets both work: the locks alone keep the runs apart."""
    deployment = stack.client.read_deployment_by_name("cache-then-train/local")
    stack.client.update_deployment(deployment.id, DeploymentUpdate(concurrency_limit=2))
    worker = stack.spawn_worker()
    yield worker
    stack.kill(worker)
    stack.client.update_deployment(deployment.id, DeploymentUpdate(concurrency_limit=1))


def test_of_runs_of_one_config_one_works_and_the_others_wait(stack, second_worker, run_parameters, tmp_path):
    """Two of the deployment, of which the second is cancelled and tried again, and one of the command line."""
    parameters = run_parameters | {"dataset_repeat": 20, "save_steps": 5, "num_validation_samples": 0}
    run_file = tmp_path / "run.yaml"
    run_file.write_text(yaml.safe_dump(parameters))

    first = stack.submit(parameters)
    (run_dir,) = stack.wait(lambda: list((tmp_path / "output").glob("train-*")))
    train = Stage(stack, "diffsynth_pipe.train", run_dir / "train.log")
    (held,) = train.hold(TRAIN_MOVES, 1)

    second = stack.submit(parameters)
    wait_for_log(stack, second, f"waiting for {run_dir}", 1)
    stack.cli("flow-run", "cancel", second.id)
    assert stack.wait_for_state(second.id).state_name == "Cancelled"
    assert held.status() == psutil.STATUS_STOPPED
    stack.cli("flow-run", "retry", second.id)
    wait_for_log(stack, second, f"waiting for {run_dir}", 2)
    command = [sys.executable, "-m", "diffsynth_pipe.cli", "train", str(run_file)]
    with subprocess.Popen(command, env=stack.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as third:
        assert any(line.startswith(f"waiting for {run_dir}") for line in third.stderr)
        held.resume()
        assert stack.wait_for_state(first.id).state_name == "Completed"
        output, errors = third.communicate(timeout=DEADLINE_S)
    assert third.returncode == 0, errors
    assert "train: Cached" in output
    assert stack.wait_for_state(second.id).state_name == "Completed"
    assert stack.task_states(first.id) == {"data_process": "Completed", "train": "Completed"}
    assert set(stack.task_states(second.id).values()) == {"Cached"}

    assert len(list((tmp_path / "cache" / "journal").iterdir())) == 1
    assert len(list(tmp_path.rglob("run.json"))) == 1
    steps = [
        json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines() if "grad_norm" in line
    ]
    assert steps == list(range(1, 6 * 20 + 1))


def wait_for_log(stack, run, text: str, count: int) -> None:
    chosen = LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id]))

    def logged():
        return sum(text in log.message for log in stack.client.read_logs(chosen)) == count

    stack.wait(logged)
