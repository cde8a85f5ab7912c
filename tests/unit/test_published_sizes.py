"""The classes that families load, at the real models' configurations, hold as many parameters as their names say."""

import re
from pathlib import Path

import pytest
import torch

PAGE = (Path(__file__).parents[2] / "docs" / "families.md").read_text(encoding="utf-8")

# Only what differs from the class's defaults, which are those of the first model released with it.
T5_XXL = {
    "vocab_size": 32128,
    "d_model": 4096,
    "d_kv": 64,
    "d_ff": 10240,
    "num_layers": 24,
    "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}
QWEN3 = {"vocab_size": 151936, "num_hidden_layers": 36, "num_attention_heads": 32, "num_key_value_heads": 8}
FLUX_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "layers_per_block": 2,
    "latent_channels": 16,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
WAN22_VAE = {
    "base_dim": 160,
    "z_dim": 48,
    "decoder_base_dim": 256,
    "is_residual": True,
    "in_channels": 12,
    "out_channels": 12,
    "patch_size": 2,
    "scale_factor_spatial": 16,
}
QWEN25_VL_7B = {
    "text_config": {
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "rope_parameters": {"mrope_section": [16, 24, 24], "rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": 151643,
        "eos_token_id": 151645,
    },
    "vision_config": {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 3584,
    },
    "tie_word_embeddings": False,
}
WAV2VEC2_LARGE = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "vocab_size": 33,
    "conv_bias": True,
    "do_stable_layer_norm": True,
    "feat_extract_norm": "layer",
}
MODELS = {
    "Qwen-Image and Qwen-Image-Edit": ("QwenImageTransformer2DModel", {}),
    "FLUX.1-dev": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "FLUX.2-dev": ("Flux2Transformer2DModel", {}),
    "FLUX.2-klein-4B": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
    ),
    "FLUX.2-klein-9B": (
        "Flux2Transformer2DModel",
        {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
    ),
    "Z-Image": ("ZImageTransformer2DModel", {}),
    "Wan2.1-T2V-14B, Wan2.2-T2V-A14B (each expert)": ("WanTransformer3DModel", {}),
    "Wan2.1-T2V-1.3B": (
        "WanTransformer3DModel",
        {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 30, "ffn_dim": 8960},
    ),
    "Wan2.1-I2V-14B": ("WanTransformer3DModel", {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}),
    "Wan2.2-I2V-A14B (each expert)": ("WanTransformer3DModel", {"in_channels": 36}),
    "Wan2.2-TI2V-5B": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 30,
            "ffn_dim": 14336,
            "in_channels": 48,
            "out_channels": 48,
        },
    ),
    "Wan2.2-S2V-14B": ("WanS2VTransformer3DModel", {}),
    "Qwen2.5-VL-7B": ("Qwen2_5_VLForConditionalGeneration", QWEN25_VL_7B),
    "CLIP-L text": (
        "CLIPTextModel",
        {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12},
    ),
    "T5-XXL encoder": ("T5EncoderModel", T5_XXL),
    "UMT5-XXL encoder": ("UMT5EncoderModel", {**T5_XXL, "vocab_size": 256384}),
    "wav2vec 2.0 large": ("Wav2Vec2ForCTC", WAV2VEC2_LARGE),
    "Qwen3-4B": (
        "Qwen3ForCausalLM",
        {**QWEN3, "hidden_size": 2560, "intermediate_size": 9728, "head_dim": 128, "tie_word_embeddings": True},
    ),
    "Qwen3-8B": (
        "Qwen3ForCausalLM",
        {**QWEN3, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128, "tie_word_embeddings": False},
    ),
    "VAE of Qwen-Image": ("AutoencoderKLQwenImage", {}),
    "VAE of Wan2.1": ("AutoencoderKLWan", {}),
    "VAE of Wan2.2-TI2V-5B": ("AutoencoderKLWan", WAN22_VAE),
    "VAE of FLUX.1 and Z-Image": ("AutoencoderKL", FLUX_VAE),
    "VAE of FLUX.2": ("AutoencoderKLFlux2", {}),
}
ROWS = {
    name: (class_name, None if published == "-" else float(published), int(count.replace(",", "")))
    for name, class_name, published, count in re.findall(
        r"^\| (.+?) \| `(\w+)` \| ([\d.]+|-) \| ([\d,]+) \|$", PAGE, flags=re.MULTILINE
    )
}


def count_parameters(class_name, settings):
    import diffusers
    import transformers

    from diffsynth_pipe.modeling import wan_s2v

    with torch.device("meta"):
        if model_class := getattr(diffusers, class_name, None) or getattr(wan_s2v, class_name, None):
            model = model_class(**settings)
        else:
            model_class = getattr(transformers, class_name)
            model = model_class(model_class.config_class(**settings))
    return sum(parameter.numel() for parameter in model.parameters())


def test_the_page_has_these_models():
    assert ROWS.keys() == MODELS.keys()


@pytest.mark.parametrize("name", MODELS)
def test_the_number_of_parameters_is_the_one_on_the_page(name):
    class_name, settings = MODELS[name]
    row_class, published_billions, count = ROWS[name]
    assert row_class == class_name
    assert count_parameters(class_name, settings) == count
    if published_billions is not None:
        assert count / 1e9 == pytest.approx(published_billions, rel=0.2)
