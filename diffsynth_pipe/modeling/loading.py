"""Load diffusers' and transformers' models, frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffsynth_pipe.modeling.disk_offload import load_offloaded
from diffsynth_pipe.modeling.quantization import quantize

if TYPE_CHECKING:
    from pathlib import Path

    from torch import device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import ComponentFiles


def load_denoiser(model_class: Any, files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load a model in eval mode, frozen. Training holds it in FP8 or 4 bits later, when its weights are final."""
    model = model_class.from_pretrained(files.folder, dtype=dtype, use_safetensors=True, local_files_only=True)
    return model.to(device).eval().requires_grad_(False)


def load_encoder(model_class: Any, files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load a model in eval mode, frozen; its weights are left on disk, held in FP8 or quantised as ``files`` says."""
    import torch

    if files.offload:
        return load_offloaded(model_class, files, dtype, device)
    # Quantised on the way to the device, which never holds the whole model.
    model = load_denoiser(model_class, files, dtype, torch.device("cpu") if files.quantization else device)
    if files.fp8:
        _hold_in_fp8(model, dtype)
    if files.quantization is not None:
        quantize(model, files.quantization, device)
    return model.to(device)


def build_denoiser(model_class: Any, folder: Path) -> Module:
    """Build a diffusers model with new weights from the ``config.json`` of a folder."""
    model: Module = model_class.from_config(model_class.load_config(folder))
    return model.eval()


def _hold_in_fp8(model: Any, compute_dtype: dtype) -> None:
    """Store linear and convolution weights in FP8; a layer casts its own to compute, and back."""
    import torch
    from diffusers.hooks.layerwise_casting import DEFAULT_SKIP_MODULES_PATTERN, apply_layerwise_casting

    # The head may share its weights with the embedding, which is no layer that casts; it is not run.
    skipped = (*DEFAULT_SKIP_MODULES_PATTERN, "lm_head")
    # T5 casts what it hands these to the dtype that it finds them stored in.
    skipped += tuple(rf"\.{name}$" for name in getattr(model, "_keep_in_fp32_modules", None) or ())
    apply_layerwise_casting(model, torch.float8_e4m3fn, compute_dtype, skip_modules_pattern=skipped)
