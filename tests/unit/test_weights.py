import os
import subprocess
import sys

import pytest
import torch
from safetensors.torch import save_file

from diffsynth_pipe.errors import ModelError, ModelFileMissing
from diffsynth_pipe.training.weights import checkpoint_digest, load_checkpoint, weight_files

PREFIXES = ["pipe.dit.", "dit.", "transformer."]


class Model(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4, affine=False))


@pytest.fixture
def weights():
    """Weights other than a new model's, the batch norm's buffers among them."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: torch.rand(value.shape, generator=generator) if value.is_floating_point() else value + 7
        for name, value in Model().state_dict().items()
    }


def save(path, weights, prefix=""):
    save_file({prefix + name: tensor for name, tensor in weights.items()}, path)
    return path


@pytest.mark.parametrize("prefix", ["", *PREFIXES])
def test_names_may_have_a_prefix(weights, tmp_path, prefix):
    model = Model()
    load_checkpoint(model, save(tmp_path / "a.safetensors", weights, prefix), PREFIXES)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    assert model[0].weight.requires_grad


def test_weights_are_cast_to_the_models_dtype(weights, tmp_path):
    model = Model().to(torch.bfloat16)
    load_checkpoint(model, save(tmp_path / "a.safetensors", weights), PREFIXES)
    assert torch.equal(model[0].weight, weights["0.weight"].to(torch.bfloat16))


def test_a_folder_of_shards_as_diffusers_writes_them(tiny_repo, tmp_path):
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.5)
    model.save_pretrained(tmp_path / "checkpoint", max_shard_size="2MB")
    assert len(weight_files(tmp_path / "checkpoint")) > 2
    loaded = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer")
    load_checkpoint(loaded, tmp_path / "checkpoint", PREFIXES)
    expected = QwenImageTransformer2DModel.from_pretrained(tmp_path / "checkpoint").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())

    weight_files(tmp_path / "checkpoint")[1].unlink()
    with pytest.raises(ModelFileMissing, match=r"00002-of-.*does not exist, but the index names it"):
        weight_files(tmp_path / "checkpoint")


def test_what_a_path_may_be(weights, tmp_path):
    file = save(tmp_path / "a.safetensors", weights)
    assert weight_files(file) == weight_files(tmp_path) == [file]
    save(tmp_path / "b.safetensors", weights)
    with pytest.raises(ModelError, match=r"holds 2 .safetensors files and 0 indices of shards"):
        weight_files(tmp_path)
    with pytest.raises(ModelFileMissing, match=r"c\.safetensors does not exist"):
        weight_files(tmp_path / "c.safetensors")
    (tmp_path / "a.safetensors.index.json").write_text("{")
    with pytest.raises(ModelError, match=r"a\.safetensors\.index\.json is no index of shards"):
        weight_files(tmp_path)


def test_the_digest_is_of_the_bytes_alone(weights, tmp_path):
    (tmp_path / "other").mkdir()
    first, second = (save(folder / "a.safetensors", weights) for folder in (tmp_path, tmp_path / "other"))
    assert checkpoint_digest(first) == checkpoint_digest(second) == checkpoint_digest(tmp_path / "other")
    weights["0.bias"] += 1
    assert checkpoint_digest(save(second, weights)) != checkpoint_digest(first)


def changed(weights, **changes):
    return {name: value for name, value in (weights | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"0.bias": None}, r"is not of this Model: 1 weights missing, such as 0\.bias"),
        ({"9.bias": torch.ones(1)}, r"is not of this Model: 1 weights too many, such as 9\.bias"),
        ({"0.bias": torch.ones(5)}, r"is of another Model: 0\.bias has shape \[5\], expected \[4\]"),
        ({"0.bias": torch.tensor([0, 1, 2, float("nan")])}, r"0\.bias in .* is NaN or Inf"),
        ({"0.lora_A.weight": torch.ones(1)}, "holds a LoRA, .* name it by lora_checkpoint"),
        ({"pipe.dit.0.bias": torch.ones(4)}, r"1 weights too many, such as pipe\.dit\.0\.bias"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(weights, tmp_path, changes, message):
    path = save(tmp_path / "a.safetensors", changed(weights, **changes))
    with pytest.raises(ModelError, match=message) as caught:
        load_checkpoint(Model(), path, PREFIXES)
    assert "\n" not in str(caught.value)


def test_a_truncated_checkpoint_is_refused(weights, tmp_path):
    path = save(tmp_path / "a.safetensors", weights)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ModelError, match=r"a\.safetensors is damaged"):
        load_checkpoint(Model(), path, PREFIXES)


PARTITIONED = """
import sys, pathlib, deepspeed, torch
from deepspeed.runtime.zero import GatheredParameters
from safetensors.torch import load_file
from diffsynth_pipe.training.weights import load_checkpoint
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # needs a compiler, and a minute
deepspeed.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
settings = {"train_batch_size": 1, "zero_optimization": {"stage": 3}}
with deepspeed.zero.Init(config_dict_or_path=settings):
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
assert model[0].weight.numel() == 0
load_checkpoint(model, pathlib.Path(sys.argv[1]), ["pipe.dit."])
assert model[0].weight.numel() == 0
with GatheredParameters(list(model.parameters())):
    assert all(torch.equal(value, load_file(sys.argv[1])[name]) for name, value in model.named_parameters())
"""


def test_parameters_that_zero_3_has_partitioned(weights, tmp_path):
    path = save(tmp_path / "a.safetensors", {name: weights[name] for name in ("0.weight", "0.bias")})
    environment = {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }  # any free port
    command = [sys.executable, "-c", PARTITIONED, str(path)]
    ended = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr
