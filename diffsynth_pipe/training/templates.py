"""Put what a template model makes of a batch into the denoiser: keys and values of its attention, a LoRA per sample."""

from __future__ import annotations

from functools import cache, partial
from typing import TYPE_CHECKING, Any

import torch

from diffsynth_pipe.contracts import TEMPLATE_COLUMN
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.training.lora import ADAPTER_NAME, linear_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch

PARAMETER = "template_model_id_or_path"


class TemplateInjection:
    """Lets a template model act on a denoiser.

    What was put into the denoiser stays there until the next batch, as blocks that are recomputed in the backward pass
    must find it again.

    Args:
        template: The family's bundle of the model; ``modeling.templates.Template``.
        dit: The denoiser.
        hot_loading: Whether a LoRA may be put into it.
        arguments: Further arguments of the model's ``forward``.
    """

    def __init__(self, template: Any, dit: Module, *, hot_loading: bool, arguments: Mapping[str, Any]) -> None:
        self._template = template
        self._dit = dit
        self._arguments = arguments
        self._lora = HotLora(dit) if hot_loading else None
        self.enabled = True
        """Whether batches get anything; the base model's loss is measured without."""

    def __call__(self, batch: Batch) -> None:
        """Run the model on each sample, and put what it yields into the denoiser, with gradients.

        Raises:
            ModelError: That does not fit the denoiser.
        """
        outputs = self._outputs(batch) if self.enabled else []
        if self._template.put_kv_cache is not None:
            self._template.put_kv_cache(self._dit, stack_kv_caches([item.get("kv_cache") or {} for item in outputs]))
        nothing: dict[str, Tensor] = {}
        loras = [item.get("lora") or nothing for item in outputs]
        if self._lora is not None:
            self._lora.put(loras)
        elif any(loras):
            raise ModelError(f"{PARAMETER}: the model yields a LoRA; set enable_lora_hot_loading")

    def _outputs(self, batch: Batch) -> list[dict[str, Any]]:
        """Return what each sample gets; in a validation the noise levels of a sample share one object.

        In training each sample has a call of its own: ranks that call a partitioned model unequally often would wait
        for each other for ever.
        """
        field, lengths = batch.fields[TEMPLATE_COLUMN], batch.lengths[TEMPLATE_COLUMN].tolist()
        packed = [item[:length].tobytes() for item, length in zip(field.cpu().numpy(), lengths, strict=True)]
        make = partial(self._template.outputs, device=field.device, **self._arguments)
        return [make(item) for item in packed] if torch.is_grad_enabled() else list(map(cache(make), packed))


def stack_kv_caches(
    caches: Sequence[Mapping[str, tuple[Tensor, Tensor]]],
) -> dict[str, tuple[Tensor, Tensor]]:
    """Put the keys and values of samples side by side: ``[batch, token, head, channel]`` by block.

    Args:
        caches: Of each sample, with a batch dimension of 1.

    Raises:
        ModelError: The samples have other blocks, or other numbers of tokens.
    """
    stacked: dict[str, tuple[Tensor, Tensor]] = {}
    for name in caches[0] if caches else ():
        shapes = [[tuple(tensor.shape) for tensor in cache[name]] if name in cache else None for cache in caches]
        if shapes.count(shapes[0]) != len(shapes):
            raise ModelError(f"{PARAMETER}: the samples of a batch have {name} of {shapes}; set batch_size to 1")
        keys, values = zip(*(cache[name] for cache in caches), strict=True)
        stacked[name] = torch.cat(keys), torch.cat(values)
    if more := {name for cache in caches for name in cache} - set(stacked):
        raise ModelError(f"{PARAMETER}: only some samples of a batch have {min(more)}; set batch_size to 1")
    return stacked


class HotLora:
    """Adds a LoRA of its own to each sample of a batch: x·Aᵀ·Bᵀ on top of what a linear layer yields.

    Args:
        model: Its linear layers get hooks, which do nothing while there is no LoRA.
    """

    def __init__(self, model: Module) -> None:
        self._updates: dict[str, tuple[Tensor, Tensor]] = {}
        self._layers = linear_layers(model)
        self._num_samples = 0
        for name, layer in self._layers.items():
            layer.register_forward_hook(partial(self._add, name))

    def put(self, loras: Sequence[Mapping[str, Tensor]]) -> None:
        """Set the LoRA of each sample, none for no sample.

        Args:
            loras: ``<layer>.lora_A.weight`` [rank, in] and ``<layer>.lora_B.weight`` [out, rank], as in the reference
                without a scale. Ranks may differ.

        Raises:
            ModelError: A name or a shape fits no linear layer.
        """
        if all(lora is loras[0] for lora in loras):
            loras = loras[:1]
        self._num_samples = len(loras)
        pairs = [self._pairs(lora) for lora in loras]
        self._updates = {}
        for name in {name: None for item in pairs for name in item}:
            layer = self._layers[name]
            like = next(item[name][0] for item in pairs if name in item)
            none = like.new_zeros(0, layer.in_features), like.new_zeros(layer.out_features, 0)
            down, up = zip(*(item.get(name, none) for item in pairs), strict=True)
            rank = max(len(tensor) for tensor in down)
            pad = torch.nn.functional.pad
            # zeros of a missing rank add nothing
            self._updates[name] = (
                torch.stack([pad(tensor, (0, 0, 0, rank - len(tensor))) for tensor in down]),
                torch.stack([pad(tensor, (0, rank - tensor.shape[1])) for tensor in up]),
            )

    def _pairs(self, lora: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
        """Return A and B by layer."""
        found: dict[str, dict[str, Tensor]] = {}
        for key, tensor in lora.items():
            layer, _, part = key.replace(f".{ADAPTER_NAME}.", ".").rpartition(".lora_")
            if layer not in self._layers or part not in ("A.weight", "B.weight"):
                raise ModelError(f"{PARAMETER}: the model yields a LoRA with {key!r}, which is of no linear layer")
            found.setdefault(layer, {})[part[0]] = tensor
        for name, parts in found.items():
            num_in, num_out = self._layers[name].in_features, self._layers[name].out_features
            shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
            rank = shapes["A"][0] if "A" in shapes else 0
            if shapes != {"A": (rank, num_in), "B": (num_out, rank)}:
                raise ModelError(
                    f"{PARAMETER}: the model yields a LoRA for {name!r} with shapes {shapes}, but the layer takes "
                    f"A (rank, {num_in}) and B ({num_out}, rank)"
                )
        return {name: (parts["A"], parts["B"]) for name, parts in found.items()}

    def _add(self, name: str, _layer: Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        update = self._updates.get(name)
        if update is None:
            return None
        down, up = (tensor.to(output.dtype) for tensor in update)
        (x,) = inputs
        if self._num_samples == 1:
            return output + x.to(output.dtype) @ down[0].T @ up[0].T
        if len(x) != self._num_samples:
            raise ModelError(
                f"{PARAMETER}: the model yields a LoRA for {name!r}, which sees the tokens of all samples as one "
                "sequence; set batch_size to 1"
            )
        flat = x.to(output.dtype).reshape(self._num_samples, -1, x.shape[-1])
        return output + (flat @ down.mT @ up.mT).reshape(output.shape)
