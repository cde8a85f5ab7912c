"""A training that was stopped or killed goes on as if nothing had happened."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading

import pytest
from safetensors.torch import load_file

from diffsynth_pipe.config import load_config
from diffsynth_pipe.errors import ConfigError, TrainingStopped
from diffsynth_pipe.stages.plan import plan_train
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.training.loop import Loop
from diffsynth_pipe.training.run_dir import list_checkpoints, resumable


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


def lora_bytes(result):
    return (result.path / result.summary["lora_path"]).read_bytes()


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
    ],
    ids=["adamw", "ema and cosine", "rmsprop and accumulation"],
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
    """SIGKILL from a thread, at random moments, until the run gets through."""
    whole = train(load_config(None, other_output | {"save_steps": 1}))
    command = [sys.executable, "-m", "diffsynth_pipe.train", "--save_steps", "1"]
    command += [text for name, value in parameters.items() for text in (f"--{name}", str(value))]
    draw = random.Random(0)
    run_dir = plan_train(load_config(None, parameters)).path
    num_kills = 0
    while not (run_dir / "run.json").exists():
        process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        seen = []
        for line in process.stdout:
            seen.append(line)
            if num_kills < 3 and "gathered" in line:
                threading.Timer(draw.random() * 0.1, process.kill).start()
        if process.wait() == 0:
            break
        assert process.returncode == -signal.SIGKILL, "".join(seen)
        num_kills += 1
    assert num_kills == 3
    run = json.loads((run_dir / "run.json").read_text())
    assert (run_dir / run["lora_path"]).read_bytes() == lora_bytes(whole)
