"""Times a training step of the train stage against a bare loop of torch on the same model, samples and threads.

``python tests/bench/bench_train.py`` prints one line per batch size: milliseconds per optimizer step of both, their
ratio, and the share of our step that waited for the cache; then what a batch of 4 yields over a batch of 1. Both train
the same LoRA with AdamW and clipping, in turns, in one process. The bare loop has its samples in memory, and does
neither logs nor checkpoints nor random numbers of its own per sample.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState

sys.path.insert(0, str(Path(__file__).parents[1]))

from small_trainings import FAMILY, write_cache

from cache_store.store import Cache
from diffsynth_pipe.config import load_config
from diffsynth_pipe.stages.train import train
from diffsynth_pipe.training.flow_match import bell_weights, sigma_grid
from diffsynth_pipe.training.lora import LoraSettings, add_lora
from diffsynth_pipe.training.sampler import BucketSampler
from diffsynth_pipe.training.sources import CachedSource

BUCKETS = {"256x256": ((32, 32), tuple(range(20, 84)))}
NUM_WARMUP, NUM_STEPS, NUM_ROUNDS = 5, 40, 9
RANK, LEARNING_RATE, MAX_GRAD_NORM = 4, 1e-4, 1.0


def our_steps(parameters, batch_size, folder):
    """Train by the stage; return the seconds of each step after the first ones, and the share that waited for data."""
    config = load_config(None, parameters | {"batch_size": batch_size, "output_path": str(folder)})
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        result = train(config)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    lines = [json.loads(line) for line in (result.path / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line][NUM_WARMUP:]
    times = [line["time"] for line in steps]
    elapsed = (times[-1] - times[0]) / (len(times) - 1)
    return elapsed, statistics.fmean(line["data_wait_share"] for line in steps)


def bare_steps(model, batches, batch_size):
    """Train by a loop of torch; return the seconds of a step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LEARNING_RATE, weight_decay=0.01)
    sigmas = sigma_grid(FAMILY.schedule)
    weights = bell_weights(sigmas, sigmas)
    begin = 0.0
    for step, batch in enumerate(batches):
        if step == NUM_WARMUP:
            begin = time.perf_counter()
        latents = batch.fields["latents"].float()
        index = torch.randint(1000, (batch_size,))
        sigma = sigmas[index].view(-1, 1, 1, 1, 1)
        noise = torch.randn_like(latents)
        noisy = (1 - sigma) * latents + sigma * noise
        velocity = FAMILY.predict_velocity({"dit": model}, batch, noisy, sigmas[index])
        loss = ((velocity - (noise - latents)).square().flatten(1).mean(1) * weights[index]).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
    return (time.perf_counter() - begin) / (len(batches) - NUM_WARMUP)


def batches_in_memory(cache, batch_size):
    source = CachedSource(Cache.open(cache).latest(), ["prompt_emb", "latents"])
    sampler = BucketSampler(source.bucket_sizes, batch_size, 0)
    plans = [sampler.plan(step) for step in range(NUM_WARMUP + NUM_STEPS)]
    batches = []
    for batch in source.batches(plans):
        for fields in (batch.fields, batch.lengths):
            fields.update({name: tensor.clone().float() for name, tensor in fields.items()})
        batches.append(batch)
    return batches


def main(folder: Path) -> None:
    from diffusers import QwenImageTransformer2DModel

    FAMILY.write_tiny(folder / "tiny")
    cache = write_cache(folder / "cache", BUCKETS)
    parameters = {
        "task": "sft:train",
        "dataset_base_path": str(cache),
        "model_paths": json.dumps([str(folder / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors")]),
        "lora_base_model": "dit",
        "lora_rank": RANK,
        "learning_rate": LEARNING_RATE,
        "max_grad_norm": MAX_GRAD_NORM,
        "num_validation_samples": 0,
        "dataset_repeat": 1000,
        "max_steps": NUM_WARMUP + NUM_STEPS,
    }
    model = QwenImageTransformer2DModel.from_pretrained(folder / "tiny" / "transformer").requires_grad_(False).train()
    add_lora(model, LoraSettings(targets=FAMILY.lora_target_modules, rank=RANK, alpha=float(RANK)), 0)
    sizes = (1, 4)
    batches = {size: batches_in_memory(cache, size) for size in sizes}
    bare, ours, waits = ({size: [] for size in sizes} for _ in range(3))
    for number, size in itertools.product(range(NUM_ROUNDS), sizes):
        bare[size].append(bare_steps(model, batches[size], size))
        elapsed, wait = our_steps(parameters, size, folder / f"{size}-{number}")
        ours[size].append(elapsed)
        waits[size].append(wait)
    print(
        f"{torch.get_num_threads()} threads, {NUM_ROUNDS} rounds of {NUM_STEPS} steps in turns, medians of the rounds"
    )
    for size in sizes:
        our_ms, bare_ms = (1e3 * statistics.median(times[size]) for times in (ours, bare))
        print(
            f"batch {size}: {our_ms:6.1f} ms, bare torch {bare_ms:6.1f} ms, "
            f"ratio {median_ratio(ours[size], bare[size]):.3f}, waited for data {statistics.median(waits[size]):.2%}"
        )
    print(f"batch 4 yields {4 * median_ratio(ours[1], ours[4]):.2f}x the samples per second of batch 1")


def median_ratio(times, others):
    """Return the median of the rounds' ratios: a machine that grows slower from round to round does not move it."""
    return statistics.median(a / b for a, b in zip(times, others, strict=True))


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        main(Path(scratch))
