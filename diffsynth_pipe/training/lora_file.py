"""LoRA files: the names that diffusers, DiffSynth-Studio and ComfyUI give the weights, written and read."""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import torch

from diffsynth_pipe.errors import ModelError, ModelFileMissing
from diffsynth_pipe.training.lora import ADAPTER_NAME, linear_layers

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.config import LoraFormat
    from diffsynth_pipe.contracts import LoraLayers
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


def file_layers(model: Module, table: LoraLayers) -> dict[str, dict[str, int]]:
    """Return the layers of a model as a format has them.

    Args:
        model: The denoiser, with or without a LoRA.
        table: One of ``ComponentSpec.lora_layers``.

    Returns:
        Layers by their names in a file, each with the model's layers that it stacks and the rows of each of them.
    """
    linear = linear_layers(model)
    if not table:
        return {name: {name: layer.out_features} for name, layer in linear.items()}
    numbers = sorted({number for name in linear for number in re.findall(r"\.(\d+)\.", name)}, key=int)
    layers = {}
    for name, templates in table.items():
        for number in numbers if "{}" in name else ("",):
            parts = [template.format(number) for template in templates]
            if all(part in linear for part in parts):
                layers[name.format(number)] = {part: linear[part].out_features for part in parts}
    return layers


def check_layers(names: Iterable[str], layers: Mapping[str, Mapping[str, int]], lora_format: LoraFormat) -> None:
    """Refuse a LoRA on a layer that a format has no name for.

    Args:
        names: Of the weights, as ``lora.lora_parameters`` has them.
        layers: What ``file_layers`` returns.
        lora_format: For the message.

    Raises:
        ModelError: There is one.
    """
    known = {part for parts in layers.values() for part in parts}
    for name in names:
        layer = name.rpartition(".lora_")[0]
        if layer not in known:
            raise ModelError(
                f"lora_target_modules: {layer!r} has no name in LoRA files of {lora_format}; leave it out, or set "
                "lora_format to diffusers"
            )


def export_lora(
    tensors: Mapping[str, Tensor],
    settings: LoraSettings,
    lora_format: LoraFormat,
    *,
    prefix: str,
    architecture: str,
    resolution: str | None = None,
    layers: Mapping[str, Mapping[str, int]] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a file.

    ``diffusers`` keeps rank and alpha in the metadata, ``comfyui`` (kohya's names) has an alpha for each layer, and
    ``diffsynth`` knows none, so that B takes up the scale there. The LoRAs of layers that a format stacks are stacked
    too: n of rank r make one of rank n·r, whose B is zero off its diagonal of blocks, as is what has no LoRA.

    Args:
        tensors: The weights, by the names of ``lora.lora_parameters``.
        settings: Of the LoRA.
        lora_format: Whose names to use.
        prefix: What diffusers puts before the denoiser's names: ``transformer``.
        architecture: ``ModelFamily.architecture``.
        resolution: What ``resolution_of`` returns.
        layers: What ``file_layers`` returns, checked; None: those that have a LoRA, as they are.

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
    if lora_format == "diffusers":
        metadata[ADAPTER_METADATA_KEY] = json.dumps(_adapter(tensors, settings, prefix), sort_keys=True)
        return {f"{prefix}.{name}": tensor for name, tensor in tensors.items()}, metadata
    exported: dict[str, Tensor] = {}
    for name, down, up in _stacked(tensors, layers):
        if lora_format == "diffsynth":
            exported[f"{name}.lora_A.{ADAPTER_NAME}.weight"] = down
            exported[f"{name}.lora_B.{ADAPTER_NAME}.weight"] = up * settings.scale if settings.scale != 1 else up
        else:
            exported[f"{_flat(name)}.lora_down.weight"] = down
            exported[f"{_flat(name)}.lora_up.weight"] = up
            exported[f"{_flat(name)}.alpha"] = torch.tensor(settings.scale * down.shape[0])
    return exported, metadata


def _stacked(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, int]] | None
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield the layers of a file that have a LoRA: name, A [rank, in] and B [out, rank]."""
    pairs = {
        name.removesuffix(".lora_A.weight"): (tensor, tensors[name.replace(".lora_A.", ".lora_B.")])
        for name, tensor in tensors.items()
        if name.endswith(".lora_A.weight")
    }
    for name, parts in ({name: {name: 0} for name in pairs} if layers is None else layers).items():
        trained = [pairs[part] for part in parts if part in pairs]
        if trained:
            down, up = trained[0]
            absent = [(torch.zeros_like(down), up.new_zeros(num_rows, up.shape[1])) for num_rows in parts.values()]
            downs, ups = zip(*map(pairs.get, parts, absent), strict=True)
            yield name, torch.cat(downs), _block_diag(ups)


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


def read_lora(
    path: str | Path, model: Module, *, prefix: str, parameter: str, tables: Iterable[LoraLayers] = ()
) -> LoraFile:
    """Read a LoRA file in any of the three formats, which its keys tell, and check that it fits a model.

    Args:
        path: A ``.safetensors`` file.
        model: The denoiser, with or without a LoRA.
        prefix: What diffusers puts before the denoiser's names: ``transformer``.
        parameter: The RunConfig field that named the file, for messages.
        tables: Of the formats, ``ComponentSpec.lora_layers``.

    Raises:
        ModelFileMissing: There is no such file.
        ModelError: It is no LoRA file, or one for another model, or lacks a weight, or holds a NaN.
    """
    where = f"{parameter}: {path}"
    tensors, metadata = _read(Path(path), where)
    linear = linear_layers(model)
    layers = file_layers(model, {})
    for table in tables:
        layers |= file_layers(model, table)
    layer_of = {f"{start}{name}": name for name in layers for start in ("", f"{prefix}.", "diffusion_model.")}
    layer_of |= {_flat(name): name for name in layers}
    found: dict[tuple[str, ...], _Parts] = {}
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
        parts = found.setdefault(tuple(layers[layer_of[match[1]]]), _Parts())
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
    updates: dict[str, LayerUpdate] = {}
    for names, parts in found.items():
        num_rows = [linear[name].out_features for name in names]
        _check_parts(parts, linear[names[0]].in_features, sum(num_rows), type(model).__name__, where)
        update = LayerUpdate(
            key=parts.keys["down"],
            down=parts.tensors["down"],
            up=parts.tensors["up"],
            scale=_scale(names[0], parts, adapter),
            magnitude=parts.tensors.get("magnitude"),
        )
        for name, share in zip(names, _split(update, num_rows), strict=True):
            if share is not None and name in updates:
                raise ModelError(
                    f"{where}: {share.key!r} and {updates[name].key!r} are for the same layer; take another file"
                )
            if share is not None:
                updates[name] = share
    return LoraFile(parameter=parameter, path=Path(path), updates=updates)


def _split(update: LayerUpdate, num_rows: list[int]) -> list[LayerUpdate | None]:
    """Return the updates of the layers that one of a file stacks; None for one that is nothing, as ``_stacked`` fills.

    Where B is blocks of equal rank on the diagonal, each layer gets the rank of its block, else that of all.
    """
    if len(num_rows) == 1:
        return [update]
    ups = update.up.split_with_sizes(num_rows)
    columns = [slice(None)] * len(ups)
    if update.rank % len(ups) == 0:
        rank = update.rank // len(ups)
        blocks = [slice(start, start + rank) for start in range(0, update.rank, rank)]
        if torch.equal(_block_diag([up[:, block] for up, block in zip(ups, blocks, strict=True)]), update.up):
            columns = blocks
    magnitudes = [None] * len(ups) if update.magnitude is None else update.magnitude.split_with_sizes(num_rows)
    parts = [
        replace(update, down=update.down[block], up=up[:, block], magnitude=magnitude)
        for up, block, magnitude in zip(ups, columns, magnitudes, strict=True)
    ]
    return [part if part.down.any() or part.up.any() else None for part in parts]


def _block_diag(blocks: Sequence[Tensor]) -> Tensor:
    return torch.block_diag(*blocks)  # type: ignore[no-untyped-call, no-any-return]


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
