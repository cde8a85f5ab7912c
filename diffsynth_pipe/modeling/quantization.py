"""Hold the linear layers of a frozen model in 4 bits with bitsandbytes, through which gradients pass."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from diffsynth_pipe.errors import ModelError

if TYPE_CHECKING:
    from torch import device
    from torch.nn import Linear

    from diffsynth_pipe.contracts import Quantization


def quantize(model: Any, quantization: Quantization, device: device) -> None:
    """Replace the linear layers of a frozen model in place, one after the other, by quantised ones on the device.

    Weights are packed in blocks of 64, whose scales are quantised too. A layer computes in the dtype that it had. What
    stays as it is: the excluded layers, the head of a language model, which is not run and may share its weights with
    the embedding, and what the model's authors want kept in fp32.

    Args:
        model: A model of diffusers or transformers, before it gets a LoRA.
        quantization: The method, and the layers to leave out.
        device: Where a layer's weights are quantised and remain.

    Raises:
        ModelError: A layer to leave out does not exist, or no layer is left.
    """
    import torch

    linear = {name: module for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    for excluded in quantization.excluded:
        if not any(is_named(name, excluded) for name in linear):
            raise ModelError(
                f"quant_options: {excluded!r} is no linear layer of {type(model).__name__}, which has such as "
                f"{', '.join(list(linear)[:3])}; leave it out"
            )
    fp32 = tuple(getattr(model, "_keep_in_fp32_modules", None) or ())
    chosen = [
        name
        for name in linear
        if not any(is_named(name, excluded) for excluded in (*quantization.excluded, "lm_head"))
        and not set(name.split(".")) & set(fp32)
    ]
    if not chosen:
        raise ModelError(f"quant_options: no linear layer of {type(model).__name__} is left to quantise; leave it out")
    for name in chosen:
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, _quantized(linear.pop(name), quantization.method, device))


def _quantized(layer: Linear, method: str, device: device) -> Any:
    import torch
    from bitsandbytes.nn import Linear4bit, Params4bit

    quant_type = method.removeprefix("bitsandbytes_")
    with torch.device("meta"):
        quantized = Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            quant_type=quant_type,
        )
    quantized.weight = Params4bit(layer.weight.data, quant_type=quant_type, module=quantized).to(device)
    if layer.bias is not None:
        quantized.bias = torch.nn.Parameter(layer.bias.data.to(device), requires_grad=False)
    # On some CPUs it would pack the weights for kernels without gradients when it is run in eval mode.
    quantized.support_avx512bf16_for_cpu = False
    return quantized.train(layer.training)


def is_named(name: str, pattern: str) -> bool:
    """Return whether a pattern names a layer: as a whole, or from a dot onwards."""
    return name == pattern or name.endswith(f".{pattern}")
