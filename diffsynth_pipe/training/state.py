"""What an engine must remember to go on as if it had never stopped: weights and optimizer, of what is trained alone.

A tensor is stored whole and by the parameter's name, whatever engine and however many ranks it is from, so that another
engine, or another number of ranks, can go on from it. No pickle.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch

from diffsynth_pipe.errors import LaunchError
from diffsynth_pipe.training.zero3 import whole

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Parameter

    from diffsynth_pipe.training.engine import Engine

WEIGHTS = "weights"
EMA = "ema"


def master_weights(engine: Engine, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Copy the weights that the optimizer steps on to the CPU, whole and in fp32. Every rank must take part.

    Returns:
        The weights by name; on other ranks than 0, nothing.

    Raises:
        LaunchError: A weight is NaN or Inf.
    """
    weights = dict(_gathered(engine, parameters, None))
    for name, weight in weights.items():
        if not weight.isfinite().all():
            raise LaunchError(f"{name} is NaN or Inf after training; lower --learning_rate or --max_grad_norm")
    return weights


def current_weights(engine: Engine, parameters: Mapping[str, Parameter]) -> dict[str, Tensor]:
    """Return the weights where they are, or gathered from ZeRO's ranks; on other ranks than 0, nothing."""
    if _is_zero(engine):
        return dict(_gathered(engine, parameters, None))
    is_main = engine.accelerator.is_main_process
    return {name: parameter.detach() for name, parameter in parameters.items() if is_main}


def write_optimizer(engine: Engine, parameters: Mapping[str, Parameter], folder: Path) -> dict[str, dict[str, float]]:
    """Write the optimizer's state, one file per kind of tensor. Every rank must take part.

    Args:
        engine: After at least one step.
        parameters: What is trained.
        folder: Gets the files, on rank 0.

    Returns:
        The state's numbers, such as AdamW's step: kind to parameter to value.

    Raises:
        LaunchError: The state holds something else, which could not be restored.
    """
    kinds, numbers = _kinds(engine, parameters)
    for kind in kinds:
        tensors = dict(_gathered(engine, parameters, kind))
        if engine.accelerator.is_main_process:
            safetensors.torch.save_file(tensors, folder / f"{kind}.safetensors")
    return numbers


def group_numbers(engine: Engine) -> list[dict[str, float]]:
    """Return what the optimizer keeps in its groups but the learning rate, such as Prodigy's estimate ``d`` of it."""
    return [
        {name: value for name, value in group.items() if isinstance(value, int | float) and name != "lr"}
        for group in _inner_optimizer(engine).param_groups
    ]


def load_group_numbers(engine: Engine, numbers: Iterable[Mapping[str, float]]) -> None:
    """Give an engine that has taken no step yet what ``group_numbers`` returned; another class takes what it knows."""
    for group, stored in zip(_inner_optimizer(engine).param_groups, numbers, strict=False):
        group.update({name: value for name, value in stored.items() if name in group})


def check_optimizer(engine: Engine, parameters: Mapping[str, Parameter]) -> None:
    """Refuse an optimizer whose state cannot be saved; call it after a step.

    Raises:
        LaunchError: As it says.
    """
    _kinds(engine, parameters)


def load_weights(parameters: Mapping[str, Parameter], file: Path) -> None:
    """Set the weights of a model that no engine has wrapped yet.

    Raises:
        LaunchError: The file holds other weights than these.
    """
    with safetensors.safe_open(file, framework="pt") as stored:
        shapes = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118 - no dict
        expected = {name: _shape(parameter) for name, parameter in parameters.items()}
        if shapes != expected:
            name = min(shapes.items() ^ expected.items())[0]
            raise LaunchError(
                f"{file} is of another model: {name} is {shapes.get(name)} there and {expected.get(name)} here"
            )
        for name, parameter in parameters.items():
            with whole([parameter], modifier_rank=0), torch.no_grad():
                if parameter.numel():  # under ZeRO-3 only rank 0 has to fill it, but all of them may
                    parameter.copy_(stored.get_tensor(name))


def load_optimizer(
    engine: Engine, parameters: Mapping[str, Parameter], folder: Path, numbers: Mapping[str, Mapping[str, float]]
) -> None:
    """Give an engine that has taken no step yet the master weights and the optimizer's state.

    Args:
        engine: Made with the weights of ``load_weights``, which DeepSpeed has rounded to its compute dtype.
        parameters: What is trained.
        folder: What ``write_optimizer`` and the weights were written to.
        numbers: What ``write_optimizer`` returned.
    """
    kinds = sorted(path.stem for path in folder.glob("*.safetensors") if path.stem not in (WEIGHTS, EMA))
    stored: dict[str, Any] = {
        kind: safetensors.safe_open(folder / f"{kind}.safetensors", framework="pt") for kind in [WEIGHTS, *kinds]
    }
    inner = _inner_optimizer(engine)
    if not _is_zero(engine):
        for name, parameter in parameters.items():
            tensors = {kind: stored[kind].get_tensor(name) for kind in kinds if name in stored[kind].keys()}  # noqa: SIM118
            state = {kind: tensor.to(parameter.device) for kind, tensor in tensors.items()}
            state |= {kind: _number(values[name]) for kind, values in numbers.items() if name in values}
            if state:  # there is none of a parameter that never had a gradient
                inner.state[parameter] = state
        return
    zero: Any = engine.optimizer.optimizer  # type: ignore[attr-defined]
    is_zero3 = hasattr(zero, "fp32_partitioned_groups_flat")
    # ZeRO-3 hands its flat pieces to torch's optimizer during a step only.
    pieces = zero.fp32_partitioned_groups_flat if is_zero3 else [group["params"][0] for group in inner.param_groups]
    for piece in pieces:
        inner.state[piece] = {kind: torch.zeros_like(piece, requires_grad=False) for kind in kinds} | {
            kind: _number(max(values.values())) for kind, values in numbers.items()
        }
    if not is_zero3:
        zero._lazy_init_hp_params_optimizer_state()  # or there is nothing to set before the first step
    for kind, file in stored.items():
        names = set(file.keys())
        for name, parameter in parameters.items():
            if name in names:
                _set_in_zero(engine, parameter, file.get_tensor(name), None if kind == WEIGHTS else kind)


def _kinds(engine: Engine, parameters: Mapping[str, Parameter]) -> tuple[list[str], dict[str, dict[str, float]]]:
    """Return the names of the state's tensors that are shaped as their weights, and its numbers by parameter."""
    names = {parameter: [name] for name, parameter in parameters.items()}
    kinds: set[str] = set()
    numbers: dict[str, dict[str, float]] = {}
    for stepped_on, state in _inner_optimizer(engine).state.items():
        for kind, value in state.items():
            # Of a weight without dimensions, the counter of torch's optimizers has the shape of the moments.
            if _is_shaped_as(value, stepped_on) and (stepped_on.ndim or kind != "step"):
                kinds.add(kind)
                continue
            number = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
            if not isinstance(number, int | float):
                raise LaunchError(f"the optimizer's {kind!r} cannot be saved; choose another --customized_optimizer")
            # A flat piece of ZeRO's stands for all parameters: they step together.
            numbers.setdefault(kind, {}).update(dict.fromkeys(names.get(stepped_on, parameters), number))
    return sorted(kinds), numbers


def _is_shaped_as(value: object, weight: Tensor) -> bool:
    return isinstance(value, torch.Tensor) and value.shape == weight.shape


def _number(value: float) -> Tensor | int:
    """Return a number as an optimizer keeps it: torch's as fp32 tensors, DeepSpeed's as ints."""
    return torch.tensor(value) if isinstance(value, float) else value


def _gathered(engine: Engine, parameters: Mapping[str, Parameter], kind: str | None) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter's fp32 weight, or its tensor of this kind in the optimizer's state; on rank 0 alone."""
    for name, parameter in parameters.items():
        if not _is_zero(engine):
            value = parameter.detach() if kind is None else _inner_optimizer(engine).state.get(parameter, {}).get(kind)
            if not _is_shaped_as(value, parameter):
                value = None  # a number, whatever it is of a weight without dimensions
        elif kind is None:
            from deepspeed.utils import safe_get_full_fp32_param

            value = safe_get_full_fp32_param(parameter)
        else:
            from deepspeed.utils import safe_get_full_optimizer_state

            value = safe_get_full_optimizer_state(parameter, kind)
        if engine.accelerator.is_main_process and value is not None:
            whole_value = value.reshape(_shape(parameter))
            yield name, whole_value.to("cpu", whole_value.dtype if kind else torch.float32, copy=True).contiguous()


def _set_in_zero(engine: Engine, parameter: Parameter, value: Tensor, kind: str | None) -> None:
    from deepspeed import utils

    if not hasattr(parameter, "ds_id"):
        value = value.to(parameter.device)
        if kind is None:
            utils.safe_set_full_fp32_param(parameter, value)
        else:
            utils.safe_set_full_optimizer_state(parameter, value, kind)
        return
    # The setters of whole tensors fail where the ranks do not divide the number of elements: the last share is padded.
    num_elements: int = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank, world_size = engine.accelerator.process_index, engine.accelerator.num_processes
    padded = torch.nn.functional.pad(value.flatten(), (0, num_elements * world_size - value.numel()))
    share = padded[rank * num_elements :][:num_elements]
    if kind is None:
        utils.safe_set_local_fp32_param(parameter, share)
    else:
        utils.safe_set_local_optimizer_state(parameter, share, kind)


def _shape(parameter: Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _is_zero(engine: Engine) -> bool:
    return hasattr(engine.model, "zero_optimization_stage")


def _inner_optimizer(engine: Engine) -> Any:
    """Return torch's optimizer, within accelerate's wrapper and ZeRO's."""
    wrapped: Any = engine.optimizer.optimizer  # type: ignore[attr-defined]
    return wrapped.optimizer if _is_zero(engine) else wrapped
