"""LoRA files: written so that a crash leaves the old file or the new one, and read back."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import safetensors
import safetensors.torch
import torch
from blake3 import blake3

from cache_store.durable import replace_file
from diffsynth_pipe.errors import LaunchError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from torch import Tensor

LINEAGE_KEY = "diffsynth_pipe"


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], lineage: Mapping[str, object]
) -> str:
    """Write a LoRA file and read it back.

    The bytes depend on the arguments alone, so the same run writes the same file.

    Args:
        path: The ``.safetensors`` file; an older one is replaced.
        tensors: CPU tensors by their names in the file.
        metadata: As ``lora_file.export_lora`` returns it.
        lineage: What the weights were made from.

    Returns:
        Digest of the file, 32 hex digits.

    Raises:
        LaunchError: The disk gave back other bytes.
    """
    header = {"format": "pt", **metadata, LINEAGE_KEY: json.dumps(lineage, sort_keys=True)}
    payload = with_metadata(safetensors.torch.save(dict(tensors)), header)
    replace_file(path, payload, path.parent)
    with safetensors.safe_open(path, framework="pt") as file:
        names = set(file.keys())
        same = names == set(tensors) and all(
            torch.equal(_bytes_of(file.get_tensor(name)), _bytes_of(tensors[name])) for name in names
        )
    if not same:
        raise LaunchError(f"{path} does not read back as it was written; check the disk, then run again")
    return blake3(payload).hexdigest(length=16)


def _bytes_of(tensor: Tensor) -> Tensor:
    return tensor.reshape(-1).view(torch.uint8)


def with_metadata(payload: bytes, metadata: Mapping[str, str]) -> bytes:
    """Add metadata to a safetensors file; safetensors itself writes it in an order that differs from call to call."""
    length = int.from_bytes(payload[:8], "little")
    header = {"__metadata__": metadata, **json.loads(payload[8 : 8 + length])}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + payload[8 + length :]
