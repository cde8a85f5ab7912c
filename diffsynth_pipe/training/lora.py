"""Add a LoRA to a denoiser, start it from a file, fuse another one into the base weights."""

from __future__ import annotations

import contextlib
import difflib
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from diffsynth_pipe.config import comma_list
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.modeling.quantization import is_named
from diffsynth_pipe.training.zero3 import whole

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch.nn import Linear, Module, Parameter

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.training.lora_file import LoraFile

ADAPTER_NAME = "default"
MIN_AUTOMATIC_FEATURES = 512
"""The automatic rule passes over layers with fewer inputs or outputs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraSettings:
    """Which layers get a LoRA, and of what kind.

    Attributes:
        targets: Names of linear layers, as a whole or from a dot onwards: ``attn.to_q`` or ``to_q``. A ``str`` is a
            regular expression that matches whole names. Empty: the automatic rule of ``target_layers``.
        rank: Rank of each update.
        alpha: The update B·A is scaled by alpha / rank.
        dropout: Share of a LoRA's inputs that are zeroed in training.
        use_dora: Train the norms of the weight's rows too (DoRA, arXiv 2402.09353).
        use_rslora: Scale by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732).
    """

    targets: str | tuple[str, ...]
    rank: int
    alpha: float
    dropout: float = 0.0
    use_dora: bool = False
    use_rslora: bool = False

    @property
    def scale(self) -> float:
        """What B·A is multiplied by."""
        return self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)


def lora_settings(config: RunConfig, default_targets: str | tuple[str, ...]) -> LoraSettings:
    """Return the LoRA that a run asks for.

    Args:
        config: The run.
        default_targets: What ``lora_target_modules`` is where the run does not set it.
    """
    return LoraSettings(
        targets=parse_targets(config.lora_target_modules, default_targets),
        rank=config.lora_rank,
        alpha=config.lora_rank if config.lora_alpha is None else config.lora_alpha,
        dropout=config.lora_dropout,
        use_dora=config.lora_use_dora,
        use_rslora=config.lora_use_rslora,
    )


def parse_targets(text: str | None, default: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Return the targets that ``lora_target_modules`` means; see ``LoraSettings.targets``.

    As in the reference, a single item is a regular expression, except where it can only be meant as a name.
    """
    if text is None:
        return default
    items = comma_list(text)
    is_pattern = len(items) == 1 and not re.fullmatch(r"[\w.]+", items[0])
    return items[0] if is_pattern else items


def linear_layers(model: Module) -> dict[str, Linear]:
    """Return the linear layers of the base model by name, whether or not they have a LoRA."""
    return {
        name.removesuffix(".base_layer"): module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and ".lora_" not in name
    }


def target_layers(model: Module, targets: str | tuple[str, ...]) -> list[str]:
    """Return the names of the layers that the targets mean.

    The automatic rule is the reference's: linear layers inside of module lists with more than one entry that have at
    least 512 inputs and outputs.

    Raises:
        ModelError: A target matches no linear layer.
    """
    linear = linear_layers(model)
    if not targets:
        lists = [name for name, module in model.named_modules() if _is_list(module) and len(module) > 1]
        found = [
            name
            for name, layer in linear.items()
            if min(layer.in_features, layer.out_features) >= MIN_AUTOMATIC_FEATURES
            and any(name.startswith(f"{parent}.") for parent in lists)
        ]
        if not found:
            raise ModelError(
                f'lora_target_modules: the automatic rule ("") finds no linear layer with at least '
                f"{MIN_AUTOMATIC_FEATURES} inputs and outputs in the blocks of {type(model).__name__}; name layers"
            )
    elif isinstance(targets, str):
        found = [name for name in linear if re.fullmatch(targets, name)]
        if not found:
            raise ModelError(
                f"lora_target_modules: the regular expression {targets!r} matches no linear layer of "
                f"{type(model).__name__}; it must match whole names, such as {next(iter(linear))}"
            )
    else:
        for target in targets:
            _check_target(model, target)
        found = [name for name in linear if any(is_named(name, target) for target in targets)]
    return found


def add_lora(model: Module, settings: LoraSettings, seed: int) -> None:
    """Add a trainable LoRA to a frozen model, in place.

    B starts at zero, A as peft initialises it, from the seed alone: equal on all ranks. The weights are fp32, whatever
    the dtype of the base.

    Raises:
        ModelError: A target matches no linear layer.
    """
    from peft import LoraConfig, inject_adapter_in_model
    from peft.utils.integrations import dequantize_module_weight

    layers = target_layers(model, settings.targets)
    lora = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        use_dora=settings.use_dora,
        use_rslora=settings.use_rslora,
        # A pattern, as peft takes the names in a list for endings of names too.
        target_modules="|".join(map(re.escape, layers)),
    )
    with torch.random.fork_rng(devices=[]), _weights_gathered_for_dora():
        torch.manual_seed(seed)
        inject_adapter_in_model(lora, model, adapter_name=ADAPTER_NAME)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    if settings.use_dora:
        # peft rounds the norms to the dtype of the base, which would change the model before its first step.
        norms = {f"{name}.lora_magnitude_vector": layer for name, layer in linear_layers(model).items()}
        for name, parameter in lora_parameters(model).items():
            if name in norms:
                with whole([norms[name].weight]):  # type: ignore[list-item]
                    parameter.data = dequantize_module_weight(norms[name]).detach().float().norm(dim=1)


def lora_parameters(model: Module) -> dict[str, Parameter]:
    """Return the parameters of the LoRA by peft's names, ``<layer>.lora_A.weight``, before an engine wraps the model.

    With DoRA there are ``<layer>.lora_magnitude_vector`` too.
    """
    return {
        name.replace(f".{ADAPTER_NAME}.", ".").replace("lora_magnitude_vector.weight", "lora_magnitude_vector"): value
        for name, value in model.named_parameters()
        if ".lora_" in name
    }


def load_lora(model: Module, file: LoraFile, settings: LoraSettings) -> None:
    """Start the LoRA of a model from a file. Where the scales differ, B takes up the difference.

    Raises:
        ModelError: The file has other layers or another rank than the LoRA, or only one of both is a DoRA.
    """
    parameters = lora_parameters(model)
    layers = {name.rpartition(".lora_")[0] for name in parameters}
    for layer, update in file.updates.items():
        if layer not in layers:
            raise ModelError(
                f"{file}: {update.key!r} is for a layer that lora_target_modules leaves out; name all of the file's"
            )
        if update.rank != settings.rank:
            raise ModelError(
                f"{file}: {update.key!r} has rank {update.rank}, but lora_rank is {settings.rank}; set it to that rank"
            )
        if (update.magnitude is not None) != settings.use_dora:
            has = "has a DoRA" if update.magnitude is not None else "has no DoRA"
            raise ModelError(
                f"{file}: {has} at {update.key!r}, but lora_use_dora is {str(settings.use_dora).lower()}; change it"
            )
    for layer in sorted(layers - set(file.updates)):
        raise ModelError(
            f"{file}: lacks '{layer}.lora_A.weight'; leave the layer out of lora_target_modules or take a whole file"
        )
    with torch.no_grad(), whole(parameters.values(), modifier_rank=0):
        for layer, update in file.updates.items():
            parameters[f"{layer}.lora_A.weight"].copy_(update.down)
            parameters[f"{layer}.lora_B.weight"].copy_(update.up * (update.scale / settings.scale))
            if update.magnitude is not None:
                parameters[f"{layer}.lora_magnitude_vector"].copy_(update.magnitude)


def fuse_lora(model: Module, file: LoraFile) -> None:
    """Add the update of a LoRA file to the base weights, in place and in fp32; layer by layer under ZeRO-3."""
    linear = linear_layers(model)
    for layer, update in file.updates.items():
        weight: Parameter = linear[layer].weight  # type: ignore[assignment]
        with torch.no_grad(), whole([weight], modifier_rank=0):
            down, up = (tensor.to(weight.device) for tensor in (update.down, update.up))
            fused = weight.float() + update.scale * (up @ down)
            if update.magnitude is not None:
                fused *= (update.magnitude.to(weight.device) / fused.norm(dim=1))[:, None]
            weight.copy_(fused)


@contextlib.contextmanager
def _weights_gathered_for_dora() -> Iterator[None]:
    """Let peft see the weights whose norms it takes; it gathers them only where transformers was told of ZeRO-3."""
    from peft.tuners.lora import dora

    original = dora.gather_params_ctx
    dora.gather_params_ctx = whole
    try:
        yield
    finally:
        dora.gather_params_ctx = original


def _is_list(module: Module) -> bool:
    return isinstance(module, torch.nn.ModuleList)


def _check_target(model: Module, target: str) -> None:
    matched = [(name, module) for name, module in model.named_modules() if is_named(name, target)]
    wrong = [name for name, module in matched if not isinstance(module, torch.nn.Linear)]
    if matched and not wrong:
        return
    found = f"matches {wrong[0]!r}, which is not a linear layer" if wrong else "matches no module"
    layers = [name.split(".") for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    endings = sorted({".".join(parts[-length:]) for parts in layers for length in (1, 2)})
    near = difflib.get_close_matches(target, endings, n=5, cutoff=0.4) or endings[:5]
    raise ModelError(f"lora_target_modules: {target!r} {found} of {type(model).__name__}; near: {', '.join(near)}")
