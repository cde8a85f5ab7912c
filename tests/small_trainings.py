"""What tests, benchmarks and tortures of training share: a sealed cache of random fields, and a launcher."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from cache_store.snapshot import RESERVED_BUCKET
from cache_store.store import Cache, SealedSample
from diffsynth_pipe.contracts import EMPTY_CAPTION_ID, load_family

FAMILY = load_family("qwen_image")
LAUNCH_FILES = Path(__file__).parents[1] / "deploy" / "accelerate"
SAMPLES = {"64x64": ((8, 8), (5, 9, 3, 12)), "64x32": ((8, 4), (7, 4))}
"""Buckets: height and width of the latents, and the lengths of the prompts, one per sample."""


def write_cache(root, buckets=SAMPLES, family="qwen_image", *, empty_caption=False):
    """Write and seal a cache of a tiny family with units ``text`` and ``latents``; return the folder, which is new.

    With ``empty_caption`` it has a reserved sample with a text of two tokens and the first sample's latents.
    """
    rng = np.random.default_rng(0)
    specs = {unit.name: unit.outputs for unit in load_family(family).units}
    num_frames = (1,) * ("frame" in specs["latents"][0].dims)
    cache, samples = Cache.open_or_new(root), []
    with cache.writer() as writer:
        for bucket, (size, lengths) in buckets.items():
            for length in lengths:
                key = f"{len(samples):032x}"
                writer.add("latents", key, {"latents": random_bf16(rng, (16, *num_frames, *size))}, specs["latents"])
                writer.add("text", key, {"prompt_emb": random_bf16(rng, (length, 64))}, specs["text"])
                keys = {"latents": key, "text": key}
                samples.append(SealedSample(sample_id=key, bucket=bucket, source=f"row {len(samples)}", keys=keys))
        if empty_caption:
            writer.add("text", EMPTY_CAPTION_ID, {"prompt_emb": random_bf16(rng, (2, 64))}, specs["text"])
            keys = {**samples[0].keys, "text": EMPTY_CAPTION_ID}
            reserved = SealedSample(sample_id=EMPTY_CAPTION_ID, bucket=RESERVED_BUCKET, source="empty", keys=keys)
    cache.seal([*samples, reserved] if empty_caption else samples, {"family": family})
    return root


def random_bf16(rng, shape):
    """Return bit patterns of standard normal numbers."""
    return torch.from_numpy(rng.standard_normal(shape)).to(torch.bfloat16).view(torch.uint16).numpy()


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch_command(config_file, parameters, num_processes):
    """Return ``accelerate launch --config_file CONFIG_FILE -m diffsynth_pipe.train`` with its flags."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config_file]
    command += ["--num_processes", num_processes, "--main_process_port", free_port(), "-m", "diffsynth_pipe.train"]
    command += [argument for name, value in parameters.items() for argument in (f"--{name}", value)]
    return list(map(str, command))


def launch(config_file, parameters, *, num_processes=1, cwd=None, **env):
    """Run a training under ``accelerate launch`` to its end."""
    return subprocess.run(
        launch_command(config_file, parameters, num_processes),
        cwd=cwd,
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=300,
    )
