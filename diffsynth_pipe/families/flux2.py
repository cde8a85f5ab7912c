"""FLUX.2: Qwen3 (klein) or Mistral 3 (dev) text encoder, image VAE, MMDiT denoiser; called as in diffusers."""

from __future__ import annotations

import json
from functools import partial
from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import BlockList, ComponentSpec, EncodeUnit, FlowMatchSchedule
from diffsynth_pipe.errors import ModelError
from diffsynth_pipe.modeling import qwen3, templates
from diffsynth_pipe.modeling.fields import check_channels, noise_unit, note_on_truncation, to_pixel_batch
from diffsynth_pipe.modeling.loading import build_denoiser, load_denoiser, load_encoder
from diffsynth_pipe.modeling.tiny import write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components, LoraLayers, ModelFamily

HIDDEN_LAYERS = {"Qwen3ForCausalLM": [9, 18, 27], "Mistral3ForConditionalGeneration": [10, 20, 30]}
"""The layers after which the hidden states are taken, and joined in each token."""
SYSTEM_MESSAGE = (
    "You are an AI that reasons about image descriptions. You give structured responses focusing on object "
    "relationships, object\nattribution and actions without speculation."
)
"""What Mistral 3 is told before the prompt."""
GUIDANCE = 1.0
"""What a denoiser with an embedded guidance is told unless it has ``embedded_guidance``."""
LATENT_DIMS = ("channel", "height", "width")
ORIGINAL_LAYERS: LoraLayers = {
    "double_blocks.{}.img_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.to_{name}" for name in "qkv"),
    "double_blocks.{}.txt_attn.qkv": tuple(f"transformer_blocks.{{}}.attn.add_{name}_proj" for name in "qkv"),
    "double_blocks.{}.img_attn.proj": ("transformer_blocks.{}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": ("transformer_blocks.{}.attn.to_add_out",),
    "double_blocks.{}.img_mlp.0": ("transformer_blocks.{}.ff.linear_in",),
    "double_blocks.{}.img_mlp.2": ("transformer_blocks.{}.ff.linear_out",),
    "double_blocks.{}.txt_mlp.0": ("transformer_blocks.{}.ff_context.linear_in",),
    "double_blocks.{}.txt_mlp.2": ("transformer_blocks.{}.ff_context.linear_out",),
    "single_blocks.{}.linear1": ("single_transformer_blocks.{}.attn.to_qkv_mlp_proj",),
    "single_blocks.{}.linear2": ("single_transformer_blocks.{}.attn.to_out",),
    "double_stream_modulation_img.lin": ("double_stream_modulation_img.linear",),
    "double_stream_modulation_txt.lin": ("double_stream_modulation_txt.linear",),
    "single_stream_modulation.lin": ("single_stream_modulation.linear",),
    "img_in": ("x_embedder",),
    "txt_in": ("context_embedder",),
    "time_in.in_layer": ("time_guidance_embed.timestep_embedder.linear_1",),
    "time_in.out_layer": ("time_guidance_embed.timestep_embedder.linear_2",),
    "guidance_in.in_layer": ("time_guidance_embed.guidance_embedder.linear_1",),
    "guidance_in.out_layer": ("time_guidance_embed.guidance_embedder.linear_2",),
    "final_layer.linear": ("proj_out",),
}
"""The layers of the original weights, which kohya's names are made of; ``norm_out.linear`` has its halves in the other
order there, and no place here."""


def load_text_encoder(files: ComponentFiles, dtype: dtype, device: device) -> qwen3.TextEncoder:
    """Load the language model that ``config.json`` names, and its tokenizer."""
    if json.loads((files.folder / "config.json").read_text("utf-8"))["architectures"] == ["Qwen3ForCausalLM"]:
        return qwen3.load_text_encoder(files, dtype, device)
    from transformers import AutoTokenizer, Mistral3ForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(files.companions["tokenizer"], local_files_only=True)
    return qwen3.TextEncoder(load_encoder(Mistral3ForConditionalGeneration, files, dtype, device), tokenizer)


def load_vae(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the VAE."""
    from diffusers import AutoencoderKLFlux2

    return load_encoder(AutoencoderKLFlux2, files, dtype, device)


def load_dit(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the denoiser."""
    from diffusers import Flux2Transformer2DModel

    return load_denoiser(Flux2Transformer2DModel, files, dtype, device)


def build_dit(folder: Path) -> Module:
    """Build the denoiser with new weights."""
    from diffusers import Flux2Transformer2DModel

    return build_denoiser(Flux2Transformer2DModel, folder)


def conversation(encoder: qwen3.TextEncoder, prompt: str) -> str:
    """Return the text that is encoded: the prompt in the tokenizer's own chat template."""
    if type(encoder.model).__name__ == "Qwen3ForCausalLM":
        return qwen3.conversation(encoder.tokenizer, prompt, enable_thinking=False)
    # The pipeline takes the mark of an image out of prompts, as there is no image.
    contents = {"system": SYSTEM_MESSAGE, "user": prompt.replace("[IMG]", "")}
    messages = [{"role": role, "content": [{"type": "text", "text": text}]} for role, text in contents.items()]
    text: str = encoder.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=False)
    return text


def encode_text(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one prompt: ``prompt_emb`` [512, channel]. The denoiser sees the padding, which is no constant."""
    import torch

    encoder: qwen3.TextEncoder = components["text_encoder"]
    states, _ = qwen3.hidden_states(encoder, conversation(encoder, inputs["prompt"]))
    layers = HIDDEN_LAYERS[type(encoder.model).__name__]
    return {"prompt_emb": torch.cat([states[layer] for layer in layers], dim=-1)}


def note_on_text(components: Components, inputs: Mapping[str, Any]) -> str | None:
    """Tell how many tokens are cut off, if any: of the prompt and the template's end behind it."""
    encoder: qwen3.TextEncoder = components["text_encoder"]
    text = conversation(encoder, inputs["prompt"])
    return note_on_truncation(encoder.tokenizer, text, qwen3.MAX_TOKENS, add_special_tokens=False)


def encode_latents(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one RGB image into patches of 2x2 latent pixels: ``latents`` [128, height/16, width/16].

    They are the posterior's mode, normalised by the statistics that the VAE keeps as those of a batch norm.
    """
    vae = components["vae"]
    mode = vae.encode(to_pixel_batch(inputs["image"]).to(vae.device, vae.dtype)).latent_dist.mode()[0]
    channels, height, width = mode.shape
    patches = mode.reshape(channels, height // 2, 2, width // 2, 2).permute(0, 2, 4, 1, 3)
    mean = vae.bn.running_mean.view(-1, 1, 1).to(mode)
    std = (vae.bn.running_var.view(-1, 1, 1) + vae.config.batch_norm_eps).sqrt().to(mode)
    return {"latents": (patches.reshape(channels * 4, height // 2, width // 2) - mean) / std}


def put_kv_cache(dit: Any, kv_cache: templates.KVCache) -> None:
    """Make the denoiser attend to these keys and values too, until the next call; see ``templates.component``.

    They are taken as they are, without norm or rotary embedding. The blocks are ``double_0`` and on, ``single_0`` and
    on. diffusers' own argument ``kv_cache`` hands all blocks one dict, in which a block that is recomputed in the
    backward pass finds what the last one got; so each block gets a processor of its own.

    Raises:
        ModelError: There is no such block, or a shape does not fit.
    """
    from diffusers.models.transformers.transformer_flux2 import (
        Flux2KVAttnProcessor,
        Flux2KVLayerCache,
        Flux2KVParallelSelfAttnProcessor,
    )

    double = {f"double_{index}": block.attn for index, block in enumerate(dit.transformer_blocks)}
    single = {f"single_{index}": block.attn for index, block in enumerate(dit.single_transformer_blocks)}
    blocks = double | single
    if unknown := [name for name in kv_cache if name not in blocks]:
        raise ModelError(f"template_model_id_or_path: kv_cache names {unknown[0]!r}; blocks are {', '.join(blocks)}")
    for name, attention in blocks.items():
        processor: Any = Flux2KVAttnProcessor() if name in double else Flux2KVParallelSelfAttnProcessor()
        if name in kv_cache:
            shapes = [tuple(tensor.shape) for tensor in kv_cache[name]]
            if shapes[0] != shapes[1] or shapes[0][2:] != (attention.heads, attention.head_dim):
                raise ModelError(
                    f"template_model_id_or_path: keys and values of {name} have shapes {shapes}, but the denoiser "
                    f"takes (1, tokens, {attention.heads}, {attention.head_dim})"
                )
            layer = Flux2KVLayerCache()
            layer.store(*kv_cache[name])
            processor = partial(processor, kv_cache=layer, kv_cache_mode="cached")
        attention.processor = processor


class Flux2:
    """Text to image with FLUX.2-klein and FLUX.2-dev."""

    components: Mapping[str, ComponentSpec] = {
        "text_encoder": ComponentSpec(
            subfolder="text_encoder",
            class_name="Qwen3ForCausalLM",
            other_class_names=("Mistral3ForConditionalGeneration",),
            load=load_text_encoder,
            companions=("tokenizer",),
            trained_part="model.",
        ),
        "vae": ComponentSpec(subfolder="vae", class_name="AutoencoderKLFlux2", load=load_vae),
        "dit": ComponentSpec(
            subfolder="transformer",
            class_name="Flux2Transformer2DModel",
            load=load_dit,
            build=build_dit,
            settings=("embedded_guidance",),
            lora_layers={"diffusers": {}, "diffsynth": {}, "comfyui": ORIGINAL_LAYERS},
        ),
        **templates.component(put_kv_cache),
    }
    units: tuple[EncodeUnit, ...] = (
        EncodeUnit(
            name="text",
            inputs=("prompt",),
            outputs=(FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel")),),
            component="text_encoder",
            encode=encode_text,
            note=note_on_text,
            recipe={
                "enable_thinking": False,
                "system_message": SYSTEM_MESSAGE,
                "num_tokens": qwen3.MAX_TOKENS,
                "hidden_states": HIDDEN_LAYERS,
            },
        ),
        EncodeUnit(
            name="latents",
            inputs=("image",),
            outputs=(FieldSpec(name="latents", dtype="bfloat16", dims=LATENT_DIMS),),
            component="vae",
            encode=encode_latents,
            recipe={"pixels": "x/255*2-1 in float32", "posterior": "mode", "normalization": "2x2 patches, batch norm"},
        ),
        templates.UNIT,
    )
    noise_unit = noise_unit("image", LATENT_DIMS, lambda image: (128, image.height // 16, image.width // 16))
    # No shift by resolution: that of inference depends on its number of steps too.
    schedule = FlowMatchSchedule(shift_type="exponential", shift=0.8)
    blocks: tuple[BlockList, ...] = (
        BlockList(name="transformer_blocks"),
        BlockList(name="single_transformer_blocks", text_first=True),
    )
    size_multiple = 16
    latents_field = "latents"
    # A pattern, as "to_out" is a linear layer in the single blocks, but a list of modules in the double ones.
    lora_target_modules: str | tuple[str, ...] = (
        r"transformer_blocks\.\d+\.(attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)|ff(_context)?\.linear_(in|out))"
        r"|single_transformer_blocks\.\d+\.attn\.(to_qkv_mlp_proj|to_out)"
    )
    lora_prefix = "transformer"
    architecture = "flux-2"
    pipelines: tuple[str, ...] = ("Flux2KleinPipeline", "Flux2Pipeline")

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        expected = {"prompt_emb": (-1, dit_config["joint_attention_dim"]), "latents": (0, dit_config["in_channels"])}
        check_channels(shapes, expected)

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of patches, each of which is one pixel of the latents; see ``ModelFamily``."""
        height, width = latents_shape[-2:]
        return height * width

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``."""
        import torch

        dit: Any = models["dit"]
        guidance = getattr(dit, "embedded_guidance", GUIDANCE)
        text = batch.fields["prompt_emb"].to(noisy.dtype)
        # Positions are (time, row, column, index in the text).
        zero, (rows, columns) = torch.arange(1), map(torch.arange, noisy.shape[-2:])
        tokens: Tensor = dit(
            hidden_states=noisy.flatten(2).transpose(1, 2),
            encoder_hidden_states=text,
            timestep=sigma,
            guidance=torch.full_like(sigma, guidance) if dit.config.guidance_embeds else None,
            img_ids=torch.cartesian_prod(zero, rows, columns, zero).to(noisy.device),
            txt_ids=torch.cartesian_prod(zero, zero, zero, torch.arange(text.shape[1])).to(noisy.device),
            return_dict=False,
        )[0]
        return tokens.transpose(1, 2).reshape(noisy.shape)

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the fields from a cached record of DiffSynth-Studio, whose latents are a sequence of tokens."""
        tokens, size = shared["input_latents"][0], (shared["height"] // 16, shared["width"] // 16)
        return {"latents": tokens.T.unflatten(1, size), "prompt_emb": positive["prompt_embeds"][0]}

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository; see ``modeling.tiny.write_repository``."""
        write_repository(folder, _tiny_pipeline)


def _tiny_pipeline() -> Any:
    """Build the real classes at the smallest size that keeps every structural constraint (head sizes, rope axes)."""
    import torch
    from diffusers import (
        AutoencoderKLFlux2,
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )

    text_encoder, tokenizer = qwen3.tiny_text_encoder(hidden_size=32, num_layers=28)
    transformer = Flux2Transformer2DModel(
        in_channels=128,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=32,
        num_attention_heads=4,
        joint_attention_dim=3 * 32,
        axes_dims_rope=(8, 8, 8, 8),
        guidance_embeds=False,
    )
    vae = AutoencoderKLFlux2(
        block_out_channels=(16, 32, 32, 32), layers_per_block=1, latent_channels=32, norm_num_groups=8
    )
    with torch.no_grad():
        vae.bn.running_mean.normal_(std=0.1)
        vae.bn.running_var.uniform_(0.5, 2.0)
    scheduler = FlowMatchEulerDiscreteScheduler(
        shift=3.0,
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    return Flux2KleinPipeline(
        scheduler=scheduler, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, transformer=transformer
    )


PLUGIN: ModelFamily = Flux2()
