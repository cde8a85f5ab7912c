"""The optimizer, the course of the learning rate, and the moving average of the weights."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

import torch

from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.nn import Parameter
    from torch.optim import Optimizer

    from diffsynth_pipe.config import RunConfig

DIFFSYNTH_WARMUP_STEPS = 5
"""The reference leaves torch's ``ConstantLR`` at its defaults: a third of the rate in the first five steps."""


def make_optimizer(config: RunConfig, parameters: Iterable[Parameter] | Sequence[dict[str, Any]]) -> Optimizer:
    """Make the optimizer that ``customized_optimizer`` names, or AdamW, for parameters or groups of them.

    Raises:
        ConfigError: There is no such class, it refuses to be called with (params, lr, weight_decay), or it keeps other
            weights for training than for use, as schedule-free ones do.
    """
    path = config.customized_optimizer or "torch.optim.AdamW"
    module, _, name = path.rpartition(".")
    try:
        make: Callable[..., Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"customized_optimizer: {path!r} cannot be imported: {error}") from error
    try:
        optimizer = make(list(parameters), lr=config.learning_rate, weight_decay=config.weight_decay)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"customized_optimizer: {path}(params, lr, weight_decay) fails: {error}") from error
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ConfigError(f"customized_optimizer: {path} makes a {type(optimizer).__name__}, not a torch Optimizer")
    if callable(getattr(optimizer, "eval", None)):
        raise ConfigError(
            f"customized_optimizer: {path} must be switched between train() and eval(), as its weights in training are"
            " not those to use; that is not supported: take another, with use_ema for averaged weights"
        )
    return optimizer


def learning_rates(config: RunConfig, num_steps: int) -> Callable[[int], float]:
    """Return the learning rate as a function of the steps taken so far, so that resuming needs no other state.

    Raises:
        ConfigError: The warm-up would not end before the run, or polynomial would have to rise to its end of 1e-7.
    """
    if 0 < num_steps <= config.lr_warmup_steps:
        raise ConfigError(
            f"lr_warmup_steps: {config.lr_warmup_steps} is not below the {num_steps} steps of the run, so the learning "
            "rate would never get to learning_rate; lower it"
        )
    if config.lr_scheduler == "diffsynth":
        return lambda step: config.learning_rate / (3 if step < DIFFSYNTH_WARMUP_STEPS else 1)
    from diffusers.optimization import get_scheduler

    weight = torch.nn.Parameter(torch.zeros(()))
    try:
        scheduler = get_scheduler(
            config.lr_scheduler,
            torch.optim.SGD([weight], lr=config.learning_rate),
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=num_steps,
            num_cycles=config.lr_num_cycles,
            power=config.lr_power,
        )
    except ValueError as error:
        raise ConfigError(f"lr_scheduler: {error}") from error
    (factor,) = scheduler.lr_lambdas
    return lambda step: config.learning_rate * factor(step)


class MovingAverage:
    """The exponential moving average of weights, in fp32.

    Args:
        weights: The first weights by name; empty on ranks that keep no average.
        decay: Share of the old average that each step keeps. Until s / (9 + s) at step s has grown above it, that; as
            ``diffusers.training_utils.EMAModel`` does.
    """

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        self.weights = {name: weight.float().clone() for name, weight in weights.items()}
        self._decay = decay

    def update(self, weights: Mapping[str, Tensor], step: int) -> None:
        """Take in the weights after this step, counted from 1."""
        decay = min(self._decay, step / (9 + step))
        for name, average in self.weights.items():
            average.lerp_(weights[name].float(), 1 - decay)
