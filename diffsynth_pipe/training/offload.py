"""Keep the denoiser's weights in host memory and bring them to the device module by module, forward and backward.

Own code, as no library does it for training: accelerate's hooks put new tensors in the place of parameters, which then
get no gradients, and diffusers' group offloading brings nothing back for the backward pass, nor leaves out what is
trained.
"""

from __future__ import annotations

import functools
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch.autograd.graph import saved_tensors_hooks
from torch.nn import Module

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from torch import Tensor

MEBI = 1024 * 1024


def offload_weights(model: Module, device: torch.device, *, split_threshold: int | None, offload_trained: bool) -> None:
    """Let a model in host memory compute on a device, with the weights of one module at a time there.

    A module's weights are copied when its ``forward`` begins, and the copies are let go when it ends. What autograd
    saves of a copy is the weight at home, copied anew for the backward pass; under gradient checkpointing, whose own
    hooks take precedence, a block's copies stay from when it is computed again to the end of its backward pass. What is
    trained moves to the device for good, or with ``offload_trained`` remains at home, where its gradients then arrive.

    Args:
        model: A model in host memory that has its LoRA.
        device: Where its inputs are.
        split_threshold: A module with more than so many times 1024² parameters brings its children one by one, as the
            reference counts; by default every layer comes by itself.
        offload_trained: Whether what is trained, and so the optimizer's state and step, remains in host memory.
    """
    resident = set()
    for parameter in model.parameters():
        if parameter.requires_grad and not offload_trained:
            parameter.data = parameter.data.to(device)
            resident.add(id(parameter))
    weights = _Weights(device, resident)
    for module, parts in list(_units(model, split_threshold)):
        module.forward = _within(functools.partial(weights.brought, parts), module.forward)
    model.forward = _within(weights.saved_at_home, model.forward)


def _units(module: Module, split_threshold: int | None) -> Iterator[tuple[Module, list[Module]]]:
    """Yield modules, and with each those of its parts whose weights come when it runs, unless they are there already.

    The parts of one that comes as a whole are yielded too: gradient checkpointing runs blocks by themselves.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    num_parameters = sum(parameter.numel() for parameter in module.parameters())
    has_forward = type(module).forward is not Module.forward  # unlike a ModuleList
    is_small = split_threshold is not None and num_parameters <= split_threshold * MEBI
    # DoRA reads the weights of the layer below it.
    as_a_whole = (has_forward and is_small) or isinstance(module, BaseTunerLayer)
    yield module, list(module.modules()) if as_a_whole else [module]
    for child in module.children():
        yield from _units(child, split_threshold)


def _within(context: Any, function: Any) -> Any:
    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with context():
            return function(*args, **kwargs)

    return run


@dataclass(frozen=True, slots=True)
class _Saved:
    """A view of a weight that autograd saved, told by the weight at home."""

    home: Tensor
    size: torch.Size
    stride: tuple[int, ...]
    offset: int


class _Weights:
    """Weights at home, and their copies on the device for as long as modules compute with them.

    Args:
        device: Where the copies are made.
        resident: Ids of the parameters that are there already.
    """

    def __init__(self, device: torch.device, resident: set[int]) -> None:
        self._device = device
        self._resident = resident
        self._homes: dict[int, Tensor] = {}

    @contextmanager
    def brought(self, parts: list[Module]) -> Iterator[None]:
        """Put copies on the device in the place of the modules' own parameters and buffers."""
        places = [
            (table, name, home)
            for part in parts
            for table in (part._parameters, part._buffers)
            for name, home in table.items()
            if home is not None and id(home) not in self._resident and _storage(home) not in self._homes
        ]
        copies = {id(home): home.to(self._device, copy=True) for _, _, home in places}
        for table, name, home in places:
            table[name] = copies[id(home)]  # type: ignore[assignment]
            self._homes[_storage(copies[id(home)])] = home
        try:
            yield
        finally:
            for table, name, home in places:
                table[name] = home  # type: ignore[assignment]
            for copy in copies.values():
                del self._homes[_storage(copy)]

    def saved_at_home(self) -> saved_tensors_hooks:
        """Let autograd save the weights at home in the place of their copies."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def _pack(self, tensor: Tensor) -> Tensor | _Saved:
        home = self._homes.get(_storage(tensor))
        if home is None or home.dtype != tensor.dtype:
            return tensor
        return _Saved(home, tensor.size(), tensor.stride(), int(tensor.storage_offset()))

    def _unpack(self, saved: Tensor | _Saved) -> Tensor:
        if not isinstance(saved, _Saved):
            return saved
        copy = saved.home.detach().to(self._device, copy=True)
        return copy.as_strided(saved.size, saved.stride, saved.offset)


def _storage(tensor: Tensor) -> int:
    """Return what views of one memory share."""
    return int(tensor.untyped_storage()._cdata)
