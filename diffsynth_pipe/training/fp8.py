"""Hold the frozen weights of a denoiser in FP8, and compute with them in the dtype of the run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import dtype


def hold_in_fp8(model: Any, compute_dtype: dtype) -> None:
    """Store the weights of linear layers in float8_e4m3fn, in place; each layer casts its own to compute, and back.

    Norms, embeddings and the last projection stay as they are, as diffusers' layerwise casting has it, and so does the
    LoRA. Without gradient checkpointing autograd keeps every layer's cast weights until the backward pass.

    Args:
        model: A diffusers model that has its LoRA: peft would round the initial weights of a later one to FP8.
        compute_dtype: Dtype of the model's inputs.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=compute_dtype)
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and hasattr(module, "_diffusers_hook"):
            # It keeps peft from casting inputs to the dtype of the LoRA, which is right only where both are the same.
            module._diffusers_hook.remove_hook("peft_autocast_disable")
