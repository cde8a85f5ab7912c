"""A tiny denoiser of Qwen-Image as diffusers loads it, a LoRA on it that is not zero, and one pass forth and back."""

import torch

from diffsynth_pipe.contracts import load_family
from diffsynth_pipe.training.lora import LoraSettings, add_lora

FAMILY = load_family("qwen_image")


def load_denoiser(tiny_repo, dtype=torch.float32):
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel.from_pretrained(tiny_repo / "transformer", dtype=dtype).requires_grad_(False)


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
