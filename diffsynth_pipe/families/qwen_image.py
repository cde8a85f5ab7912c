"""Qwen-Image: Qwen2.5-VL text encoder, causal video VAE on one frame, MMDiT denoiser; called as in diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import ComponentSpec, EncodeUnit, FlowMatchSchedule, ResolutionShift
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.modeling.fields import check_channels, noise_unit, to_pixels
from diffsynth_pipe.modeling.loading import build_denoiser, load_denoiser, load_encoder
from diffsynth_pipe.modeling.tiny import write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components, ModelFamily

TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, "
    "spatial relationships of the objects and background:<|im_end|>\n"
    "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NUM_PREFIX_TOKENS = 34
"""Tokens of the template before the prompt; their hidden states are dropped."""
MAX_PROMPT_TOKENS = 4096
PATCH = 2
"""Latent pixels per side of one denoiser token."""

SPECIAL_TOKENS = (
    *("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>"),
    *("<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"),
    *("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"),
)


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """The language model and its tokenizer."""

    model: Any
    tokenizer: Any


def load_text_encoder(files: ComponentFiles, dtype: dtype, device: device) -> TextEncoder:
    """Load the language model and check that its tokenizer fits the prompt template.

    Raises:
        ModelError: The template's prefix is not 34 tokens, so that the wrong hidden states would be dropped.
    """
    from transformers import Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    tokenizer = Qwen2Tokenizer.from_pretrained(files.companions["tokenizer"], local_files_only=True)
    num_tokens = len(tokenizer(TEMPLATE.partition("{}")[0]).input_ids)
    if num_tokens != NUM_PREFIX_TOKENS:
        raise ModelError(
            f"tokenizer {str(files.companions['tokenizer'])!r}: the prompt template starts with {num_tokens} tokens "
            f"instead of {NUM_PREFIX_TOKENS}; use the tokenizer of the Qwen-Image repository"
        )
    return TextEncoder(load_encoder(Qwen2_5_VLForConditionalGeneration, files, dtype, device), tokenizer)


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


def encode_text(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one prompt into the last hidden states after the template's prefix: ``prompt_emb`` [token, channel]."""
    encoder: TextEncoder = components["text_encoder"]
    tokens = encoder.tokenizer(
        TEMPLATE.format(inputs["prompt"]),
        max_length=NUM_PREFIX_TOKENS + MAX_PROMPT_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.model.device)
    # The inner model: the language head's logits over 152k tokens are of no use here.
    hidden = encoder.model.model(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask).last_hidden_state
    return {"prompt_emb": hidden[0, NUM_PREFIX_TOKENS:]}


def note_on_text(components: Components, inputs: Mapping[str, Any]) -> str | None:
    """Tell how many tokens ``encode_text`` cuts off, if any: of the prompt and the template's end behind it."""
    encoder: TextEncoder = components["text_encoder"]
    # verbose=False: the tokenizer would warn of what is told here
    tokens = encoder.tokenizer(TEMPLATE.format(inputs["prompt"]), verbose=False)
    num_tokens = len(tokens.input_ids) - NUM_PREFIX_TOKENS
    num_cut = num_tokens - MAX_PROMPT_TOKENS
    return f"truncated, {num_cut} of {num_tokens} tokens were cut off" if num_cut > 0 else None


def encode_latents(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one RGB image into normalised latents: ``latents`` [16, 1, height/8, width/8], the posterior's mode."""
    import torch

    vae = components["vae"]
    pixels = to_pixels(inputs["image"])
    mode = vae.encode(pixels[None, :, None].to(vae.device, vae.dtype)).latent_dist.mode()[0]
    mean, std = (
        torch.tensor(values, dtype=mode.dtype, device=mode.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    return {"latents": (mode - mean) / std}


LATENT_DIMS = ("channel", "frame", "height", "width")


class QwenImage:
    """Text to image with Qwen-Image."""

    components: Mapping[str, ComponentSpec] = {
        "text_encoder": ComponentSpec(
            subfolder="text_encoder",
            class_name="Qwen2_5_VLForConditionalGeneration",
            load=load_text_encoder,
            companions=("tokenizer",),
            trained_part="model.language_model.",
        ),
        "vae": ComponentSpec(subfolder="vae", class_name="AutoencoderKLQwenImage", load=load_vae),
        "dit": ComponentSpec(
            subfolder="transformer", class_name="QwenImageTransformer2DModel", load=load_dit, build=build_dit
        ),
    }
    units: tuple[EncodeUnit, ...] = (
        EncodeUnit(
            name="text",
            inputs=("prompt",),
            outputs=(FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True),),
            component="text_encoder",
            encode=encode_text,
            note=note_on_text,
            recipe={
                "template": TEMPLATE,
                "num_dropped_tokens": NUM_PREFIX_TOKENS,
                "max_prompt_tokens": MAX_PROMPT_TOKENS,
                "hidden_state": "last",
            },
        ),
        EncodeUnit(
            name="latents",
            inputs=("image",),
            outputs=(FieldSpec(name="latents", dtype="bfloat16", dims=LATENT_DIMS),),
            component="vae",
            encode=encode_latents,
            recipe={"pixels": "x/255*2-1 in float32", "posterior": "mode", "normalization": "(z-mean)/std"},
        ),
    )
    noise_unit = noise_unit("image", LATENT_DIMS, lambda image: (16, 1, image.height // 8, image.width // 8))
    schedule = FlowMatchSchedule(
        shift_type="exponential",
        shift=0.8,
        terminal=0.02,
        resolution_shift=ResolutionShift(base_seq_len=256, max_seq_len=8192, base_shift=0.5, max_shift=0.9),
    )
    size_multiple = 16
    latents_field = "latents"
    lora_target_modules: tuple[str, ...] = (
        *("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0", "to_add_out"),
        *("img_mlp.net.2", "img_mod.1", "txt_mlp.net.2", "txt_mod.1"),
    )
    lora_prefix = "transformer"
    architecture = "Qwen-Image"

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        latent_channels = dit_config["in_channels"] // PATCH**2
        check_channels(shapes, {"prompt_emb": (-1, dit_config["joint_attention_dim"]), "latents": (0, latent_channels)})

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of 2x2 patches; see ``ModelFamily``."""
        height, width = latents_shape[-2:]
        return height // PATCH * (width // PATCH)

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``. Latents are packed 2x2 into tokens for the call."""
        import torch

        num_samples, channels, _, height, width = noisy.shape
        rows, columns = height // PATCH, width // PATCH
        patches = noisy.reshape(num_samples, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        text = batch.fields["prompt_emb"].to(noisy.dtype)
        mask = torch.arange(text.shape[1], device=text.device) < batch.lengths["prompt_emb"].to(text.device)[:, None]
        tokens: Tensor = models["dit"](
            hidden_states=patches.reshape(num_samples, rows * columns, channels * PATCH**2),
            encoder_hidden_states=text,
            # Like diffusers: a mask that masks nothing would only rule out the faster attention kernels.
            encoder_hidden_states_mask=None if mask.all() else mask,
            timestep=sigma,
            img_shapes=[[(1, rows, columns)]] * num_samples,
            return_dict=False,
        )[0]
        patches = tokens.reshape(num_samples, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(noisy.shape)

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the fields from a cached record of DiffSynth-Studio, whose latents have no frame dimension."""
        num_tokens = int(positive["prompt_emb_mask"][0].sum())
        return {
            "latents": shared["input_latents"][0][:, None],
            "prompt_emb": positive["prompt_emb"][0, :num_tokens],
        }

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository; see ``modeling.tiny.write_repository``."""
        write_repository(folder, _tiny_pipeline)


def _tiny_tokenizer() -> Any:
    """Train a byte-level BPE on the template, so that each of its words is one token as in the real vocabulary."""
    from transformers import Qwen2Tokenizer

    return Qwen2Tokenizer().train_new_from_iterator(
        [TEMPLATE], vocab_size=2048, new_special_tokens=list(SPECIAL_TOKENS), show_progress=False
    )


def _tiny_pipeline() -> Any:
    """Build the real classes at the smallest size that keeps every structural constraint (head sizes, rope axes)."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    tokenizer = _tiny_tokenizer()
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
        base_dim=16, z_dim=16, dim_mult=[1, 2, 4, 4], num_res_blocks=1, temperal_downsample=[False, True, True]
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
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


PLUGIN: ModelFamily = QwenImage()
