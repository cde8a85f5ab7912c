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

ADAPTER_METADATA_KEY = "lora_adapter_metadata"
"""Where diffusers looks for rank and alpha: ``diffusers.loaders.lora_base.LORA_ADAPTER_METADATA_KEY``."""

LINEAGE_KEY = "diffsynth_pipe"


def write_lora(
    path: Path, tensors: Mapping[str, Tensor], adapter: Mapping[str, object], lineage: Mapping[str, object]
) -> str:
    """Write a LoRA file and read it back.

    The bytes depend on the arguments alone, so the same run writes the same file.

    Args:
        path: The ``.safetensors`` file; an older one is replaced.
        tensors: CPU tensors by their names in the file.
        adapter: Rank and alpha, as ``lora.adapter_metadata`` returns them.
        lineage: What the weights were made from.

    Returns:
        Digest of the file, 32 hex digits.

    Raises:
        LaunchError: The disk gave back other bytes.
    """
    metadata = {"format": "pt", ADAPTER_METADATA_KEY: _json(adapter), LINEAGE_KEY: _json(lineage)}
    payload = with_metadata(safetensors.torch.save(dict(tensors)), metadata)
    replace_file(path, payload, path.parent)
    with safetensors.safe_open(path, framework="pt") as file:
        names = set(file.keys())
        same = names == set(tensors) and all(
            torch.equal(file.get_tensor(name).view(torch.uint8), tensors[name].view(torch.uint8)) for name in names
        )
    if not same:
        raise LaunchError(f"{path} does not read back as it was written; check the disk, then run again")
    return blake3(payload).hexdigest(length=16)


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, sort_keys=True)


def with_metadata(payload: bytes, metadata: Mapping[str, str]) -> bytes:
    """Add metadata to a safetensors file; safetensors itself writes it in an order that differs from call to call."""
    length = int.from_bytes(payload[:8], "little")
    header = {"__metadata__": metadata, **json.loads(payload[8 : 8 + length])}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded + payload[8 + length :]
