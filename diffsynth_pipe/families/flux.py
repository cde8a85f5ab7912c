"""FLUX.1: CLIP and T5 text encoders, image VAE, MMDiT denoiser with an embedded guidance; called as in diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import BlockList, ComponentSpec, EncodeUnit, FlowMatchSchedule, ResolutionShift
from diffsynth_pipe.modeling import autoencoder_kl
from diffsynth_pipe.modeling.fields import check_channels, note_on_truncation
from diffsynth_pipe.modeling.loading import build_denoiser, load_denoiser, load_encoder
from diffsynth_pipe.modeling.tiny import write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components, LoraLayers, ModelFamily

NUM_CLIP_TOKENS = 77
NUM_T5_TOKENS = 512
"""Prompts are padded to this length and the denoiser sees the padding, for which T5 yields no constant."""
GUIDANCE = 1.0
"""What the denoiser is told unless it has ``embedded_guidance``: the data are samples without guidance."""
PATCH = 2
"""Latent pixels per side of one denoiser token."""
ORIGINAL_LAYERS: LoraLayers = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{name}" for name in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{name}_proj" for name in "qkv"),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.net.2",),
    "double_blocks.{}.img_mod.lin": ("transformer_blocks.{}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": ("transformer_blocks.{}.norm1_context.linear",),
    "single_blocks.{}.linear1": (
        *(f"single_transformer_blocks.{{}}.attn.to_{name}" for name in "qkv"),
        "single_transformer_blocks.{}.proj_mlp",
    ),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.proj_out",),
    "single_blocks.{}.modulation.lin": ("single_transformer_blocks.{}.norm.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_text_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_text_embed.timestep_embedder.linear_2",),
    "vector_in.in_layer": ("time_text_embed.text_embedder.linear_1",),
    "vector_in.out_layer": ("time_text_embed.text_embedder.linear_2",),
    "guidance_in.in_layer": ("time_text_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_text_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
"""The layers of the original weights, which kohya's names are made of; ``norm_out.linear`` has its halves in the other
order there, and no place here."""
DIFFSYNTH_LAYERS: LoraLayers = {
    name: ORIGINAL_LAYERS[original]
    for name, original in {
        "blocks.{}.attn.a_to_qkv": "double_blocks.{}.img_attn.qkv",
        "blocks.{}.attn.b_to_qkv": "double_blocks.{}.txt_attn.qkv",
        "blocks.{}.attn.a_to_out": "double_blocks.{}.img_attn.proj",
        "blocks.{}.attn.b_to_out": "double_blocks.{}.txt_attn.proj",
        "blocks.{}.ff_a.0": "double_blocks.{}.img_mlp.0",
        "blocks.{}.ff_a.2": "double_blocks.{}.img_mlp.2",
        "blocks.{}.ff_b.0": "double_blocks.{}.txt_mlp.0",
        "blocks.{}.ff_b.2": "double_blocks.{}.txt_mlp.2",
        "blocks.{}.norm1_a.linear": "double_blocks.{}.img_mod.lin",
        "blocks.{}.norm1_b.linear": "double_blocks.{}.txt_mod.lin",
        "single_blocks.{}.to_qkv_mlp": "single_blocks.{}.linear1",
        "single_blocks.{}.proj_out": "single_blocks.{}.linear2",
        "single_blocks.{}.norm.linear": "single_blocks.{}.modulation.lin",
    }.items()
}


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """A text encoder and its tokenizer."""

    model: Any
    tokenizer: Any


def load_clip(files: ComponentFiles, dtype: dtype, device: device) -> TextEncoder:
    """Load CLIP's text model and its tokenizer."""
    from transformers import CLIPTextModel, CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(files.companions["tokenizer"], local_files_only=True)
    return TextEncoder(load_encoder(CLIPTextModel, files, dtype, device), tokenizer)


def load_t5(files: ComponentFiles, dtype: dtype, device: device) -> TextEncoder:
    """Load T5's encoder and its tokenizer."""
    from transformers import T5EncoderModel, T5Tokenizer

    tokenizer = T5Tokenizer.from_pretrained(files.companions["tokenizer_2"], local_files_only=True)
    return TextEncoder(load_encoder(T5EncoderModel, files, dtype, device), tokenizer)


def load_dit(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the denoiser."""
    from diffusers import FluxTransformer2DModel

    return load_denoiser(FluxTransformer2DModel, files, dtype, device)


def build_dit(folder: Path) -> Module:
    """Build the denoiser with new weights."""
    from diffusers import FluxTransformer2DModel

    return build_denoiser(FluxTransformer2DModel, folder)


def token_ids(encoder: TextEncoder, prompt: str, num_tokens: int) -> Tensor:
    """Return the tokens of one prompt, padded or cut to a number: int64 [1, num_tokens]."""
    tokens = encoder.tokenizer(
        prompt, padding="max_length", max_length=num_tokens, truncation=True, return_tensors="pt"
    )
    ids: Tensor = tokens.input_ids.to(encoder.model.device)
    return ids


def encode_pooled_text(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one prompt with CLIP: ``pooled_prompt_emb`` [channel]."""
    encoder: TextEncoder = components["text_encoder"]
    ids = token_ids(encoder, inputs["prompt"], NUM_CLIP_TOKENS)
    return {"pooled_prompt_emb": encoder.model(ids).pooler_output[0]}


def encode_text(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one prompt with T5, the padding without a mask, as in the pipeline: ``prompt_emb`` [512, channel]."""
    encoder: TextEncoder = components["text_encoder_2"]
    return {"prompt_emb": encoder.model(token_ids(encoder, inputs["prompt"], NUM_T5_TOKENS)).last_hidden_state[0]}


def note_on_pooled_text(components: Components, inputs: Mapping[str, Any]) -> str | None:
    """Tell how many tokens CLIP does not see, if any."""
    return note_on_truncation(components["text_encoder"].tokenizer, inputs["prompt"], NUM_CLIP_TOKENS)


def note_on_text(components: Components, inputs: Mapping[str, Any]) -> str | None:
    """Tell how many tokens T5 does not see, if any."""
    return note_on_truncation(components["text_encoder_2"].tokenizer, inputs["prompt"], NUM_T5_TOKENS)


class Flux:
    """Text to image with FLUX.1-dev."""

    components: Mapping[str, ComponentSpec] = {
        "text_encoder": ComponentSpec(
            subfolder="text_encoder", class_name="CLIPTextModel", load=load_clip, companions=("tokenizer",)
        ),
        "text_encoder_2": ComponentSpec(
            subfolder="text_encoder_2", class_name="T5EncoderModel", load=load_t5, companions=("tokenizer_2",)
        ),
        "vae": autoencoder_kl.VAE,
        "dit": ComponentSpec(
            subfolder="transformer",
            class_name="FluxTransformer2DModel",
            load=load_dit,
            build=build_dit,
            settings=("embedded_guidance",),
            lora_layers={"diffusers": {}, "diffsynth": DIFFSYNTH_LAYERS, "comfyui": ORIGINAL_LAYERS},
        ),
    }
    units: tuple[EncodeUnit, ...] = (
        EncodeUnit(
            name="pooled_text",
            inputs=("prompt",),
            outputs=(FieldSpec(name="pooled_prompt_emb", dtype="bfloat16", dims=("channel",)),),
            component="text_encoder",
            encode=encode_pooled_text,
            note=note_on_pooled_text,
            recipe={"num_tokens": NUM_CLIP_TOKENS, "hidden_state": "pooled"},
        ),
        EncodeUnit(
            name="text",
            inputs=("prompt",),
            outputs=(FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel")),),
            component="text_encoder_2",
            encode=encode_text,
            note=note_on_text,
            recipe={"num_tokens": NUM_T5_TOKENS, "attention_mask": None, "hidden_state": "last"},
        ),
        autoencoder_kl.LATENTS_UNIT,
    )
    noise_unit = autoencoder_kl.NOISE_UNIT
    schedule = FlowMatchSchedule(
        shift_type="linear",
        shift=3.0,
        u_end=0.003 / 1.002,
        include_end=True,
        resolution_shift=ResolutionShift(base_seq_len=256, max_seq_len=4096, base_shift=0.5, max_shift=1.15),
    )
    blocks: tuple[BlockList, ...] = (BlockList(name="transformer_blocks"), BlockList(name="single_transformer_blocks"))
    size_multiple = 16
    latents_field = "latents"
    # A pattern, as "proj_out" is also what the denoiser calls its last layer.
    lora_target_modules: str | tuple[str, ...] = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)"
        r"|ff(_context)?\.net\.(0\.proj|2)|norm1(_context)?\.linear)"
        r"|single_transformer_blocks\.\d+\.(attn\.to_[qkv]|norm\.linear|proj_mlp|proj_out)"
    )
    lora_prefix = "transformer"
    architecture = "flux-1-dev"
    pipelines: tuple[str, ...] = ("FluxPipeline",)

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        expected = {
            "prompt_emb": (-1, dit_config["joint_attention_dim"]),
            "pooled_prompt_emb": (0, dit_config["pooled_projection_dim"]),
            "latents": (0, dit_config["in_channels"] // PATCH**2),
        }
        check_channels(shapes, expected)

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of 2x2 patches; see ``ModelFamily``."""
        height, width = latents_shape[-2:]
        return height // PATCH * (width // PATCH)

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``. Latents are packed 2x2 into tokens for the call."""
        import torch

        dit: Any = models["dit"]
        guidance = getattr(dit, "embedded_guidance", GUIDANCE)
        count, channels, height, width = noisy.shape
        rows, columns = height // PATCH, width // PATCH
        patches = noisy.reshape(count, channels, rows, PATCH, columns, PATCH).permute(0, 2, 4, 1, 3, 5)
        text = batch.fields["prompt_emb"].to(noisy.dtype)
        positions = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns))
        tokens: Tensor = dit(
            hidden_states=patches.reshape(count, rows * columns, channels * PATCH**2),
            encoder_hidden_states=text,
            pooled_projections=batch.fields["pooled_prompt_emb"].to(noisy.dtype),
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance) if dit.config.guidance_embeds else None,
            img_ids=positions.to(noisy.device),
            txt_ids=torch.zeros(text.shape[1], 3, device=noisy.device),
            return_dict=False,
        )[0]
        patches = tokens.reshape(count, rows, columns, channels, PATCH, PATCH).permute(0, 3, 1, 4, 2, 5)
        return patches.reshape(noisy.shape)

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the fields from a cached record of DiffSynth-Studio."""
        return {
            "latents": shared["input_latents"][0],
            "prompt_emb": positive["prompt_emb"][0],
            "pooled_prompt_emb": positive["pooled_prompt_emb"][0],
        }

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository; see ``modeling.tiny.write_repository``."""
        write_repository(folder, _tiny_pipeline)


def _tiny_clip_tokenizer() -> Any:
    """Build a tokenizer whose words are bytes; the end token has the largest id, as CLIP pools there."""
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import CLIPTokenizer

    alphabet = sorted(ByteLevel.alphabet())
    words = [*alphabet, *(f"{byte}</w>" for byte in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocab = {word: number for number, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=NUM_CLIP_TOKENS)


def _tiny_t5_tokenizer() -> Any:
    """Build a tokenizer whose words are characters."""
    from transformers import T5Tokenizer

    words = ["<pad>", "</s>", "<unk>", "▁", *map(chr, range(33, 127))]
    return T5Tokenizer(vocab=[(word, 0.0 if number < 3 else -1.0) for number, word in enumerate(words)], extra_ids=0)


def _tiny_pipeline() -> Any:
    """Build the real classes at the smallest size that keeps every structural constraint (head sizes, rope axes)."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    tokenizer, tokenizer_2 = _tiny_clip_tokenizer(), _tiny_t5_tokenizer()
    clip_config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    t5_config = T5Config(
        vocab_size=len(tokenizer_2),
        d_model=64,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
        use_cache=False,
    )
    transformer = FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=64,
        pooled_projection_dim=32,
        guidance_embeds=True,
        axes_dims_rope=(8, 12, 12),
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return FluxPipeline(
        scheduler=scheduler,
        vae=autoencoder_kl.tiny_vae(),
        text_encoder=CLIPTextModel(clip_config),
        tokenizer=tokenizer,
        text_encoder_2=T5EncoderModel(t5_config),
        tokenizer_2=tokenizer_2,
        transformer=transformer,
    )


PLUGIN: ModelFamily = Flux()
