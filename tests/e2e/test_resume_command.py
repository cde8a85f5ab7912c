"""``diffsynth-pipe resume`` goes on with a run that was stopped."""

import shutil
import signal
import subprocess
import sys

import pytest

from diffsynth_pipe.stages.plan import read_run
from diffsynth_pipe.stages.train import train

LENGTH = {"dataset_repeat": 30, "save_steps": 5, "checkpoints_total_limit": 1, "num_validation_samples": 0}


@pytest.fixture
def stopped(run_file, run_config, monkeypatch, tmp_path):
    """Stop ``diffsynth-pipe run`` by SIGTERM while it trains; return the run directory."""
    monkeypatch.setenv("PREFECT_HOME", str(tmp_path / "prefect"))
    for name in ("PREFECT_API_URL", "PREFECT_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    command = [sys.executable, "-m", "diffsynth_pipe.cli", "run", str(run_file(**LENGTH))]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as run:
        lines = []
        for line in run.stderr:
            lines.append(line)
            if "saved step-" in line:
                run.send_signal(signal.SIGTERM)
                break
        lines += run.stderr
    (run_dir,) = (tmp_path / "output").glob("train-*")
    assert run.returncode == 128 + signal.SIGTERM, "".join(lines)
    assert read_run(run_dir) is None
    return run_dir


def test_a_stopped_run_goes_on_from_its_cache_to_the_same_bytes(stopped, run_config, cli, tmp_path):
    resumed = cli("resume", tmp_path / "cache")
    assert resumed.returncode == 0, resumed.stderr
    assert "data_process: Cached" in resumed.stdout
    assert "train: Resumed" in resumed.stdout
    left_alone = train(run_config(**LENGTH, task="sft:train", output_path=str(tmp_path / "left_alone")))
    assert read_run(stopped)["digests"] == left_alone.summary["digests"]

    moved = shutil.move(stopped, tmp_path / "moved")
    refused = cli("resume", moved)
    assert refused.returncode == 2
    assert f"start in {stopped}" in refused.stderr
