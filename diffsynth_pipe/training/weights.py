"""Weights to start a model from, in place of its repository's: ``resume_from_checkpoint``."""

from __future__ import annotations

import json
from contextlib import ExitStack
from typing import TYPE_CHECKING

from diffsynth_pipe.errors import ModelError, ModelFileMissing
from diffsynth_pipe.fingerprint import digest_files, json_digest

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from torch.nn import Module


def weight_files(path: Path) -> list[Path]:
    """Return the safetensors files of a checkpoint: the file itself, or the one or the indexed shards of a folder.

    Raises:
        ModelFileMissing: There is no such file, or a shard is missing.
        ModelError: The folder holds several files that no index ties together, or its index is damaged.
    """
    if not path.is_dir():
        if not path.is_file():
            raise ModelFileMissing(f"resume_from_checkpoint: {path} does not exist; correct the path")
        return [path]
    files = sorted(path.glob("*.safetensors"))
    indices = sorted(path.glob("*.safetensors.index.json"))
    if len(indices) == 1:
        try:
            files = sorted({path / name for name in json.loads(indices[0].read_bytes())["weight_map"].values()})
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"resume_from_checkpoint: {indices[0]} is no index of shards; copy it again") from error
    elif len(files) != 1:
        raise ModelError(
            f"resume_from_checkpoint: {path} holds {len(files)} .safetensors files and {len(indices)} indices of "
            "shards, but one model is needed; name its file"
        )
    absent = [file for file in files if not file.is_file()]
    if absent:
        raise ModelFileMissing(f"resume_from_checkpoint: {absent[0]} does not exist, but the index names it")
    return files


def checkpoint_digest(path: Path) -> str:
    """Return the digest of a checkpoint's bytes, wherever it lies.

    Raises:
        ModelError, DataError: It cannot be read.
    """
    return json_digest(digest_files(weight_files(path), num_threads=4))


def load_checkpoint(model: Module, path: Path, prefixes: Sequence[str]) -> None:
    """Replace all weights of a model by those of a checkpoint, one tensor at a time, cast to the model's dtype.

    Under ZeRO-3 every rank must take part.

    Args:
        model: The model, whole or partitioned, before a LoRA is added.
        path: A safetensors file with the result of a full training, or a folder of it.
        prefixes: What may stand before the names, of all or of none: ``pipe.dit.``.

    Raises:
        ModelError: The files are damaged, hold other names or shapes than the model, or a weight that is NaN or Inf.
    """
    import torch
    from safetensors import SafetensorError, safe_open

    from diffsynth_pipe.training.zero3 import whole

    targets = model.state_dict(keep_vars=True)
    with ExitStack() as stack:
        try:
            files = [stack.enter_context(safe_open(file, framework="pt")) for file in weight_files(path)]
        except SafetensorError as error:
            raise ModelError(f"resume_from_checkpoint: {path} is damaged ({error}); copy it again") from error
        place = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - no mapping
        prefix = next((prefix for prefix in prefixes if place and all(name.startswith(prefix) for name in place)), "")
        _check_names(path, {name.removeprefix(prefix) for name in place}, set(targets), type(model).__name__)
        for name, target in targets.items():
            saved = list(place[prefix + name].get_slice(prefix + name).get_shape())
            expected = list(getattr(target, "ds_shape", target.shape))
            if saved != expected:
                raise ModelError(
                    f"resume_from_checkpoint: {path} is of another {type(model).__name__}: {name} has shape {saved}, "
                    f"expected {expected}"
                )
        for name, target in targets.items():
            tensor = place[prefix + name].get_tensor(prefix + name)
            if not tensor.isfinite().all():
                raise ModelError(f"resume_from_checkpoint: {name} in {path} is NaN or Inf; take an earlier checkpoint")
            with torch.no_grad(), whole([target], modifier_rank=0):
                target.copy_(tensor)


def _check_names(path: Path, found: set[str], expected: set[str], model: str) -> None:
    if any("lora_" in name for name in found):
        raise ModelError(
            f"resume_from_checkpoint: {path} holds a LoRA, not the weights of a {model}; name it by lora_checkpoint"
        )
    differences = [
        f"{len(names)} weights {what}, such as {min(names)}"
        for names, what in ((found - expected, "too many"), (expected - found, "missing"))
        if names
    ]
    if differences:
        raise ModelError(
            f"resume_from_checkpoint: {path} is not of this {model}: {'; '.join(differences)}; name another checkpoint"
        )
