"""What the families of Qwen-Image share: the VAE on one frame, the MMDiT denoiser, and how latents become tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import BlockList, ComponentSpec, EncodeUnit, FlowMatchSchedule, ResolutionShift
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.modeling.fields import noise_unit, to_pixels
from diffsynth_pipe.modeling.loading import build_denoiser, load_denoiser, load_encoder

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components

PATCH = 2
"""Latent pixels per side of one denoiser token."""
LATENT_DIMS = ("channel", "frame", "height", "width")

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


def load_tokenizer(folder: Path, template: str, num_prefix_tokens: int) -> Any:
    """Load a tokenizer and check that it fits the prompt template.

    Raises:
        ModelError: The template's prefix has other tokens than expected, and the wrong hidden states would be dropped.
    """
    from transformers import Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(folder, local_files_only=True)
    num_tokens = len(tokenizer(template.partition("{}")[0]).input_ids)
    if num_tokens != num_prefix_tokens:
        raise ModelError(
            f"tokenizer {str(folder)!r}: the prompt template starts with {num_tokens} tokens instead of "
            f"{num_prefix_tokens}; use the tokenizer of the Qwen-Image repository"
        )
    return tokenizer


def load_language_model(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load Qwen2.5-VL."""
    from transformers import Qwen2_5_VLForConditionalGeneration

    return load_encoder(Qwen2_5_VLForConditionalGeneration, files, dtype, device)


def load_vae(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the VAE."""
    from diffusers import AutoencoderKLQwenImage

    return load_encoder(AutoencoderKLQwenImage, files, dtype, device)


def load_dit(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the denoiser."""
    from diffusers import QwenImageTransformer2DModel

    return load_denoiser(QwenImageTransformer2DModel, files, dtype, device)


def build_dit(folder: Path) -> Module:
    """Build the denoiser with new weights."""
    from diffusers import QwenImageTransformer2DModel

    return build_denoiser(QwenImageTransformer2DModel, folder)


def image_latents(vae: Any, image: Image) -> Tensor:
    """Encode one RGB image into normalised latents [16, 1, height/8, width/8], the posterior's mode."""
    import torch

    pixels = to_pixels(image)
    mode = vae.encode(pixels[None, :, None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
    mean, std = (
        torch.tensor(values, dtype=mode.dtype, device=mode.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents: Tensor = (mode - mean) / std
    return latents


def encode_latents(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode the image that is to be generated: ``latents`` [16, 1, height/8, width/8]."""
    return {"latents": image_latents(components["vae"], inputs["image"])}


def pack(latents: Tensor) -> Tensor:
    """Turn latents [batch, channel, 1, height, width] into tokens of 2x2 patches [batch, token, 4 * channel]."""
    count, channels, _, height, width = latents.shape
    patches = latents.reshape(count, channels, height // PATCH, PATCH, width // PATCH, PATCH)
    return patches.permute(0, 2, 4, 1, 3, 5).reshape(count, num_tokens(latents.shape), channels * PATCH**2)


def unpack(tokens: Tensor, shape: Sequence[int]) -> Tensor:
    """Turn tokens back into latents of this shape."""
    count, channels, _, height, width = shape
    patches = tokens.reshape(count, height // PATCH, width // PATCH, channels, PATCH, PATCH)
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(tuple(shape))


def num_tokens(latents_shape: Sequence[int]) -> int:
    """Return the number of 2x2 patches of latents."""
    height, width = latents_shape[-2:]
    return height // PATCH * (width // PATCH)


def text_mask(batch: Batch) -> Tensor | None:
    """Return which rows of ``prompt_emb`` are text, ``[batch, token]``; None if all are.

    Like diffusers: a mask that masks nothing would only rule out the faster attention kernels.
    """
    import torch

    text = batch.fields["prompt_emb"]
    mask = torch.arange(text.shape[1], device=text.device) < batch.lengths["prompt_emb"].to(text.device)[:, None]
    return None if mask.all() else mask


VAE = ComponentSpec(subfolder="vae", class_name="AutoencoderKLQwenImage", load=load_vae)
DIT = ComponentSpec(
    subfolder="transformer",
    class_name="QwenImageTransformer2DModel",
    load=load_dit,
    build=build_dit,
    lora_layers={"diffusers": {}, "diffsynth": {}, "comfyui": {}},
)
TEXT_FIELD = FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True)
LATENTS_UNIT = EncodeUnit(
    name="latents",
    inputs=("image",),
    outputs=(FieldSpec(name="latents", dtype="bfloat16", dims=LATENT_DIMS),),
    component="vae",
    encode=encode_latents,
    recipe={"pixels": "x/255*2-1 in float32", "posterior": "mode", "normalization": "(z-mean)/std"},
)
NOISE_UNIT = noise_unit("image", LATENT_DIMS, lambda image: (16, 1, image.height // 8, image.width // 8))
BLOCKS: tuple[BlockList, ...] = (BlockList(name="transformer_blocks"),)
SCHEDULE = FlowMatchSchedule(
    shift_type="exponential",
    shift=0.8,
    terminal=0.02,
    resolution_shift=ResolutionShift(base_seq_len=256, max_seq_len=8192, base_shift=0.5, max_shift=0.9),
)
LORA_TARGET_MODULES: tuple[str, ...] = (
    *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
    *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
)


def tiny_tokenizer(templates: Sequence[str]) -> Any:
    """Train a byte-level BPE on prompt templates: each of their words is one token, as in the real vocabulary."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer().train_new_from_iterator(
        templates, vocab_size=2048, new_special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )


def tiny_parts(tokenizer: Any, vae_base_dim: int = 16) -> dict[str, Any]:
    """Build the real classes at the smallest size that keeps every structural constraint (head sizes, rope axes)."""
    from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    token_id = tokenizer.convert_tokens_to_ids
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "rope_parameters": {"mrope_section": [2, 3, 3], "rope_type": "default", "rope_theta": 1e6},
        "bos_token_id": token_id("<|endoftext|>"),
        "eos_token_id": token_id("<|im_end|>"),
        "pad_token_id": token_id("<|endoftext|>"),
    }
    vision_config = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_heads": 2,
        "out_hidden_size": 64,
        "fullatt_block_indexes": [1],
    }
    transformer = QwenImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=64,
        out_channels=16,
        num_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        guidance_embeds=False,
        axes_dims_rope=(8, 12, 12),
    )
    vae = AutoencoderKLQwenImage(
        base_dim=vae_base_dim,
        z_dim=16,
        dim_mult=[1, 2, 4, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True, True],
    )
    text_encoder = Qwen2_5_VLForConditionalGeneration(
        Qwen2_5_VLConfig(
            text_config=text_config,
            vision_config=vision_config,
            image_token_id=token_id("<|image_pad|>"),
            video_token_id=token_id("<|video_pad|>"),
            vision_start_token_id=token_id("<|vision_start|>"),
            vision_end_token_id=token_id("<|vision_end|>"),
        )
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift=1.0,
        shift_terminal=0.02,
        time_shift_type="exponential",
        use_dynamic_shifting=True,
    )
    return {
        "scheduler": scheduler,
        "vae": vae,
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "transformer": transformer,
    }
