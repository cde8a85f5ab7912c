"""Every engine and every way to save memory against plain torch, on the tiny denoiser."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from cache_store.store import Cache, SealedSample
from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import load_family
from diffsynth_pipe.stages.train import train

DEPLOY = Path(__file__).parents[2] / "deploy"
FAMILY = load_family("qwen_image")


@pytest.fixture(autouse=True)
def _fresh_accelerate(monkeypatch):
    """Forget the process-wide state that accelerate keeps, as a new process would."""
    from accelerate.state import AcceleratorState, GradientState

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "ACCELERATE_USE_DEEPSPEED"):
        monkeypatch.delenv(name, raising=False)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    """A sealed cache of four random samples with prompts of different lengths."""
    root = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    specs = {unit.name: unit.outputs for unit in FAMILY.units}
    cache, samples = Cache.open_or_new(root), []
    with cache.writer() as writer:
        for length in (5, 9, 3, 12):
            key = f"{len(samples):032x}"
            writer.add("latents", key, {"latents": random_bf16(rng, (16, 1, 8, 8))}, specs["latents"])
            writer.add("text", key, {"prompt_emb": random_bf16(rng, (length, 64))}, specs["text"])
            keys = {"latents": key, "text": key}
            samples.append(SealedSample(sample_id=key, bucket="64x64", source=f"row {len(samples)}", keys=keys))
    cache.seal(samples, {"family": "qwen_image"})
    return root


def random_bf16(rng, shape):
    return torch.from_numpy(rng.standard_normal(shape)).to(torch.bfloat16).view(torch.uint16).numpy()


@pytest.fixture
def parameters(cache_dir, tiny_repo, tmp_path):
    return {
        "task": "sft:train",
        "dataset_base_path": str(cache_dir),
        "model_paths": json.dumps([str(tiny_repo / "transformer" / "diffusion_pytorch_model.safetensors")]),
        "lora_base_model": "dit",
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "batch_size": 2,
        "dataset_repeat": 2,
        "num_validation_samples": 0,
        "output_path": str(tmp_path / "output"),
    }


def launch(config_file, parameters, *, num_processes=1, cwd=None, **env):
    """Run ``accelerate launch --config_file CONFIG_FILE -m diffsynth_pipe.train`` to its end."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    command += ["--num_processes", num_processes, "--main_process_port", port, "-m", "diffsynth_pipe.train"]
    flags = [argument for name, value in parameters.items() for argument in (f"--{name}", value)]
    return subprocess.run(
        list(map(str, [*command, *flags])),
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def trained(parameters):
    """Return the losses, the LoRA's tensors and ``run.json`` of the one run below ``output_path``."""
    from safetensors.torch import load_file

    (run_dir,) = Path(parameters["output_path"]).glob("train-*")
    run = json.loads((run_dir / "run.json").read_text())
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], load_file(run_dir / run["lora_path"]), run


@pytest.fixture
def plain(parameters, tmp_path):
    """Losses and LoRA of plain torch in one process."""
    own = parameters | {"output_path": str(tmp_path / "plain")}
    train(load_config(None, own))
    return trained(own)


def assert_same_training(found, expected):
    losses, lora, _ = found
    np.testing.assert_allclose(losses, expected[0], rtol=1e-5)
    assert lora.keys() == expected[1].keys()
    for name, tensor in lora.items():
        torch.testing.assert_close(tensor, expected[1][name], rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "num_processes", "engine"),
    [
        ("single_process", 1, "plain torch, world size 1"),
        ("ddp", 1, "plain torch, world size 1"),
        ("ddp", 2, "DistributedDataParallel, world size 2"),
        ("zero2_cpu_offload", 1, "DeepSpeedEngine, ZeRO stage 2, offload optimizer=cpu param=none, world size 1"),
        ("zero2_cpu_offload", 2, "DeepSpeedEngine, ZeRO stage 2, offload optimizer=cpu param=none, world size 2"),
    ],
)
def test_each_launch_file_trains_as_plain_torch(parameters, plain, name, num_processes, engine):
    parameters |= {"batch_size": 2 // num_processes}
    done = launch(DEPLOY / "accelerate" / f"{name}.yaml", parameters, num_processes=num_processes)
    assert done.returncode == 0, done.stderr
    found = trained(parameters)
    assert found[2]["engine"] == f"engine {engine}, compute float32"
    assert_same_training(found, plain)
