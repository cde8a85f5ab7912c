"""Add a LoRA to a denoiser, and name its weights as diffusers does in a LoRA file."""

from __future__ import annotations

import difflib
from typing import TYPE_CHECKING

import torch

from diffsynth_pipe.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.nn import Module, Parameter

ADAPTER_NAME = "default"


def add_lora(model: Module, target_modules: Sequence[str], rank: int, seed: int) -> None:
    """Add a trainable LoRA with alpha = rank to a frozen model, in place.

    B starts at zero, A as peft initialises it, from the seed alone: equal on all ranks. The weights are fp32, whatever
    the dtype of the base.

    Args:
        model: The frozen denoiser.
        target_modules: Names of linear layers, as a whole or from a dot onwards: ``attn.to_q`` or ``to_q``.
        rank: Rank of each update.
        seed: Seed of the initial weights.

    Raises:
        ModelError: A target matches no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model

    for target in target_modules:
        _check_target(model, target)
    lora = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(target_modules))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model, adapter_name=ADAPTER_NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def lora_parameters(model: Module, prefix: str) -> dict[str, Parameter]:
    """Return the trainable parameters by their names in a LoRA file.

    Args:
        model: The denoiser, before an engine wraps it.
        prefix: What diffusers puts before the denoiser's names: ``transformer``.
    """
    return {
        f"{prefix}.{name.replace(f'.{ADAPTER_NAME}.', '.')}": parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


def adapter_metadata(target_modules: Sequence[str], rank: int, prefix: str) -> dict[str, object]:
    """Return what diffusers needs to know to apply the weights; peft's defaults hold for the rest.

    Source of the form: ``diffusers.training_utils._collate_lora_metadata`` and ``_pack_dict_with_prefix``.
    """
    settings = {"r": rank, "lora_alpha": rank, "target_modules": sorted(target_modules)}
    return {f"{prefix}.{name}": value for name, value in settings.items()}


def _check_target(model: Module, target: str) -> None:
    matched = [
        (name, module) for name, module in model.named_modules() if name == target or name.endswith(f".{target}")
    ]
    wrong = [name for name, module in matched if not isinstance(module, torch.nn.Linear)]
    if matched and not wrong:
        return
    found = f"matches {wrong[0]!r}, which is not a linear layer" if wrong else "matches no module"
    layers = [name.split(".") for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    endings = sorted({".".join(parts[-length:]) for parts in layers for length in (1, 2)})
    near = difflib.get_close_matches(target, endings, n=5, cutoff=0.4) or endings[:5]
    raise ModelError(f"lora_target_modules: {target!r} {found} of {type(model).__name__}; near: {', '.join(near)}")
