"""A stopped command line takes the server that Prefect started for it along."""

import contextlib
import os
import select
import signal
import subprocess
import sys

import pytest

COMMAND = """
import signal, sys
from pathlib import Path
from diffsynth_pipe import launch
from diffsynth_pipe.stages.plan import StagePlan
from flows import cache_then_train

def stage(config, force, on_line):
    from prefect.server.api.server import SubprocessASGIServer
    server, = SubprocessASGIServer._instances.values()
    on_line(f"server {server.server_process.pid}")
    command = [sys.executable, "-c", "import signal; signal.pause()"]
    launch.run_supervised(command, run_dir=Path(sys.argv[1]), log_name="stage.log", on_line=on_line)

signal.signal(signal.SIGINT, signal.default_int_handler)
launch.launch_data_process = stage
plan = StagePlan(stage="data_process", verdict="build", key="0", path=Path("x"), why="nothing on disk")
cache_then_train.plan_stages = lambda config, stages: [plan]
sys.exit(cache_then_train.main(["--dataset_base_path=data", f"--output_path={sys.argv[1]}", "--stages=data_process"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_command_leaves_no_server(tmp_path, number):
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_API")}
    with subprocess.Popen(
        [sys.executable, "-c", COMMAND, str(tmp_path / "output")],
        env={**environment, "PREFECT_HOME": str(tmp_path / "prefect")},
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        line = next(line for line in process.stderr if line.startswith("server "))
        server = os.pidfd_open(int(line.split()[1]))
        try:
            process.send_signal(number)
            process.communicate(timeout=60)
            ended, _, _ = select.select([server], [], [], 10)
            assert ended, "the server outlived the command"
            assert process.returncode == 128 + number
        finally:
            process.kill()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(server, signal.SIGKILL)
            os.close(server)
