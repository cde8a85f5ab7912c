"""Load a model into ZeRO-3's partitions tensor by tensor, so that no rank and no device ever holds the whole of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import Module, Parameter

from diffsynth_pipe.modeling.disk_offload import build_empty, stored_parameters

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
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
    model = build_empty(build, files.folder, dtype)
    partition = _Partition(dtype, deepspeed_settings)
    is_reader = torch.distributed.get_rank() == 0
    # One for all: a new one each would be freed between the partitions, and the C library would keep the gaps.
    buffer = torch.empty(max(parameter.numel() for parameter in model.parameters()), dtype=dtype, device=device)
    for _, file, name in stored_parameters(model, files):
        prefix, _, short = name.rpartition(".")
        module = model.get_submodule(prefix)
        shape = module.get_parameter(short).shape
        whole = buffer[: shape.numel()].view(shape)
        if is_reader:
            whole.copy_(file.get_tensor(name))
        parameter = Parameter(whole, requires_grad=False)
        partition(parameter)
        setattr(module, short, parameter)
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
