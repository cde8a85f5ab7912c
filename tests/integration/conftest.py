"""A small cache of random fields, and the parameters of a training on it."""

import json
import shutil

import numpy as np
import pytest
import torch

from cache_store.store import Cache, SealedSample
from diffsynth_pipe.contracts import load_family

SAMPLES = {"64x64": ((8, 8), (5, 9, 3, 12)), "64x32": ((8, 4), (7, 4))}
FAMILY = load_family("qwen_image")
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"]
MAX_GRAD_NORM = 2e-3  # low enough to clip most steps of the tiny model


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
    """A sealed cache of random fields, two shapes and prompts of six lengths."""
    root = tmp_path_factory.mktemp("cache")
    rng = np.random.default_rng(0)
    specs = {unit.name: unit.outputs for unit in FAMILY.units}
    cache, samples = Cache.open_or_new(root), []
    with cache.writer() as writer:
        for bucket, (size, lengths) in SAMPLES.items():
            for length in lengths:
                key = f"{len(samples):032x}"
                writer.add("latents", key, {"latents": random_bf16(rng, (16, 1, *size))}, specs["latents"])
                writer.add("text", key, {"prompt_emb": random_bf16(rng, (length, 64))}, specs["text"])
                keys = {"latents": key, "text": key}
                samples.append(SealedSample(sample_id=key, bucket=bucket, source=f"row {len(samples)}", keys=keys))
    cache.seal(samples, {"family": "qwen_image"})
    return root


def random_bf16(rng, shape):
    return torch.from_numpy(rng.standard_normal(shape)).to(torch.bfloat16).view(torch.uint16).numpy()


@pytest.fixture(scope="module")
def dit_only(tiny_repo, tmp_path_factory):
    """A repository with the denoiser and nothing else, so that training cannot open another model."""
    repository = tmp_path_factory.mktemp("dit-only")
    shutil.copytree(tiny_repo / "transformer", repository / "transformer")
    return repository


@pytest.fixture
def parameters(cache_dir, dit_only, tmp_path):
    return {
        "task": "sft:train",
        "dataset_base_path": str(cache_dir),
        "model_paths": json.dumps([str(dit_only / "transformer" / "diffusion_pytorch_model.safetensors")]),
        "lora_base_model": "dit",
        "lora_target_modules": ",".join(TARGETS),
        "lora_rank": 4,
        "learning_rate": 3e-2,
        "max_grad_norm": MAX_GRAD_NORM,
        "batch_size": 2,
        "dataset_repeat": 3,
        "num_validation_samples": 3,
        "output_path": str(tmp_path / "output"),
    }
