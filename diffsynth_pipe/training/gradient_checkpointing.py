"""Recompute activations in the backward pass: torch's way, torch's with host memory, or DeepSpeed's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from diffsynth_pipe.config import RunConfig

DEEPSPEED_SETTINGS = {
    "partition_activations": "partition_activations",
    "contiguous_memory_optimization": "contiguous_checkpointing",
    "number_checkpoints": "num_checkpoints",
    "cpu_checkpointing": "checkpoint_in_cpu",
    "synchronize_checkpoint_boundary": "synchronize",
    "profile": "profile",
}
"""Keys of ``activation_checkpointing`` in a DeepSpeed file, and arguments of ``deepspeed.checkpointing.configure``."""


def checkpoint_function(config: RunConfig, deepspeed_settings: Mapping[str, Any] | None) -> Callable[..., Any] | None:
    """Return what a model is to call its blocks by.

    Args:
        config: The run.
        deepspeed_settings: The DeepSpeed file's contents; None in a run without DeepSpeed.

    Returns:
        A function of a block and its positional inputs; None if nothing is to be recomputed.

    Raises:
        ConfigError: The DeepSpeed file does not say how, or there is none.
    """
    if config.gradient_checkpointing_backend == "deepspeed":
        _configure_deepspeed(deepspeed_settings)
        return _by_deepspeed
    if config.use_gradient_checkpointing_offload:
        return _with_inputs_on_cpu
    return _by_torch if config.use_gradient_checkpointing else None


def enable(model: Any, recompute: Callable[..., Any]) -> None:
    """Make a model of diffusers or transformers call its blocks by ``recompute`` where gradients are recorded."""
    if hasattr(model, "enable_gradient_checkpointing"):
        model.enable_gradient_checkpointing(recompute)
    else:
        # What gradient_checkpointing_enable of transformers does, which takes no function; it acts in training mode.
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=recompute)


def _configure_deepspeed(settings: Mapping[str, Any] | None) -> None:
    wanted = (settings or {}).get("activation_checkpointing")
    if not isinstance(wanted, dict):
        found = "its DeepSpeed file has no object 'activation_checkpointing'" if settings else "it is without DeepSpeed"
        raise ConfigError(
            f"gradient_checkpointing_backend: 'deepspeed' does not suit this run: {found}; "
            "add one, or set gradient_checkpointing_backend to torch"
        )
    unknown = sorted(wanted.keys() - DEEPSPEED_SETTINGS.keys())
    if unknown:
        raise ConfigError(
            f"activation_checkpointing of the DeepSpeed file: unknown {', '.join(map(repr, unknown))}; "
            f"known are {', '.join(DEEPSPEED_SETTINGS)}"
        )
    if wanted.get("contiguous_memory_optimization") and not (
        wanted.get("partition_activations") and wanted.get("number_checkpoints")
    ):
        message = (
            "activation_checkpointing of the DeepSpeed file: contiguous_memory_optimization needs "
            "partition_activations and number_checkpoints"
        )
        raise ConfigError(message)
    import deepspeed

    deepspeed.checkpointing.configure(None, **{DEEPSPEED_SETTINGS[name]: value for name, value in wanted.items()})


def _by_torch(block: Any, *inputs: Any) -> Any:
    return checkpoint(block.__call__, *inputs, use_reentrant=False)


def _with_inputs_on_cpu(block: Any, *inputs: Any) -> Any:
    # The checkpoint saves the block's inputs and nothing else, so these are all that is moved.
    with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
        return _by_torch(block, *inputs)


def _by_deepspeed(block: Any, *inputs: Any) -> Any:
    import deepspeed

    tensors = [place for place, value in enumerate(inputs) if isinstance(value, Tensor) and value.is_floating_point()]
    if not any(inputs[place].requires_grad for place in tensors):
        # It is reentrant: a block none of whose inputs needs a gradient, as the first, would give none to its LoRA.
        first = tensors[0]
        inputs = (*inputs[:first], inputs[first].detach().requires_grad_(), *inputs[first + 1 :])
    return deepspeed.checkpointing.checkpoint(block.__call__, *inputs)
