"""The LoRA: where it goes, how it starts, how its weights are called."""

import pytest
import torch
from torch import nn

from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.training.lora import adapter_metadata, add_lora, lora_parameters


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.to_q = nn.Linear(8, 8)
        self.to_k = nn.Linear(8, 8)
        self.to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout(0.0)])

    def forward(self, x):
        return self.to_out[0](self.to_q(x) + self.to_k(x))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def model_with_lora(*, seed=0, dtype=torch.float32, targets=("to_q", "to_out.0")):
    torch.manual_seed(1)
    model = Model().requires_grad_(False).to(dtype)
    add_lora(model, targets, 2, seed)
    return model


def test_only_the_lora_is_trainable_and_named_as_diffusers_wants():
    parameters = lora_parameters(model_with_lora(), "transformer")
    assert set(parameters) == {
        f"transformer.blocks.{block}.{layer}.lora_{part}.weight"
        for block in (0, 1)
        for layer in ("to_q", "to_out.0")
        for part in "AB"
    }
    assert parameters["transformer.blocks.0.to_q.lora_A.weight"].shape == (2, 8)
    assert parameters["transformer.blocks.0.to_q.lora_B.weight"].shape == (8, 2)


def test_it_changes_nothing_before_it_is_trained_and_the_layer_by_b_times_a_after():
    torch.manual_seed(1)
    plain = Model()
    model = model_with_lora()
    x = torch.randn(4, 8)
    assert torch.equal(model(x), plain(x))
    parameters = lora_parameters(model, "t")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.randn_like(parameter) if "lora_B" in name else parameter)
        for block in (0, 1):
            for layer in ("to_q", "to_out.0"):
                name = f"t.blocks.{block}.{layer}.lora_"
                update = parameters[f"{name}B.weight"] @ parameters[f"{name}A.weight"]
                plain.get_submodule(f"blocks.{block}.{layer}").weight += update
    torch.testing.assert_close(model(x), plain(x))


def test_the_start_depends_on_the_seed_alone():
    first = lora_parameters(model_with_lora(), "t")
    torch.rand(1)
    second, other = lora_parameters(model_with_lora(), "t"), lora_parameters(model_with_lora(seed=1), "t")
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name])
        assert torch.equal(parameter, other[name]) == ("lora_B" in name)


def test_the_global_generator_is_left_alone():
    model = Model().requires_grad_(False)
    before = torch.get_rng_state()
    add_lora(model, ["to_q"], 2, 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_weights_are_fp32_on_a_bf16_base():
    model = model_with_lora(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in lora_parameters(model, "t").values()} == {torch.float32}
    assert model.blocks[0].to_k.weight.dtype == torch.bfloat16
    assert model(torch.randn(2, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("to_z", r"'to_z' matches no module of Model; near: .*to_[qk]"),
        ("q", r"'q' matches no module of Model"),
        ("to_out", r"'to_out' matches 'blocks.0.to_out', which is not a linear layer of Model; near: to_out.0"),
    ],
)
def test_a_target_that_is_no_linear_layer_is_refused(target, message):
    with pytest.raises(ModelError, match=message) as error:
        model_with_lora(targets=["to_q", target])
    assert "\n" not in str(error.value)


def test_adapter_metadata_has_the_prefix_that_diffusers_strips():
    assert adapter_metadata(["b", "a"], 4, "transformer") == {
        "transformer.r": 4,
        "transformer.lora_alpha": 4,
        "transformer.target_modules": ["a", "b"],
    }
