"""Load a model into ZeRO-3's partitions tensor by tensor, so that no rank and no device ever holds the whole of it."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module, Parameter

from diffsynth_pipe.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import device, dtype

    from diffsynth_pipe.contracts import ComponentFiles


def load_partitioned(
    build: Callable[[Path], Module],
    files: ComponentFiles,
    dtype: dtype,
    device: device,
    deepspeed_settings: Mapping[str, Any],
) -> Module:
    """Load a frozen model whose parameters are partitioned over the ranks; every rank must take part.

    It is built without weights and with the buffers that ``from_pretrained`` gives it. Rank 0 reads one tensor after
    the other from the mapped file and broadcasts it; each rank keeps its part of it where ``offload_param`` says.
    Beside its partitions a rank holds one buffer, of the size of the largest tensor, and rank 0 the mapped pages of one
    file, which the system can take back.

    Args:
        build: Builds the model from the folder of its ``config.json``.
        files: The model.
        dtype: Dtype of all its parameters.
        device: The training device of this rank, which holds the buffer.
        deepspeed_settings: The DeepSpeed file's contents, without ``auto``.

    Raises:
        ModelError: The files are not the weights of the model that ``config.json`` describes.
    """
    from accelerate import init_empty_weights
    from safetensors import safe_open

    with _default_dtype(dtype), init_empty_weights(include_buffers=False):
        model = build(files.folder)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
    partition = _Partition(dtype, deepspeed_settings)
    is_reader = torch.distributed.get_rank() == 0
    # One for all: a new one each would be freed between the partitions, and the C library would keep the gaps.
    buffer = torch.empty(max(shape.numel() for shape in shapes.values()), dtype=dtype, device=device)
    for path in files.weights:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no dict
                if name in buffers:
                    buffers[name].copy_(file.get_tensor(name))
                    continue
                shape, found = shapes.pop(name, None), torch.Size(file.get_slice(name).get_shape())
                if shape != found:
                    expected = "does not exist" if shape is None else f"has shape {list(shape)}"
                    raise ModelError(
                        f"{path}: {name!r} has shape {list(found)}, but {expected} in the {type(model).__name__} of "
                        "config.json; download the model again"
                    )
                whole = buffer[: found.numel()].view(found)
                if is_reader:
                    whole.copy_(file.get_tensor(name))
                parameter = Parameter(whole, requires_grad=False)
                partition(parameter)
                prefix, _, short = name.rpartition(".")
                setattr(model.get_submodule(prefix), short, parameter)
    if shapes:
        raise ModelError(f"{files.folder}: the weights lack {next(iter(shapes))!r}; download the model again")
    return model


class _Partition:
    """Partitions parameters one by one, all by one ``deepspeed.zero.Init``."""

    def __init__(self, dtype: dtype, settings: Mapping[str, Any]) -> None:
        self._dtype = dtype
        self._settings = settings
        self._first: Any = None

    def __call__(self, parameter: Parameter) -> None:
        import deepspeed

        if self._first is None:
            holder = Module()
            holder.register_parameter("first", parameter)
            # Its own argument for the dtype is passed over, for bf16, on processors without fp16.
            dtypes = {"bf16": {"enabled": self._dtype is torch.bfloat16}, "fp16": {"enabled": False}}
            deepspeed.zero.Init(module=holder, config_dict_or_path={**self._settings, **dtypes})
            self._first = parameter
        else:
            # What deepspeed.initialize calls for the parameters that it finds unpartitioned in a partitioned model.
            self._first.convert_to_zero_parameters(param_list=[parameter])


@contextmanager
def _default_dtype(dtype: dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
