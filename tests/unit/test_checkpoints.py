"""LoRA files: what is in them, and what is refused."""

import json

import torch
from blake3 import blake3
from safetensors import safe_open

from diffsynth_pipe.training.checkpoints import write_lora

TENSORS = {
    "transformer.b.lora_A.weight": torch.randn(4, 6, generator=torch.Generator().manual_seed(0)),
    "transformer.a.lora_B.weight": torch.zeros(3, 4, dtype=torch.bfloat16),
    "transformer.c.lora_B.weight": torch.tensor([-0.0, 1.0]),
}
METADATA = {"modelspec.title": "a LoRA", "lora_adapter_metadata": "{}"}
LINEAGE = {"step": 60, "seed": 1}


def test_file_holds_the_tensors_and_where_they_come_from(tmp_path):
    path = tmp_path / "step-000060.safetensors"
    digest = write_lora(path, TENSORS, METADATA, LINEAGE)
    with safe_open(path, framework="pt") as file:
        assert set(file.keys()) == set(TENSORS)
        for name, tensor in TENSORS.items():
            stored = file.get_tensor(name)
            assert stored.dtype == tensor.dtype
            assert torch.equal(stored, tensor)
        metadata = file.metadata()
    assert json.loads(metadata.pop("diffsynth_pipe")) == LINEAGE
    assert metadata == {"format": "pt", **METADATA}
    assert digest == blake3(path.read_bytes()).hexdigest()[:32]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


def test_same_weights_give_the_same_bytes_and_replace_an_older_file(tmp_path):
    path = tmp_path / "lora.safetensors"
    path.write_bytes(b"an older file")
    reversed_tensors = dict(reversed(TENSORS.items()))
    digests = {write_lora(path, tensors, METADATA, LINEAGE) for tensors in (TENSORS, reversed_tensors) * 4}
    assert len(digests) == 1
