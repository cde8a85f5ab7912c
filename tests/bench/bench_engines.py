"""Trains the tiny denoiser by every engine, way of checkpointing and way to make a batch of 4; compares with the first.

Prints a table: the largest relative difference of a loss, the largest absolute one of a LoRA weight. Ends with 1 if a
loss is off by more than 1e-5 or a weight by more than 1e-4. Takes minutes, nearly all of them in starting processes.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "integration")]

from small_trainings import FAMILY, LAUNCH_FILES, launch, write_cache
from test_engines import ONE_SHAPE, trained

MAX_LOSS_DIFFERENCE = 1e-5
MAX_WEIGHT_DIFFERENCE = 1e-4
ENGINES = (
    ("single_process", 1),
    ("ddp", 2),
    ("zero2_cpu_offload", 1),
    ("zero2_cpu_offload", 2),
    ("zero3_cpu_offload", 1),
    ("zero3_cpu_offload", 2),
)
TORCH = {"use_gradient_checkpointing": True}
CHECKPOINTING = {"none": {}, "torch": TORCH, "deepspeed": TORCH | {"gradient_checkpointing_backend": "deepspeed"}}


def train_by(engine, num_ranks, checkpointing, num_micro_steps, parameters, folder):
    name = f"{engine}-{num_ranks}-{checkpointing}-{num_micro_steps}"
    own = parameters | CHECKPOINTING[checkpointing] | {"output_path": str(folder / name)}
    own |= {"batch_size": 4 // num_ranks // num_micro_steps, "gradient_accumulation_steps": num_micro_steps}
    done = launch(LAUNCH_FILES / f"{engine}.yaml", own, num_processes=num_ranks)
    if done.returncode:
        sys.exit(f"{name}: {done.stderr[-2000:]}")
    return trained(own)


def main(folder: Path) -> int:
    FAMILY.write_tiny(folder / "tiny")
    parameters = {
        "task": "sft:train",
        "dataset_base_path": str(write_cache(folder / "cache", ONE_SHAPE)),
        "model_paths": json.dumps([str(folder / "tiny" / "transformer" / "diffusion_pytorch_model.safetensors")]),
        "lora_base_model": "dit",
        "lora_rank": 4,
        "learning_rate": 1e-3,
        "dataset_repeat": 8,
        "num_validation_samples": 0,
    }
    expected = None
    off = 0
    print(f"{'engine':18} ranks  {'checkpointing':13} batch of 4 as          loss (rel)   LoRA (abs)")
    for engine, num_ranks in ENGINES:
        for checkpointing in CHECKPOINTING:
            if checkpointing == "deepspeed" and not engine.startswith("zero"):
                continue
            for num_micro_steps in (1, 4 // num_ranks):
                losses, lora, _ = train_by(engine, num_ranks, checkpointing, num_micro_steps, parameters, folder)
                expected = expected or (losses, lora)
                loss = max(abs(a - b) / b for a, b in zip(losses, expected[0], strict=True))
                weight = max(float((lora[name] - tensor).abs().max()) for name, tensor in expected[1].items())
                off += loss > MAX_LOSS_DIFFERENCE or weight > MAX_WEIGHT_DIFFERENCE
                batch = f"{num_ranks} ranks x {num_micro_steps} x {4 // num_ranks // num_micro_steps}"
                print(
                    f"{engine:18} {num_ranks:5}  {checkpointing:13} {batch:21} {loss:11.1e}  {weight:11.1e}", flush=True
                )
    print(f"{off} off" if off else f"all within {MAX_LOSS_DIFFERENCE:g} and {MAX_WEIGHT_DIFFERENCE:g}")
    return 1 if off else 0


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.exit(main(Path(scratch)))
