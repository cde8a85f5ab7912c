"""Ways to recompute activations: same numbers, more forward passes, inputs where they were asked to be."""

import json

import pytest
import torch
from tiny_denoisers import load_denoiser

from diffsynth_pipe.config import load_config
from diffsynth_pipe.contracts import load_family
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.training.gradient_checkpointing import checkpoint_function, enable
from diffsynth_pipe.training.lora import LoraSettings, add_lora

FAMILY = load_family("qwen_image")
NONE = {}
TORCH = {"use_gradient_checkpointing": True}
OFFLOAD = {"use_gradient_checkpointing_offload": True}
DEEPSPEED = {"use_gradient_checkpointing": True, "gradient_checkpointing_backend": "deepspeed"}


def config(values):
    return load_config(None, {"dataset_base_path": "data", **values})


def loss_and_gradients(tiny_repo, values, between=lambda _: None):
    """Return the loss, the LoRA's gradients and how often a block ran; call ``between`` the passes on their inputs."""
    model = load_denoiser(tiny_repo)
    add_lora(model, LoraSettings(targets=FAMILY.lora_target_modules, rank=4, alpha=4.0), 0)
    lora = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in lora.items():
            if "lora_B" in name:
                parameter.normal_(std=0.1, generator=generator)
    recompute = checkpoint_function(config(values), None)
    if recompute is not None:
        enable(model, recompute)
    inputs = []
    for block in model.transformer_blocks:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
    model.train()
    loss = (
        model(
            hidden_states=torch.randn(1, 16, 64, generator=generator),
            encoder_hidden_states=torch.randn(1, 5, 64, generator=generator),
            timestep=torch.tensor([0.5]),
            img_shapes=[[(1, 4, 4)]],
            return_dict=False,
        )[0]
        .square()
        .mean()
    )
    between(inputs)
    loss.backward()
    gradients = {name: parameter.grad for name, parameter in lora.items() if parameter.grad is not None}
    return loss.item(), gradients, len(inputs) / len(model.transformer_blocks)


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("values", "runs"), [(NONE, 1), (TORCH, 2), (OFFLOAD, 2), (TORCH | OFFLOAD, 2)])
def test_it_changes_no_bit_and_runs_each_block_once_more(tiny_repo, values, runs):
    loss, gradients, _ = loss_and_gradients(tiny_repo, NONE)
    again = loss_and_gradients(tiny_repo, values)
    assert gradients
    assert again[0] == loss
    assert same(again[1], gradients)
    assert again[2] == runs


@pytest.mark.parametrize("values", [TORCH, OFFLOAD])
def test_a_text_encoder_is_recomputed_too(tiny_repo, values):
    from transformers import Qwen2_5_VLForConditionalGeneration

    def gradients(recompute):
        model = Qwen2_5_VLForConditionalGeneration.from_pretrained(tiny_repo / "text_encoder").train()
        if recompute is not None:
            enable(model, recompute)
        layers, runs = model.model.language_model.layers, []
        for layer in layers:
            layer.mlp.register_forward_pre_hook(lambda *_: runs.append(1))
        model.model(input_ids=torch.tensor([[5, 7, 9]])).last_hidden_state.square().mean().backward()
        return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}, len(runs) / len(layers)

    plain, once = gradients(None)
    again, twice = gradients(checkpoint_function(config(values), None))
    assert len(plain) > 20
    assert same(plain, again)
    assert (once, twice) == (1, 2)


class CopyElsewhere(torch.autograd.graph.saved_tensors_hooks):
    """What ``save_on_cpu`` is where there is a GPU; on a CPU it hands out the tensors themselves."""

    def __init__(self, *, pin_memory):  # noqa: ARG002 - as torch names it
        super().__init__(torch.clone, lambda copy: copy)


@pytest.mark.parametrize(("values", "copied"), [(TORCH, False), (OFFLOAD, True)])
def test_offload_hands_the_blocks_inputs_to_save_on_cpu(tiny_repo, values, copied, monkeypatch):
    """What happens to the originals after the forward pass reaches the gradients only if they were not copied."""
    monkeypatch.setattr(torch.autograd.graph, "save_on_cpu", CopyElsewhere)

    def overwrite(inputs):
        for tensor in inputs:
            tensor.data.fill_(3.0)

    _, gradients, _ = loss_and_gradients(tiny_repo, NONE)
    assert same(loss_and_gradients(tiny_repo, values, overwrite)[1], gradients) == copied


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (None, "it is without DeepSpeed"),
        ({"zero_optimization": {"stage": 3}}, "has no object 'activation_checkpointing'"),
        ({"activation_checkpointing": {"cpu_checkpoint": True}}, "unknown 'cpu_checkpoint'; known are partition_act"),
        (
            {"activation_checkpointing": {"contiguous_memory_optimization": True}},
            "contiguous_memory_optimization needs partition_activations and number_checkpoints",
        ),
    ],
    ids=json.dumps,
)
def test_deepspeeds_way_needs_its_settings(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        checkpoint_function(config(DEEPSPEED), settings)
    assert "\n" not in str(error.value)
