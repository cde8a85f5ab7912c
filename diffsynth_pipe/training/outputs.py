"""The files that a run is for: one per LoRA, one folder per fully trained model, each as its pipeline loads it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from diffsynth_pipe.training import checkpoints
from diffsynth_pipe.training.zero3 import whole

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.contracts import ComponentFiles

MAX_SHARD_SIZE = "10GB"


class Output(Protocol):
    """What a checkpoint holds of one trained model."""

    def write(self, folder: Path, weights: Mapping[str, Tensor], step: int, suffix: str = "") -> list[str]:
        """Write the files of this model.

        Args:
            folder: The unfinished checkpoint.
            weights: The trained weights of all models, fp32, by their names in the ``LossModule``.
            step: Optimizer steps taken.
            suffix: Told in the names of files: ``_ema``.

        Returns:
            The files that a user loads, relative to the folder.
        """


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraOutput:
    """A LoRA.

    Attributes:
        name: The model that it is for: ``dit``.
        lora_names: The names of its weights in ``lora.lora_parameters``, by their names in the ``LossModule``.
        export: Gives its tensors the names of a file, and the file its metadata.
        lineage: What the weights were made from.
    """

    name: str
    lora_names: Mapping[str, str]
    export: Callable[[Mapping[str, Tensor]], tuple[Mapping[str, Tensor], Mapping[str, str]]]
    lineage: Mapping[str, object]

    def write(self, folder: Path, weights: Mapping[str, Tensor], step: int, suffix: str = "") -> list[str]:
        """Write ``<name>_lora.safetensors``; see ``Output``."""
        file = f"{self.name}_lora{suffix}.safetensors"
        tensors, metadata = self.export({lora_name: weights[name] for name, lora_name in self.lora_names.items()})
        checkpoints.write_lora(folder / file, tensors, metadata, {**self.lineage, "step": step})
        return [file]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelOutput:
    """A whole model in the layout of its repository, in the dtype that it was loaded in.

    Attributes:
        model: The model; its buffers are taken from here.
        name: Its name in the ``LossModule``: ``text_encoder``.
        subfolder: Its folder in the repository: ``transformer``.
        files: Where it was loaded from; all but the weights is copied from there. The copy of a template model's
            ``model.py`` gets a last line that names them.
        frozen: What ``frozen_weights`` returned.
        prefix: Put before every name.
        lineage: What the weights were made from.
    """

    model: Module
    name: str
    subfolder: str
    files: ComponentFiles
    frozen: Mapping[str, Tensor]
    prefix: str
    lineage: Mapping[str, object]

    def write(self, folder: Path, weights: Mapping[str, Tensor], step: int, suffix: str = "") -> list[str]:
        """Write ``<subfolder>/`` with weights and ``config.json``; see ``Output``."""
        import safetensors.torch
        from huggingface_hub import split_torch_state_dict_into_shards

        prefix = f"models.{self.name}."
        known = {**self.frozen, **{name.removeprefix(prefix): weight for name, weight in weights.items()}}
        tensors = {
            f"{self.prefix}{name}": known.get(name, tensor).detach().to("cpu", tensor.dtype).contiguous()
            for name, tensor in self.model.state_dict().items()
        }
        assert all(tensor.numel() for tensor in tensors.values()), "part of the model lies on other ranks"
        subfolder = f"{self.subfolder}{suffix}"
        target = folder / subfolder
        target.mkdir()
        for path in self.files.code or self.files.folder.glob("*.json"):
            if not path.name.endswith(".index.json"):
                copy = target / path.relative_to(self.files.folder)
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, copy)
        stem = "model" if self.files.code else self.files.weights[0].name.partition(".")[0].partition("-0")[0]
        shards = split_torch_state_dict_into_shards(
            tensors, filename_pattern=f"{stem}{{suffix}}.safetensors", max_shard_size=MAX_SHARD_SIZE
        )
        metadata = {"format": "pt", checkpoints.LINEAGE_KEY: json.dumps({**self.lineage, "step": step}, sort_keys=True)}
        for file, names in shards.filename_to_tensors.items():
            payload = safetensors.torch.save({name: tensors[name] for name in names})
            (target / file).write_bytes(checkpoints.with_metadata(payload, metadata))
        if shards.is_sharded:
            index = {"metadata": shards.metadata, "weight_map": shards.tensor_to_filename}
            (target / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
        if self.files.code:
            names = list(shards.filename_to_tensors)
            with (target / "model.py").open("a", encoding="utf-8") as code:
                code.write(f"\nTEMPLATE_MODEL_PATH = {names if shards.is_sharded else names[0]!r}\n")
        return [f"{subfolder}/{file}" for file in shards.filename_to_tensors]


def frozen_weights(model: Module, *, keep: bool) -> dict[str, Tensor]:
    """Return the parameters of a model that are not trained, on the CPU, as ZeRO-3 leaves nothing of them in it.

    Every rank must take part; those that do not ``keep`` them get nothing.
    """
    weights: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            with whole([parameter]):
                if keep:
                    weights[name] = parameter.detach().cpu()
    return weights
