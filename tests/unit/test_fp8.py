"""Weights held in FP8: their size, and the numbers that come out, against weights that were rounded by hand."""

import pytest
import torch

from diffsynth_pipe.contracts import load_family
from diffsynth_pipe.training.fp8 import hold_in_fp8
from diffsynth_pipe.training.lora import LoraSettings, add_lora

FAMILY = load_family("qwen_image")


def with_lora(model):
    add_lora(model, LoraSettings(targets=FAMILY.lora_target_modules, rank=4, alpha=4.0), 0)
    generator = torch.Generator().manual_seed(0)
    lora = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    start = {name: parameter.detach().clone() for name, parameter in lora.items()}
    with torch.no_grad():
        for parameter in lora.values():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return lora, start


def loss_and_gradients(model, lora, dtype):
    generator = torch.Generator().manual_seed(0)
    velocity = model.train()(
        hidden_states=torch.randn(1, 16, 64, generator=generator).to(dtype),
        encoder_hidden_states=torch.randn(1, 5, 64, generator=generator).to(dtype),
        timestep=torch.tensor([0.5]),
        img_shapes=[[(1, 4, 4)]],
        return_dict=False,
    )[0]
    loss = velocity.float().square().mean()
    loss.backward()
    return loss.item(), {name: parameter.grad for name, parameter in lora.items() if parameter.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_it_computes_as_weights_that_were_rounded_to_fp8_and_back(tiny_repo, dtype, checkpointing):
    from diffusers import QwenImageTransformer2DModel

    def load():
        return QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer", dtype=dtype).requires_grad_(False)

    model = load()
    lora, start = with_lora(model)
    hold_in_fp8(model, dtype)
    if checkpointing:
        model.enable_gradient_checkpointing()
    loss, gradients = loss_and_gradients(model, lora, dtype)

    linear = [name for name, module in load().named_modules() if isinstance(module, torch.nn.Linear)]
    kept = {"proj_out", "norm_out.linear"}
    rounded, plain = load(), load()
    for name in set(linear) - kept:
        for parameter in rounded.get_submodule(name).parameters():
            parameter.data = parameter.data.to(torch.float8_e4m3fn).to(dtype)
    oracle = loss_and_gradients(rounded, with_lora(rounded)[0], dtype)
    assert loss == oracle[0]
    assert gradients.keys() == oracle[1].keys()
    assert all(torch.equal(gradients[name], oracle[1][name]) for name in gradients)

    lora, plain_start = with_lora(plain)
    unquantised = loss_and_gradients(plain, lora, dtype)[0]
    assert loss != unquantised
    assert loss == pytest.approx(unquantised, rel=1e-2)
    assert all(torch.equal(start[name], plain_start[name]) for name in start)


@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 1 / 4), (torch.bfloat16, 1 / 2)])
def test_stored_weights_shrink_and_the_lora_stays(tiny_repo, dtype, share):
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer", dtype=dtype).requires_grad_(False)
    lora, _ = with_lora(model)

    def num_bytes():
        # A layer's name without peft's part of it, as in a plain model.
        sizes = {name: parameter.untyped_storage().nbytes() for name, parameter in model.named_parameters()}
        frozen = {name: size for name, size in sizes.items() if name not in lora}
        kept = [name for name in frozen if "norm" in name or name.startswith("proj_out")]
        return sum(frozen.values()), sum(frozen[name] for name in kept)

    before, kept = num_bytes()
    hold_in_fp8(model, dtype)
    after, kept_after = num_bytes()
    assert kept_after == kept < 0.04 * before
    assert after - kept == (before - kept) * share
    assert {parameter.dtype for parameter in lora.values()} == {torch.float32}
