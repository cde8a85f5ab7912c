"""LoRA files: the names that diffusers, DiffSynth-Studio and ComfyUI give the weights, written and read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from diffsynth_pipe.errors import ModelError, ModelFileMissing
from diffsynth_pipe.training.lora import ADAPTER_NAME, linear_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.config import LoraFormat
    from diffsynth_pipe.training.lora import LoraSettings

ADAPTER_METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers looks for rank and alpha: ``diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY``."""

IMPLEMENTATIONS: Mapping[LoraFormat, str] = {
    "diffusers": "diffusers",
    "diffsynth": "https://github.com/modelscope/DiffSynth-Studio",
    "comfyui": "https://github.com/comfyanonymous/ComfyUI",
}
PARTS = {
    "lora_A": "down",
    "lora_down": "down",
    "lora_B": "up",
    "lora_up": "up",
    "lora_magnitude_vector": "magnitude",
    "alpha": "alpha",
}
KEY = re.compile(rf"(.+)\.({'|'.join(PARTS)})(?:\.{ADAPTER_NAME})?(?:\.weight)?")


def export_lora(
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    lora_format: LoraFormat,
    *,
    prefix: str,
    architecture: str,
    resolution: str | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    ``diffusers`` keeps rank and alpha in the metadata, ``comfyui`` (kohya's names) has an alpha for each layer, and
    ``diffsynth`` knows none, so that B takes up the scale there.

    Args:
        tensors: The weights, by the names of ``lora.lora_parameters``.
        settings: Of the LoRA.
        lora_format: Whose names to use.
        prefix: What diffusers puts before the denoiser's names: ``transformer``.
        architecture: ``ModelFamily.architecture``.
        resolution: What ``resolution_of`` returns.

    Returns:
        Tensors by their names in the file, and the metadata: what diffusers needs, and https://github.com/Stability-AI/ModelSpec
        without a date, as the same run is to write the same bytes.
    """
    assert lora_format == "diffusers" or not settings.use_dora, "only diffusers' format has a place for the norms"
    metadata = {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": IMPLEMENTATIONS[lora_format],
        "modelspec.title": f"{architecture} LoRA of rank {settings.rank}",
    }
    if resolution is not None:
        metadata["modelspec.resolution"] = resolution
    exported: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        layer, _, part = name.rpartition(".lora_")
        match lora_format:
            case "diffusers":
                exported[f"{prefix}.{name}"] = tensor
            case "diffsynth":
                weight = tensor * settings.scale if part == "B.weight" and settings.scale != 1 else tensor
                exported[f"{layer}.lora_{part.removesuffix('.weight')}.{ADAPTER_NAME}.weight"] = weight
            case "comfyui":
                flat = _flat(layer)
                exported[f"{flat}.lora_{'down' if part == 'A.weight' else 'up'}.weight"] = tensor
                exported[f"{flat}.alpha"] = torch.tensor(settings.scale * settings.rank)
    if lora_format == "diffusers":
        metadata[ADAPTER_METADATA_KEY] = json.dumps(_adapter(tensors, settings, prefix), sort_keys=True)
    return exported, metadata


def resolution_of(buckets: Iterable[str]) -> str | None:
    """Return the resolution of all samples as ModelSpec has it, width before height; None if there are several."""
    matches = [re.fullmatch(r"(\d+)x(\d+)(x\d+)?", bucket) for bucket in buckets]
    sizes = {match and f"{match[2]}x{match[1]}" for match in matches}
    return sizes.pop() if len(sizes) == 1 else None


def _adapter(names: Iterable[str], settings: LoraSettings, prefix: str) -> dict[str, object]:
    """Return the arguments of ``peft.LoraConfig``, whose defaults hold for the rest.

    Source of the form: ``diffusers.training_utils._collate_lora_metadata`` and ``_pack_dict_with_prefix``.
    """
    is_list = settings.targets and not isinstance(settings.targets, str)
    targets = settings.targets if is_list else {name.rpartition(".lora_")[0] for name in names}
    adapter: dict[str, object] = {"r": settings.rank, "lora_alpha": settings.alpha, "target_modules": sorted(targets)}
    if settings.use_dora:
        adapter["use_dora"] = True
    if settings.use_rslora:
        adapter["use_rslora"] = True
    return {f"{prefix}.{name}": value for name, value in adapter.items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerUpdate:
    """What a LoRA adds to the weight of one layer: scale · up · down.

    Attributes:
        key: The name of ``down`` in the file.
        down: fp32 ``[rank, in]``.
        up: fp32 ``[out, rank]``.
        scale: alpha / rank.
        magnitude: DoRA's norms, fp32 ``[out]``.
    """

    key: str
    down: Tensor
    up: Tensor
    scale: float
    magnitude: Tensor | None

    @property
    def rank(self) -> int:
        """Rank of the update."""
        return self.down.shape[0]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraFile:
    """A LoRA file that fits a model; as text, the start of a message about it.

    Attributes:
        parameter: The RunConfig field that named it.
        path: Where it lies.
        updates: By layer.
    """

    parameter: str
    path: Path
    updates: Mapping[str, LayerUpdate]

    def __str__(self) -> str:
        """Return ``lora_checkpoint: a.safetensors``."""
        return f"{self.parameter}: {self.path}"


@dataclass(slots=True)
class _Parts:
    keys: dict[str, str] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)


def read_lora(path: str | Path, model: Module, *, prefix: str, parameter: str) -> LoraFile:
    """Read a LoRA file in any of the three formats, which its keys tell, and check that it fits a model.

    Args:
        path: A ``.safetensors`` file.
        model: The denoiser, with or without a LoRA.
        prefix: What diffusers puts before the denoiser's names: ``transformer``.
        parameter: The RunConfig field that named the file, for messages.

    Raises:
        ModelFileMissing: There is no such file.
        ModelError: It is no LoRA file, or one for another model, or lacks a weight, or holds a NaN.
    """
    where = f"{parameter}: {path}"
    tensors, metadata = _read(Path(path), where)
    linear = linear_layers(model)
    layer_of = {f"{start}{name}": name for name in linear for start in ("", f"{prefix}.", "diffusion_model.")}
    layer_of |= {_flat(name): name for name in linear}
    found: dict[str, _Parts] = {}
    for key, tensor in tensors.items():
        match = KEY.fullmatch(key)
        if match is None:
            raise ModelError(
                f"{where}: {key!r} is no weight of a LoRA as diffusers, DiffSynth-Studio or ComfyUI name it; "
                "take another file"
            )
        if match[1] not in layer_of:
            raise ModelError(
                f"{where}: {key!r} is for no linear layer of {type(model).__name__}; take a LoRA of this model"
            )
        parts = found.setdefault(layer_of[match[1]], _Parts())
        part = PARTS[match[2]]
        if part in parts.keys:
            raise ModelError(f"{where}: {key!r} and {parts.keys[part]!r} are the same weight; take another file")
        parts.keys[part] = key
        parts.tensors[part] = tensor.float()
        if not parts.tensors[part].isfinite().all():
            raise ModelError(f"{where}: {key!r} is NaN or Inf; take another file")
    if not found:
        raise ModelError(f"{where}: holds no weight; take another file")
    adapter = _read_adapter(metadata, prefix, where)
    updates = {}
    for name, parts in found.items():
        _check_parts(parts, linear[name].in_features, linear[name].out_features, type(model).__name__, where)
        updates[name] = LayerUpdate(
            key=parts.keys["down"],
            down=parts.tensors["down"],
            up=parts.tensors["up"],
            scale=_scale(name, parts, adapter),
            magnitude=parts.tensors.get("magnitude"),
        )
    return LoraFile(parameter=parameter, path=Path(path), updates=updates)


def _read(path: Path, where: str) -> tuple[dict[str, Tensor], Mapping[str, str]]:
    if not path.is_file():
        raise ModelFileMissing(f"{where} is not a file; check the path")
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in sorted(file.keys())}, file.metadata() or {}
    except (safetensors.SafetensorError, OSError) as error:
        raise ModelError(f"{where} cannot be read as safetensors ({error}); take another file") from error


def _read_adapter(metadata: Mapping[str, str], prefix: str, where: str) -> dict[str, Any]:
    """Return peft's settings from the metadata; diffusers writes them with the prefix or, for a lone model, without."""
    try:
        stored = json.loads(metadata.get(ADAPTER_METADATA_KEY, "{}"))
        adapter = {name.removeprefix(f"{prefix}."): value for name, value in stored.items()}
        alphas = [adapter.get("lora_alpha", 1.0), *adapter.get("alpha_pattern", {}).values()]
        usable = all(math.isfinite(alpha) for alpha in alphas)
    except (AttributeError, TypeError, ValueError):
        usable = False
    if not usable:
        raise ModelError(f"{where}: its metadata {ADAPTER_METADATA_KEY} is damaged; take another file")
    return adapter


def _check_parts(parts: _Parts, num_in: int, num_out: int, model_name: str, where: str) -> None:
    a_key = next(iter(parts.keys.values()))
    for part in ("down", "up"):
        if part not in parts.keys:
            raise ModelError(f"{where}: {a_key!r} is there without the {part} weight beside it; take a whole file")
    down = parts.tensors["down"]
    rank = down.shape[0] if down.ndim else 0
    shapes = {"down": (rank, num_in), "up": (num_out, rank), "magnitude": (num_out,)}
    for part, shape in shapes.items():
        tensor = parts.tensors.get(part)
        if tensor is not None and (rank == 0 or tuple(tensor.shape) != shape):
            raise ModelError(
                f"{where}: {parts.keys[part]!r} has shape {list(tensor.shape)}, but {model_name} takes {list(shape)}; "
                "take a LoRA of this model"
            )
    if "alpha" in parts.keys and parts.tensors["alpha"].numel() != 1:
        raise ModelError(f"{where}: {parts.keys['alpha']!r} is not one number; take another file")


def _scale(layer: str, parts: _Parts, adapter: Mapping[str, Any]) -> float:
    """Return alpha / rank as the file has it; 1 if it has none."""
    rank = parts.tensors["down"].shape[0]
    if "alpha" in parts.keys:
        return parts.tensors["alpha"].item() / rank
    from peft.utils.other import get_pattern_key

    patterns = adapter.get("alpha_pattern", {})
    alpha = patterns.get(get_pattern_key(list(patterns), layer), adapter.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)  # type: ignore[no-any-return]


def _flat(layer: str) -> str:
    """Return kohya's name of a layer, which ComfyUI maps to the model's own names."""
    return f"lora_unet_{layer.replace('.', '_')}"
