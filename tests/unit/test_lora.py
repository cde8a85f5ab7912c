"""The LoRA: where it goes, how it starts, how its weights are called."""

import pytest
import torch
from torch import nn

from diffsynth_pipe.config import load_config
from diffsynth_pipe.errors import ConfigError, ModelError
from diffsynth_pipe.training.lora import (
    LoraSettings,
    add_lora,
    lora_parameters,
    lora_settings,
    parse_targets,
    target_layers,
)


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


def settings(**changes):
    return LoraSettings(**{"targets": ("to_q", "to_out.0"), "rank": 2, "alpha": 2.0} | changes)


def plain_model(dtype=torch.float32):
    torch.manual_seed(1)
    return Model().requires_grad_(False).to(dtype)


def model_with_lora(*, seed=0, dtype=torch.float32, **changes):
    model = plain_model(dtype)
    add_lora(model, settings(**changes), seed)
    return model


def randomize(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in lora_parameters(model).values():
            parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.1)
    return model


def test_only_the_lora_is_trainable_and_named_as_peft_names_it():
    from peft import get_peft_model_state_dict

    model = model_with_lora(use_dora=True)
    parameters = lora_parameters(model)
    assert {id(value) for value in parameters.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    expected = get_peft_model_state_dict(model)
    assert set(parameters) == set(expected)
    assert parameters["blocks.0.to_q.lora_A.weight"].shape == (2, 8)
    for name, parameter in parameters.items():
        assert torch.equal(parameter, expected[name])


@pytest.mark.parametrize(
    ("changes", "scale"),
    [
        ({}, 1.0),
        ({"alpha": 3.0}, 1.5),
        ({"alpha": 3.0, "use_rslora": True}, 3 / 2**0.5),
        ({"alpha": 3.0, "use_dora": True}, 1.5),
        ({"rank": 4}, 0.5),
    ],
)
def test_it_changes_nothing_before_it_is_trained_and_the_layer_by_scale_times_b_times_a_after(changes, scale):
    plain, model = plain_model(), model_with_lora(**changes)
    x = torch.randn(4, 8)
    tolerance = 1e-6 if "use_dora" in changes else 0.0
    torch.testing.assert_close(model(x), plain(x), rtol=tolerance, atol=tolerance)
    parameters = lora_parameters(randomize(model))
    for block in (0, 1):
        for layer in ("to_q", "to_out.0"):
            name = f"blocks.{block}.{layer}"
            weight = plain.get_submodule(name).weight
            weight += scale * parameters[f"{name}.lora_B.weight"].data @ parameters[f"{name}.lora_A.weight"].data
            if "use_dora" in changes:
                weight *= (parameters[f"{name}.lora_magnitude_vector"].data / weight.norm(dim=1))[:, None]
    torch.testing.assert_close(model(x), plain(x))


def test_dropout_acts_in_training_alone():
    model = randomize(model_with_lora(dropout=0.5))
    without = randomize(model_with_lora())
    x = torch.randn(4, 8)
    assert not torch.equal(model(x), model(x))
    assert torch.equal(model.eval()(x), without.eval()(x))


def test_dora_starts_as_the_base_model_does_in_bf16_too():
    """peft alone rounds the norms to bf16, and so changes the model before its first step."""
    x = torch.randn(2, 8, dtype=torch.bfloat16)
    model = model_with_lora(dtype=torch.bfloat16, use_dora=True)
    assert torch.equal(model(x), plain_model(torch.bfloat16)(x))
    magnitude = lora_parameters(model)["blocks.0.to_q.lora_magnitude_vector"]
    torch.testing.assert_close(magnitude.data, model.blocks[0].to_q.base_layer.weight.float().norm(dim=1))


def test_the_start_depends_on_the_seed_alone():
    first = lora_parameters(model_with_lora())
    torch.rand(1)
    second, other = lora_parameters(model_with_lora()), lora_parameters(model_with_lora(seed=1))
    for name, parameter in first.items():
        assert torch.equal(parameter, second[name])
        assert torch.equal(parameter, other[name]) == ("lora_B" in name)


def test_the_global_generator_is_left_alone():
    model = plain_model()
    before = torch.get_rng_state()
    add_lora(model, settings(), 0)
    assert torch.equal(torch.get_rng_state(), before)


def test_lora_weights_are_fp32_on_a_bf16_base():
    model = model_with_lora(dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in lora_parameters(model).values()} == {torch.float32}
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


@pytest.mark.parametrize(
    ("text", "layers"),
    [
        ("to_q", ["blocks.0.to_q", "blocks.1.to_q"]),
        ("to_out.0", ["blocks.0.to_out.0", "blocks.1.to_out.0"]),
        ("blocks.1.to_q", ["blocks.1.to_q"]),
        (" to_q , blocks.0.to_k ", ["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q"]),
        (r".*\.to_(q|k)", ["blocks.0.to_q", "blocks.0.to_k", "blocks.1.to_q", "blocks.1.to_k"]),
        (r"blocks\.1\..*", ["blocks.1.to_q", "blocks.1.to_k", "blocks.1.to_out.0"]),
        (None, ["blocks.0.to_k", "blocks.1.to_k"]),
    ],
)
def test_the_targets_of_a_run(text, layers):
    targets = parse_targets(text, ["to_k"])
    assert target_layers(plain_model(), targets) == layers
    names = {name.rpartition(".lora_")[0] for name in lora_parameters(model_with_lora(targets=targets))}
    assert names == set(layers)


class Wide(nn.Module):
    """One layer for each way to be passed over by the reference's automatic rule, and three that it takes."""

    def __init__(self):
        super().__init__()
        self.outside = nn.Linear(512, 512)
        self.single = nn.ModuleList([nn.Linear(512, 512)])
        self.blocks = nn.ModuleList(
            [
                nn.ModuleDict({"wide": nn.Linear(600, 512), "narrow": nn.Linear(511, 4096)}),
                nn.Sequential(nn.ModuleList([nn.Linear(512, 512)]), nn.Linear(1024, 1024), nn.LayerNorm(600)),
            ]
        )


def test_the_automatic_rule_is_the_references():
    assert parse_targets("", ["to_k"]) == parse_targets(" , ", ["to_k"]) == ()
    with torch.device("meta"):
        model = Wide()
    assert target_layers(model, ()) == ["blocks.0.wide", "blocks.1.0.0", "blocks.1.1"]


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            (),
            r'the automatic rule \(""\) finds no linear layer with at least 512 inputs and outputs in the blocks of M',
        ),
        (
            "to_[qk]",
            r"the regular expression 'to_\[qk\]' matches no linear layer of Model; it must match whole names, such",
        ),
    ],
)
def test_a_rule_that_finds_nothing_is_refused(targets, message):
    with pytest.raises(ModelError, match=f"^lora_target_modules: {message}"):
        target_layers(plain_model(), targets)


def test_a_pattern_means_the_same_in_peft():
    from peft import LoraConfig, inject_adapter_in_model

    pattern = r".*\.to_(q|out\.0)"
    model = inject_adapter_in_model(LoraConfig(target_modules=pattern), plain_model())
    theirs = {name.removesuffix(".lora_A") for name, _ in model.named_modules() if name.endswith(".lora_A")}
    assert set(target_layers(plain_model(), pattern)) == theirs


def test_settings_of_a_run():
    run = {"dataset_base_path": "data", "lora_rank": 4}
    assert lora_settings(load_config(None, run), ("a", "b")) == LoraSettings(targets=("a", "b"), rank=4, alpha=4)
    run |= {"lora_alpha": 6, "lora_dropout": 0.1, "lora_use_dora": True, "lora_use_rslora": True}
    settings = lora_settings(load_config(None, run | {"lora_target_modules": "x.*"}), ("a",))
    assert settings == LoraSettings(targets="x.*", rank=4, alpha=6, dropout=0.1, use_dora=True, use_rslora=True)
    assert settings.scale == 3


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_target_modules": "(to_q"}, "lora_target_modules: is not a regular expression (missing ), unterminated"),
        (
            {"lora_use_dora": True, "lora_format": "comfyui"},
            "lora_use_dora, lora_format: comfyui cannot hold DoRA's norms",
        ),
        (
            {"lora_use_dora": True, "align_to_opensource_format": True},
            "lora_use_dora, align_to_opensource_format: comfyui cannot hold DoRA's norms",
        ),
        (
            {"align_to_opensource_format": True, "lora_format": "diffsynth"},
            "align_to_opensource_format, lora_format: kohya's names are those of comfyui, not of diffsynth; set one",
        ),
        (
            {"align_to_opensource_format": True, "lora_base_model": None, "trainable_models": "dit"},
            "align_to_opensource_format: has no effect without a LoRA; set lora_base_model, or leave it out",
        ),
        ({"lora_dropout": 1}, "lora_dropout: must be less than 1, got 1"),
        ({"lora_alpha": 0}, "lora_alpha: must be greater than 0, got 0"),
        ({"lora_format": "kohya"}, "lora_format: must be 'diffusers', 'diffsynth' or 'comfyui', got 'kohya'"),
        ({"preset_lora_model": "vae"}, "preset_lora_model: must be 'dit', got 'vae'"),
    ],
)
def test_contradictions_are_one_line(values, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, {"dataset_base_path": "data", "lora_base_model": "dit"} | values)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
