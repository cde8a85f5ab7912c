"""A Prefect server and a worker of the tests' own, with the deployments of ``deploy/prefect.yaml``."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import psutil
import pytest
from prefect.client.orchestration import SyncPrefectClient
from prefect.exceptions import ObjectNotFound
from small_trainings import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator

PROJECT = Path(__file__).parents[2]
POLL_S = 0.5


class Stack:
    """``prefect server`` with sqlite, work pool ``local``, a worker, all deployed.

    Attributes:
        env: The environment of all that the stack starts; changes act on what is started afterwards.
        client: Prefect's client of this server.
        server, worker: Their processes; each leads a session of its own.
    """

    def __init__(self, folder: Path, env: dict[str, str]) -> None:
        self.folder = folder
        self.port = free_port()
        url = f"http://127.0.0.1:{self.port}/api"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.env = {
            **inherited,
            **env,
            "PREFECT_HOME": str(folder / "home"),
            "PREFECT_API_URL": url,
            "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
            "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
            "PREFECT_WORKER_QUERY_SECONDS": "1",
            "PYTHONUNBUFFERED": "1",
        }
        self.client = SyncPrefectClient(url)
        self._processes: list[subprocess.Popen[bytes]] = []

    def start(self) -> None:
        """Start the server, deploy, start a worker."""
        self.start_server()
        for pool, kind in (("local", "process"), ("gpu-docker", "docker"), ("gpu-kubernetes", "kubernetes")):
            self.cli("work-pool", "create", pool, "--type", kind)
        self.cli("--no-prompt", "deploy", "--all", "--prefect-file", "deploy/prefect.yaml")
        self.worker = self.spawn_worker()

    def cli(self, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run ``prefect ...`` from the project's root."""
        command = [sys.executable, "-m", "prefect", *map(str, arguments)]
        done = subprocess.run(command, cwd=PROJECT, env=self.env, capture_output=True, text=True, timeout=300)
        assert not check or done.returncode == 0, done.stdout + done.stderr
        return done

    def spawn(self, log_name: str, *arguments: object) -> subprocess.Popen[bytes]:
        """Start ``prefect ...`` in a session of its own; its output goes to ``folder/log_name``."""
        command = [sys.executable, "-m", "prefect", *map(str, arguments)]
        with (self.folder / log_name).open("ab") as log:
            process = subprocess.Popen(
                command, cwd=PROJECT, env=self.env, stdout=log, stderr=log, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
        self._processes.append(process)
        return process

    def start_server(self) -> None:
        """Start the server on the stack's port and database; wait until it answers."""
        self.server = self.spawn("server.log", "server", "start", "--host", "127.0.0.1", "--port", self.port)

        def answers() -> bool:
            assert self.server.poll() is None, (self.folder / "server.log").read_text()[-2000:]
            return self.client.api_healthcheck() is None

        self.wait(answers)

    def spawn_worker(self, *arguments: object, pool: str = "local") -> subprocess.Popen[bytes]:
        """Start a worker that takes one run at a time."""
        return self.spawn("worker.log", "worker", "start", "--pool", pool, "--limit", 1, *arguments)

    def kill(self, process: subprocess.Popen[bytes], number: int = signal.SIGKILL) -> None:
        """Signal the process's session and wait for the process; what left the session lives on."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        process.wait(60)

    def restart_server(self) -> None:
        """Kill the server and start it again on the same database."""
        self.kill(self.server)
        self.start_server()

    def restart_worker(self) -> None:
        """Kill the worker and start another."""
        self.kill(self.worker)
        self.worker = self.spawn_worker()

    def submit(self, config: dict[str, object], **parameters: object):
        """Create a run of deployment ``local``; return it."""
        deployment = self.client.read_deployment_by_name("cache-then-train/local")
        return self.client.create_flow_run_from_deployment(deployment.id, parameters={"config": config, **parameters})

    def wait_for_state(self, flow_run_id, *names: str, timeout_s: float = 120):
        """Wait until the run is in one of these states, by default in a final one; return the run."""

        def reached():
            run = self.client.read_flow_run(flow_run_id)
            done = run.state_name in names if names else run.state.is_final()
            return run if done else None

        return self.wait(reached, timeout_s)

    def task_states(self, flow_run_id) -> dict[str, str]:
        """Return the states of a finished run's tasks; they reach the server a moment after the run's."""
        from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterId

        chosen = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))

        def final():
            runs = self.client.read_task_runs(flow_run_filter=chosen)
            return runs if runs and all(run.state and run.state.is_final() for run in runs) else None

        # A retry of the flow makes new runs of its tasks; the last one counts.
        return {run.name: run.state_name for run in sorted(self.wait(final), key=lambda run: run.created)}

    def wait(self, condition, timeout_s: float = 120):
        """Call ``condition`` until it returns something true; return that."""
        deadline = time.monotonic() + timeout_s
        while True:
            with contextlib.suppress(ObjectNotFound):
                if found := condition():
                    return found
            assert time.monotonic() < deadline, f"{condition.__name__}: not within {timeout_s} s"
            time.sleep(POLL_S)

    def processes(self) -> list[psutil.Process]:
        """Return all living processes that the stack started, however far down: they inherit its ``PREFECT_HOME``."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("PREFECT_HOME") == self.env["PREFECT_HOME"]:
                    found.append(process)
        return found

    def close(self) -> None:
        """Kill all that is left."""
        for process in self.processes():
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        for process in self._processes:
            process.wait(60)


@pytest.fixture(scope="session")
def stack(tmp_path_factory, tiny_repo) -> Iterator[Stack]:
    """The running stack; runs find the tiny model. Tests that stop a part of it start it again."""
    env = {"DIFFSYNTH_MODEL_BASE_PATH": str(tiny_repo.parents[1]), "DIFFSYNTH_SKIP_DOWNLOAD": "True"}
    stack = Stack(tmp_path_factory.mktemp("stack"), env)
    try:
        stack.start()
        yield stack
    finally:
        stack.close()
