"""Weights that stay in their files: what memory holds meanwhile, and files that are not whole."""

import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from diffsynth_pipe.contracts import ComponentFiles
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.modeling.loading import load_encoder

CPU = torch.device("cpu")
MEBI = 1 << 20


def qwen3(num_layers, hidden_size):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=64,
            hidden_size=hidden_size,
            intermediate_size=4 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=16,
            tie_word_embeddings=True,
        )
    )


def peak_bytes():
    """Return the most memory that this process has had, its pages of mapped files included, since its last reset."""
    return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


def test_memory_holds_one_layer_of_a_model_in_shards(tmp_path):
    from transformers import Qwen3ForCausalLM

    qwen3(1, 16).save_pretrained(tmp_path / "small")
    with torch.device("meta"):
        model = qwen3(6, 1024)
    model = model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(0.01)
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    model.save_pretrained(tmp_path / "large", max_shard_size="100MB")
    del model, parameter
    assert len(list((tmp_path / "large").glob("*.safetensors"))) > 2
    assert num_bytes > 290 * MEBI

    def run(folder, *, offload):
        """Return how far the memory's peak rises above what was taken before, and what comes out."""
        files = ComponentFiles(weights=(), folder=folder, offload=offload)
        Path("/proc/self/clear_refs").write_text("5")
        before = peak_bytes()
        model = load_encoder(Qwen3ForCausalLM, files, torch.float32, CPU)
        with torch.inference_mode():
            found = model.model(input_ids=torch.arange(8)[None]).last_hidden_state
        return peak_bytes() - before, found

    run(tmp_path / "small", offload=True)  # takes what the libraries need
    offloaded, found = run(tmp_path / "large", offload=True)
    plain, expected = run(tmp_path / "large", offload=False)
    assert offloaded < num_bytes / 4
    assert plain > num_bytes * 3 / 4
    assert torch.equal(found, expected)


@pytest.mark.parametrize("component", ["text_encoder", "vae"])
def test_weights_that_are_not_whole_are_refused(tiny_repo, tmp_path, component):
    from diffusers import AutoencoderKLQwenImage
    from transformers import Qwen2_5_VLForConditionalGeneration

    (file,) = (tiny_repo / component).glob("*.safetensors")
    (tmp_path / "config.json").write_bytes((tiny_repo / component / "config.json").read_bytes())
    weights = load_file(file)
    name = next(name for name in weights if name.endswith("bias"))
    del weights[name]
    save_file(weights, tmp_path / file.name, metadata={"format": "pt"})
    files = ComponentFiles(weights=(tmp_path / file.name,), folder=tmp_path, offload=True)
    model_class = AutoencoderKLQwenImage if component == "vae" else Qwen2_5_VLForConditionalGeneration
    with pytest.raises(ModelError, match=r"the weights lack '.*bias'; download the model again") as error:
        load_encoder(model_class, files, torch.float32, CPU)
    assert "\n" not in str(error.value)
