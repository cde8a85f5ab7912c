"""A training that was stopped or killed goes on as if nothing had happened."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from small_trainings import LAUNCH_FILES, launch_command

from diffsynth_pipe import cli
from diffsynth_pipe.config import load_config
from diffsynth_pipe.errors import ConfigError, LaunchError, RunDirBusy, TrainingStopped
from diffsynth_pipe.launch import launch_train
from diffsynth_pipe.stages.plan import plan_train
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.train import main
from diffsynth_pipe.training.loop import Loop
from diffsynth_pipe.training.run_dir import list_checkpoints, only_training, resumable
from diffsynth_pipe.training.signals import StopSignals


def stop_after(monkeypatch, step, send):
    """Call ``send`` when this step of the next training has been taken."""
    take_step = Loop._step

    def take_step_and_send(self, number, batches):
        values = take_step(self, number, batches)
        if number == step:
            send()
        return values

    monkeypatch.setattr(Loop, "_step", take_step_and_send)


def stopped_at(parameters, step, number=signal.SIGTERM):
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, step, lambda: os.kill(os.getpid(), number))
        with pytest.raises(TrainingStopped) as stopped:
            train(load_config(None, parameters))
    assert (stopped.value.step, stopped.value.signal_number) == (step, number)


def launch_and_stop(parameters, engine, world_size, stop=None):
    """Train under a launch file of the project; send ``stop`` to all processes at the first checkpoint."""
    process = subprocess.Popen(
        launch_command(LAUNCH_FILES / f"{engine}.yaml", parameters, world_size),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = []
    for line in process.stdout:
        lines.append(line)
        if stop is not None and "gathered" in line:
            for member in (*psutil.Process(process.pid).children(recursive=True), process):
                member.send_signal(stop)
            stop = None
    return process.wait(), "".join(lines)


def losses(run_dir):
    """Return the loss of each step, whichever attempt took it last."""
    files = sorted(run_dir.glob("metrics*.jsonl"), key=lambda path: path.stat().st_mtime)
    lines = [json.loads(line) for path in files for line in path.read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "loss" in line}


def lora_bytes(result):
    return (result.path / result.summary["lora_path"]).read_bytes()


class GrowingSGD(torch.optim.SGD):
    """Takes steps that grow by a number in its group, as Prodigy does."""

    def __init__(self, params, lr, weight_decay):
        super().__init__(params, lr=lr, weight_decay=weight_decay)
        self.param_groups[0]["d"] = 1.0

    def step(self, closure=None):
        (group,) = self.param_groups
        group["d"] *= 1.1
        group["lr"] *= group["d"]
        return super().step(closure)


@pytest.fixture(autouse=True)
def _growing_sgd_has_a_path(monkeypatch):
    monkeypatch.setattr(torch.optim, "GrowingSGD", GrowingSGD, raising=False)


@pytest.fixture
def other_output(parameters, tmp_path):
    """The same training into another folder: the oracle, which nothing stops."""
    return parameters | {"output_path": str(tmp_path / "uninterrupted")}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"use_ema": True, "lr_scheduler": "cosine", "lr_warmup_steps": 2},
        {"customized_optimizer": "torch.optim.RMSprop", "gradient_accumulation_steps": 2},
        {"customized_optimizer": "torch.optim.GrowingSGD", "learning_rate": 1},
    ],
    ids=["adamw", "ema and cosine", "rmsprop and accumulation", "numbers in the group"],
)
@pytest.mark.parametrize("step", [1, 4])
def test_a_stopped_run_ends_with_the_weights_of_an_uninterrupted_one(parameters, other_output, changes, step):
    stopped_at(parameters | changes, step)
    config = load_config(None, parameters | changes)
    plan = plan_train(config)
    assert (plan.verdict, plan.why) == ("resume", f"stopped after step {step}")
    resumed = train(config)
    assert resumed.state == "Resumed"
    whole = train(load_config(None, other_output | changes))
    assert resumed.summary["digests"] == whole.summary["digests"]
    assert [resumed.summary[name] for name in ("loss_before", "loss_after")] == [
        whole.summary[name] for name in ("loss_before", "loss_after")
    ]


def test_a_run_goes_on_with_its_weights_and_optimizer_in_host_memory(parameters, other_output):
    changes = {"gradient_accumulation_steps": 2, "use_ema": True}
    offload = {"enable_model_cpu_offload": True, "enable_optimizer_cpu_offload": True}
    stopped_at(parameters | changes, 1)
    stopped_at(parameters | changes | offload, 2)
    resumed = train(load_config(None, parameters | changes | offload))
    whole = train(load_config(None, other_output | changes))
    assert resumed.state == "Resumed"
    assert resumed.summary["digests"] == whole.summary["digests"]


def test_a_run_by_relative_paths_is_resumed_from_anywhere(parameters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stopped_at(parameters | {"output_path": "relative"}, 2)
    (run_dir,) = (tmp_path / "relative").glob("train-*")
    monkeypatch.chdir(tmp_path.parent)
    started = []
    monkeypatch.setattr(os, "execv", lambda _, command: started.extend(command))
    assert cli.main(["resume", str(run_dir)]) == 0
    assert started[-1] == f"--config={run_dir / 'config.yaml'}"
    assert load_config(run_dir / "config.yaml", {}).output_path == str(tmp_path / "relative")


def test_it_can_be_stopped_again_and_again_by_either_signal(parameters, other_output):
    for step, number in ((2, signal.SIGINT), (3, signal.SIGTERM), (7, signal.SIGINT)):
        stopped_at(parameters, step, number)
    resumed = train(load_config(None, parameters))
    assert lora_bytes(resumed) == lora_bytes(train(load_config(None, other_output)))


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(parameters, other_output, caplog):
    stopped_at(parameters | {"save_steps": 2}, 5)
    config = load_config(None, parameters | {"save_steps": 2})
    run_dir = plan_train(config).path
    newest = resumable(run_dir)[-1]
    assert newest.step == 5
    weights = newest.state_folder / "weights.safetensors"
    damaged = bytearray(weights.read_bytes())
    damaged[-1] ^= 1
    weights.write_bytes(damaged)
    resumed = train(config)
    assert f"{weights} is not what was written; going back to an older checkpoint" in caplog.text
    assert lora_bytes(resumed) == lora_bytes(train(load_config(None, other_output)))


@pytest.mark.parametrize(("before", "after"), [(3, 5), (0, 5), (3, 0)])
def test_a_run_does_not_go_on_with_other_validation_samples(parameters, before, after):
    stopped_at(parameters | {"num_validation_samples": before}, 2)
    with pytest.raises(
        ConfigError, match=rf"^num_validation_samples: the run began with {before}, .* set it to {before}"
    ):
        train(load_config(None, parameters | {"num_validation_samples": after}))
    assert train(load_config(None, parameters | {"num_validation_samples": before})).state == "Resumed"


def test_an_optimizer_whose_state_cannot_be_saved_is_refused_after_one_step(parameters):
    config = load_config(None, parameters | {"customized_optimizer": "torch.optim.Adafactor"})
    with pytest.raises(LaunchError, match=r"^the optimizer's 'row_var' cannot be saved; choose another"):
        train(config)
    assert not losses(plan_train(config).path)


def test_a_checkpoint_of_another_run_is_refused_and_left_alone(parameters, tmp_path):
    stopped_at(parameters, 3)
    stranger = resumable(plan_train(load_config(None, parameters)).path)[-1]
    config = load_config(None, parameters | {"seed": 1})
    run_dir = plan_train(config).path
    copied = shutil.copytree(stranger.path, run_dir / stranger.path.name)
    with pytest.raises(ConfigError, match=f"{copied} is a checkpoint of another run; move it out of {run_dir}"):
        train(config)
    assert (copied / "dit_lora.safetensors").read_bytes() == (stranger.path / "dit_lora.safetensors").read_bytes()


def test_only_the_newest_states_and_the_wanted_checkpoints_are_kept(parameters):
    config = load_config(None, parameters | {"save_steps": 1, "checkpoints_total_limit": 3})
    stopped_at(parameters | {"save_steps": 1, "checkpoints_total_limit": 3}, 6)
    run_dir = plan_train(config).path
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [4, 5, 6]
    assert [checkpoint.step for checkpoint in resumable(run_dir)] == [5, 6]
    train(config)
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [7, 8, 9]
    assert not resumable(run_dir)  # a finished run needs none


@pytest.mark.parametrize("again", [train, launch_train])
def test_a_kill_before_the_states_of_a_finished_run_are_gone_leaves_none_for_good(parameters, monkeypatch, again):
    config = load_config(None, parameters)
    with monkeypatch.context() as patch:
        patch.setattr(Loop, "drop_states", lambda _: None)
        finished = train(config)
    assert resumable(finished.path)
    assert again(config).state == "Cached"
    assert not resumable(finished.path)
    assert lora_bytes(finished)


def test_a_checkpoint_that_nobody_asked_for_gives_way_to_one_that_somebody_did(parameters):
    changes = {"save_steps": 4}
    stopped_at(parameters | changes, 3)
    config = load_config(None, parameters | changes)
    run_dir = plan_train(config).path
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [3]
    train(config)
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [4, 8, 9]


def test_checkpoints_that_earlier_settings_asked_for_are_kept(parameters):
    stopped_at(parameters | {"save_steps": 2}, 5)
    result = train(load_config(None, parameters | {"save_steps": 3}))
    assert [checkpoint.step for checkpoint in list_checkpoints(result.path)] == [2, 4, 6, 9]
    (result.path / "run.json").unlink()  # as --force moves it aside
    train(load_config(None, parameters | {"save_steps": 5}))
    assert [checkpoint.step for checkpoint in list_checkpoints(result.path)] == [2, 4, 5, 6, 9]


def test_the_clock_asks_for_states_and_each_gives_way_to_the_next(parameters):
    changes = {"save_minutes": 0}
    stopped_at(parameters | changes, 5)
    run_dir = plan_train(load_config(None, parameters | changes)).path
    assert [checkpoint.step for checkpoint in list_checkpoints(run_dir)] == [4, 5]
    assert [checkpoint.step for checkpoint in resumable(run_dir)] == [4, 5]


def test_a_state_holds_what_is_trained_and_nothing_of_the_base(parameters):
    """Three times the LoRA (weights and both moments), whatever the size of the base."""
    stopped_at(parameters, 2)
    checkpoint = resumable(plan_train(load_config(None, parameters)).path)[-1]
    num_bytes = sum(path.stat().st_size for path in checkpoint.state_folder.glob("*.safetensors"))
    lora = load_file(checkpoint.path / "dit_lora.safetensors")
    payload = sum(tensor.nbytes for tensor in lora.values())
    assert all(tensor.numel() and tensor.isfinite().all() for tensor in lora.values())
    assert 3 * payload <= num_bytes < 3 * payload + 3 * 200 * len(lora)  # less than 200 bytes of header per tensor


def test_a_kill_at_any_moment_costs_steps_and_no_bit_of_the_result(parameters, other_output, tmp_path):
    """SIGKILL from a thread, at random moments; the run is long enough for all of them."""
    parameters |= {"num_epochs": 8, "save_steps": 2, "num_validation_samples": 0}
    whole = train(load_config(None, parameters | {"output_path": other_output["output_path"]}))
    command = [sys.executable, "-m", "diffsynth_pipe.train"]
    command += [text for name, value in parameters.items() for text in (f"--{name}", str(value))]
    draw = random.Random(0)
    run_dir = plan_train(load_config(None, parameters)).path
    num_kills = 0
    while not (run_dir / "run.json").exists():
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seen = []
        for line in process.stdout:
            seen.append(line)
            if num_kills < 2 and "gathered" in line:
                threading.Timer(draw.random() * 0.1, process.kill).start()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, "".join(seen)
        num_kills += 1
    assert num_kills == 2
    run = json.loads((run_dir / "run.json").read_text())
    assert (run_dir / run["lora_path"]).read_bytes() == lora_bytes(whole)


def test_a_full_disk_ends_in_one_line_and_costs_no_checkpoint(parameters, capfd):
    """``RLIMIT_FSIZE`` stands for a full disk: the kernel itself refuses the write."""
    stopped_at(parameters, 2)
    run_dir = plan_train(load_config(None, parameters)).path
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 * 1024, old[1]))  # less than the LoRA
    try:
        assert main([text for name, value in parameters.items() for text in (f"--{name}", str(value))]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
    errors = capfd.readouterr().err
    assert re.search(rf"^error: step \d+ cannot be saved in {run_dir}: .*File too large", errors, re.MULTILINE)
    assert "Traceback" not in errors
    assert [checkpoint.step for checkpoint in resumable(run_dir)] == [2]
    assert train(load_config(None, parameters)).state == "Resumed"


@pytest.mark.parametrize("engine", ["ddp", "zero3_cpu_offload"])
def test_the_number_of_ranks_may_change_on_the_way(parameters, other_output, engine):
    """One rank, then two, then one: the same samples, noise and noise levels in each step, so the same losses."""
    changes = {"batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 1, "num_validation_samples": 0}
    whole = train(load_config(None, other_output | changes))
    stopped_at(parameters | changes, 3)
    code, output = launch_and_stop(parameters | changes, engine, 2, stop=signal.SIGTERM)
    assert code != 0, output
    assert "goes on after step 3 of 9" in output, output
    run_dir = plan_train(load_config(None, parameters | changes)).path
    assert 3 < resumable(run_dir)[-1].step < 9, output
    resumed = train(load_config(None, parameters | changes))
    assert losses(run_dir) == pytest.approx(losses(whole.path), rel=1e-5)
    lora, expected = (load_file(result.path / result.summary["lora_path"]) for result in (resumed, whole))
    for name, tensor in expected.items():
        torch.testing.assert_close(lora[name], tensor, rtol=0, atol=1e-4)


@pytest.mark.parametrize(("engine", "world_size"), [("zero2_cpu_offload", 2), ("zero3_cpu_offload", 2)])
def test_a_killed_run_under_zero_ends_with_the_bits_of_an_uninterrupted_one(
    parameters, other_output, engine, world_size
):
    changes = {"batch_size": 1, "save_steps": 2, "num_validation_samples": 0}
    code, output = launch_and_stop(parameters | changes, engine, world_size, stop=signal.SIGKILL)
    assert code == -signal.SIGKILL, output
    code, output = launch_and_stop(parameters | changes, engine, world_size)
    assert code == 0, output
    assert "goes on after step" in output
    code, whole_output = launch_and_stop(other_output | changes, engine, world_size)
    assert code == 0, whole_output
    (run_dir,), (whole_dir,) = (Path(p["output_path"]).glob("train-*") for p in (parameters, other_output))
    digests = [json.loads((path / "run.json").read_text())["digests"] for path in (run_dir, whole_dir)]
    assert digests[0] == digests[1]


def test_ranks_that_the_global_batch_does_not_divide_among_are_refused(parameters):
    stopped_at(parameters | {"batch_size": 1, "gradient_accumulation_steps": 3}, 2)
    code, output = launch_and_stop(parameters | {"batch_size": 1, "gradient_accumulation_steps": 3}, "ddp", 2)
    assert code != 0
    assert "error: the run began with 3 micro-batches per optimizer step, which do not divide among 2 ranks" in output


def test_ranks_that_see_different_checkpoints_are_refused(parameters, tmp_path, monkeypatch):
    """As on two machines without a shared folder: rank 1 works in a folder of its own."""
    changes = {"batch_size": 1, "gradient_accumulation_steps": 2, "output_path": "relative"}
    monkeypatch.chdir(tmp_path)
    stopped_at(parameters | changes, 2)
    (tmp_path / "other").mkdir()
    (tmp_path / "sitecustomize.py").write_text("import os\nif os.environ.get('RANK') == '1':\n    os.chdir('other')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    code, output = launch_and_stop(parameters | changes, "ddp", 2)
    assert code != 0
    assert re.search(r"error.*: relative/train-\w+: rank \d would go on after step [02], others after [02];", output)


def test_ranks_stop_and_save_when_their_launcher_is_killed(parameters):
    changes = {"batch_size": 1, "num_epochs": 1000}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "1", "-m", "diffsynth_pipe.train"]
    command += [str(text) for name, value in (parameters | changes).items() for text in (f"--{name}", value)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as launcher:
        for line in launcher.stdout:
            if "gathered" in line:
                ranks = psutil.Process(launcher.pid).children(recursive=True)
                launcher.kill()
                break
        rest = launcher.stdout.read()  # to its end: the ranks hold the other end of the pipe
    assert "stopped after step" in rest
    assert not any(rank.is_running() and rank.status() != psutil.STATUS_ZOMBIE for rank in ranks)


@pytest.mark.parametrize("is_main", [True, False])
def test_rank_0_alone_saves_when_its_peers_are_gone(parameters, monkeypatch, is_main):
    waits = []
    peers_needed = StopSignals.peers_needed

    @contextlib.contextmanager
    def note(signals):
        with peers_needed(signals):
            waits.append(True)
            yield
            waits.pop()

    def save_and_leave(loop, step):
        assert bool(waits) is not is_main
        raise KeyboardInterrupt

    monkeypatch.setattr(StopSignals, "peers_needed", note)
    monkeypatch.setattr(Loop, "_save", save_and_leave)
    monkeypatch.setattr(Accelerator, "is_main_process", is_main)
    with pytest.raises(KeyboardInterrupt):
        train(load_config(None, parameters | {"max_steps": 1}))


def test_two_trainings_of_one_run_do_not_write_over_each_other(parameters):
    config = load_config(None, parameters)
    run_dir = plan_train(config).path
    run_dir.mkdir(parents=True)
    with only_training(run_dir), pytest.raises(RunDirBusy, match=f"another process trains into {run_dir}"):
        train(config)
    assert not [path.name for path in run_dir.iterdir() if not path.name.startswith(".")]
