"""Runs in each rank under ZeRO-3: loads models into their partitions, and says what that took and what came of it.

Arguments: folder of a large denoiser, folder of the tiny one, folder for ``rank-<n>.json``.
"""

import gc
import json
import os
import sys
from pathlib import Path

import torch

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import ComponentFiles, load_family
from diffsynth_pipe.training import engine as engines
from diffsynth_pipe.training.gradient_checkpointing import checkpoint_function
from diffsynth_pipe.training.lora import LoraSettings, add_lora
from diffsynth_pipe.training.partitioned import load_partitioned

FAMILY = load_family("qwen_image")
SPEC = FAMILY.components["dit"]


def memory_bytes(name):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) * 1024


def files_of(folder):
    return ComponentFiles(weights=tuple(sorted(folder.glob("*.safetensors"))), folder=folder)


def is_same(streamed, expected):
    """Compare a partitioned model with a whole one: names, dtypes, values of parameters and buffers."""
    import deepspeed

    parameters, wanted = dict(streamed.named_parameters()), dict(expected.named_parameters())
    assert all(parameter.numel() == 0 and not parameter.requires_grad for parameter in parameters.values())
    with deepspeed.zero.GatheredParameters(list(parameters.values())):
        same = [
            parameters[name].dtype == tensor.dtype and torch.equal(parameters[name], tensor)
            for name, tensor in wanted.items()
        ]
    buffers, wanted_buffers = dict(streamed.named_buffers()), dict(expected.named_buffers())
    same += [torch.equal(buffers[name], tensor) for name, tensor in wanted_buffers.items()]
    return all(same) and parameters.keys() == wanted.keys() and buffers.keys() == wanted_buffers.keys()


def first_step(model, accelerator, config):
    """Add a LoRA, take one training step with DeepSpeed's checkpointing; return loss, gradient norm, runs per block."""
    add_lora(model, LoraSettings(targets=FAMILY.lora_target_modules, rank=4, alpha=4.0), 0)
    model.enable_gradient_checkpointing(checkpoint_function(config, engines.deepspeed_settings(accelerator)))
    runs = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(lambda *_: runs.append(1))
    num_blocks = len(model.transformer_blocks)
    engine = engines.start(accelerator, model.train(), config)
    generator = torch.Generator().manual_seed(0)
    velocity = engine.model(
        hidden_states=torch.randn(1, 16, 64, generator=generator),
        encoder_hidden_states=torch.randn(1, 5, 64, generator=generator),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0]
    loss = velocity.square().mean()
    accelerator.backward(loss)
    norm = float(accelerator.clip_grad_norm_(engine.model.parameters(), config.max_grad_norm))
    return {"loss": loss.item(), "grad_norm": norm, "runs_per_block": len(runs) / num_blocks}


def main(large, tiny, out):
    values = {"use_gradient_checkpointing": True, "gradient_checkpointing_backend": "deepspeed"}
    config = load_config(None, {"dataset_base_path": "data", **values})
    accelerator = engines.start_accelerator(config)
    settings = engines.deepspeed_settings(accelerator)

    def load(folder, dtype):
        return load_partitioned(SPEC.build, files_of(folder), dtype, accelerator.device, settings)

    SPEC.load(files_of(tiny), torch.float32, torch.device("cpu"))  # imports what the figures shall not hold
    gc.collect()
    before = memory_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    model = load(large, torch.float32)
    report = {"peak_bytes": memory_bytes("VmHWM") - before, "rss_bytes": memory_bytes("VmRSS") - before}
    report["partition_bytes"] = sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters())
    del model
    gc.collect()
    for dtype in (torch.bfloat16, torch.float32):
        expected = SPEC.load(files_of(tiny), dtype, torch.device("cpu"))
        model = load(tiny, dtype)
        report[str(dtype)] = is_same(model, expected)
    report |= first_step(model, accelerator, config)
    (out / f"rank-{accelerator.process_index}.json").write_text(json.dumps(report))
    accelerator.end_training()
    os._exit(0)  # as the train command does, and for the same reason


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
