"""LoRAs on parameters that ZeRO-3 has partitioned over two ranks, against a plain model in one process."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from diffsynth_pipe.training.lora import LoraSettings, add_lora, fuse_lora, load_lora, lora_parameters
from diffsynth_pipe.training.lora_file import export_lora, read_lora

NUM_RANKS = 2
LORA = LoraSettings(targets=("to_q",), rank=2, alpha=3.0)
DORA = replace(LORA, use_dora=True)
DEEPSPEED = {
    "train_micro_batch_size_per_gpu": 3,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "zero_allow_untested_optimizer": True,
    "gradient_clipping": 0.0,
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)})])

    def forward(self, x):
        return self.blocks[0]["to_k"](self.blocks[0]["to_q"](x))


def seeded_model():
    torch.manual_seed(0)
    return Model().requires_grad_(False)


def write_files(folder):
    """Write a preset LoRA, and a LoRA to start from."""
    preset = LoraSettings(targets=("to_q", "to_k"), rank=3, alpha=6.0)
    for name, settings in (("preset", preset), ("lora", LORA), ("dora", DORA)):
        model = seeded_model()
        add_lora(model, settings, 1)
        tensors = {key: torch.randn_like(value.data) / 3 for key, value in lora_parameters(model).items()}
        exported, metadata = export_lora(tensors, settings, "diffusers", prefix="t", architecture="x")
        save_file(exported, folder / name, metadata)


def prepare(model, folder, name):
    """Fuse the preset LoRA, add another and start it from its file, as ``stages.train`` does."""
    settings = {"lora": LORA, "dora": DORA}[name]
    fuse_lora(model, read_lora(folder / "preset", model, prefix="t", parameter="preset_lora_path"))
    add_lora(model, settings, 0)
    load_lora(model, read_lora(folder / name, model, prefix="t", parameter="lora_checkpoint"), settings)
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def train(model, optimizer, backward):
    losses = []
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(2))
    for _ in range(3):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        backward(loss)
        optimizer.step()
        losses.append(loss.item())
    return losses


def partitioned_model():
    import deepspeed

    with deepspeed.zero.Init(config_dict_or_path=DEEPSPEED):
        model = Model()
    whole = seeded_model().state_dict()
    for name, parameter in model.requires_grad_(False).named_parameters():
        with deepspeed.zero.GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(whole[name])
        assert parameter.shape == (0,)
    return model


def main(folder):
    """Run one rank: once on a base that the engine partitions, once on one that is so from the start."""
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    rank, world_size = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE"))
    store = f"file://{folder}/store"
    deepspeed.init_distributed("gloo", False, init_method=store, rank=rank, world_size=world_size)
    for name, model in (("lora", seeded_model()), ("dora", partitioned_model())):
        trainable = prepare(model, folder, name)
        engine, optimizer, _, _ = deepspeed.initialize(
            model=model, optimizer=torch.optim.SGD(trainable, lr=1e-2), config=DEEPSPEED
        )
        assert all(parameter.shape == (0,) for parameter in model.parameters())
        losses = train(engine, optimizer, engine.backward)
        with deepspeed.zero.GatheredParameters(list(model.parameters())):
            tensors = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
        if deepspeed.comm.get_rank() == 0:
            save_file(tensors | {"losses": torch.tensor(losses)}, folder / f"trained-{name}")


def test_fused_started_and_trained_as_a_plain_model(tmp_path):
    write_files(tmp_path)
    environment = os.environ | {"DS_ACCELERATOR": "cpu", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, str(tmp_path)],
            env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(NUM_RANKS)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(NUM_RANKS)
    ]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=300)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for name in ("lora", "dora"):
        result = load_file(tmp_path / f"trained-{name}")
        model = seeded_model()
        trainable = prepare(model, tmp_path, name)
        fused = model.blocks[0]["to_k"].weight.detach()
        assert (fused - seeded_model().blocks[0]["to_k"].weight).abs().max() > 0.1
        losses = train(model, torch.optim.SGD(trainable, lr=1e-2), torch.Tensor.backward)
        torch.testing.assert_close(result.pop("losses"), torch.tensor(losses), rtol=1e-5, atol=1e-6)
        assert set(result) == {key for key, _ in model.named_parameters()}
        for key, parameter in model.named_parameters():
            torch.testing.assert_close(result[key], parameter.data, rtol=1e-5, atol=1e-6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
