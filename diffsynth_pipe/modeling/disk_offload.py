"""Leave a frozen model's weights in its safetensors files, and read each layer's when it runs."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffsynth_pipe.errors import ModelError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

    from torch import device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import ComponentFiles


def load_offloaded(model_class: Any, files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load a frozen model in eval mode without its weights, for inference.

    Its parameters are on ``meta``; accelerate's hooks put a layer's own on the device for as long as it runs. Buffers
    are on the device.

    Args:
        model_class: A class of diffusers or transformers.
        files: The model.
        dtype: Dtype of its parameters; weights of another one are cast whenever they are read.
        device: Where it computes; its ``device`` says so too, as callers send inputs there.

    Raises:
        ModelError: The files are not the weights of the model that ``config.json`` describes.
    """
    from accelerate.hooks import attach_align_device_hook, remove_hook_from_submodules
    from accelerate.utils import OffloadedWeightsLoader

    is_diffusers = hasattr(model_class, "load_config")
    model, places = (_diffusers_model if is_diffusers else _transformers_model)(model_class, files, dtype)
    for name, _ in model.named_parameters(remove_duplicate=False):
        if name not in places:
            raise ModelError(f"{files.folder}: the weights lack {name!r}; download the model again")
    remove_hook_from_submodules(model)  # those of transformers would compute on the CPU
    weights = OffloadedWeightsLoader(index=places, device=str(device))
    attach_align_device_hook(model, execution_device=str(device), offload=True, weights_map=weights)
    own_class = type(model)
    attributes = {"device": property(lambda _: device), "__module__": own_class.__module__}
    model.__class__ = type(own_class.__name__, (own_class,), attributes)
    return model.eval().requires_grad_(False)


def _diffusers_model(model_class: Any, files: ComponentFiles, dtype: dtype) -> tuple[Any, Mapping[str, Any]]:
    """Return an empty model, and where each of its parameters lies; ``from_pretrained`` would write copies of them."""
    model = build_empty(lambda folder: model_class.from_config(model_class.load_config(folder)), files.folder, dtype)
    places = {
        name: {"safetensors_file": str(path), "weight_name": name} for path, _, name in stored_parameters(model, files)
    }
    return model, places


def _transformers_model(model_class: Any, files: ComponentFiles, dtype: dtype) -> tuple[Any, Mapping[str, Any]]:
    """Return an empty model, and where each of its parameters lies: under another name or shared, as they load it."""
    model = model_class.from_pretrained(
        files.folder, dtype=dtype, device_map={"": "disk"}, use_safetensors=True, local_files_only=True
    )
    first, _ = next(model.named_parameters())
    return model, model.get_submodule(first.rpartition(".")[0])._hf_hook.weights_map.dataset.index


def build_empty(build: Callable[[Path], Module], folder: Path, dtype: dtype) -> Module:
    """Build a diffusers model with its parameters on ``meta``, and with the buffers that ``from_pretrained`` makes."""
    from accelerate import init_empty_weights

    with _default_dtype(dtype), init_empty_weights(include_buffers=False):
        return build(folder)


def stored_parameters(model: Module, files: ComponentFiles) -> Iterator[tuple[Path, Any, str]]:
    """Go through the weights of a diffusers model, and fill its buffers with those that are stored.

    Yields:
        For each parameter the file that holds it, the same opened, and its name.

    Raises:
        ModelError: The files are not the weights of the model that ``config.json`` describes.
    """
    import torch
    from safetensors import safe_open

    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    buffers = dict(model.named_buffers())
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
                yield path, file, name
    if shapes:
        raise ModelError(f"{files.folder}: the weights lack {next(iter(shapes))!r}; download the model again")


@contextmanager
def _default_dtype(dtype: dtype) -> Iterator[None]:
    import torch

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
