"""Z-Image: Qwen3 text encoder, image VAE, single-stream denoiser; called as in diffusers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import BlockList, ComponentSpec, EncodeUnit, FlowMatchSchedule
from diffsynth_pipe.modeling import autoencoder_kl, npu, qwen3, templates
from diffsynth_pipe.modeling.fields import check_channels, note_on_truncation
from diffsynth_pipe.modeling.loading import build_denoiser, load_denoiser
from diffsynth_pipe.modeling.tiny import write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components, LoraLayers, ModelFamily

PATCH = 2
"""Latent pixels per side of one denoiser token."""
ORIGINAL_LAYERS: LoraLayers = {
    **{
        f"{block}.{{}}.{name}": tuple(f"{block}.{{}}.{part}" for part in parts)
        for block in ("layers", "noise_refiner", "context_refiner")
        for name, parts in {
            "attention.qkv": ("attention.to_q", "attention.to_k", "attention.to_v"),
            "attention.out": ("attention.to_out.0",),
            "feed_forward.w1": ("feed_forward.w1",),
            "feed_forward.w2": ("feed_forward.w2",),
            "feed_forward.w3": ("feed_forward.w3",),
            "adaLN_modulation.0": ("adaLN_modulation.0",),
        }.items()
    },
    "x_embedder": ("all_x_embedder.2-1",),
    "cap_embedder.1": ("cap_embedder.1",),
    "t_embedder.mlp.0": ("t_embedder.mlp.0",),
    "t_embedder.mlp.2": ("t_embedder.mlp.2",),
    "final_layer.linear": ("all_final_layer.2-1.linear",),
    "final_layer.adaLN_modulation.1": ("all_final_layer.2-1.adaLN_modulation.1",),
}
"""The layers of the original weights, which kohya's names are made of."""


def load_dit(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the denoiser."""
    from diffusers import ZImageTransformer2DModel

    return load_denoiser(ZImageTransformer2DModel, files, dtype, device)


def build_dit(folder: Path) -> Module:
    """Build the denoiser with new weights."""
    from diffusers import ZImageTransformer2DModel

    return build_denoiser(ZImageTransformer2DModel, folder)


def encode_text(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one prompt into the hidden states before the last layer: ``prompt_emb`` [token, channel], no padding."""
    encoder: qwen3.TextEncoder = components["text_encoder"]
    text = qwen3.conversation(encoder.tokenizer, inputs["prompt"], enable_thinking=True)
    states, is_text = qwen3.hidden_states(encoder, text)
    return {"prompt_emb": states[-2][is_text]}


def note_on_text(components: Components, inputs: Mapping[str, Any]) -> str | None:
    """Tell how many tokens are cut off, if any: of the prompt and the template's end behind it."""
    tokenizer = components["text_encoder"].tokenizer
    text = qwen3.conversation(tokenizer, inputs["prompt"], enable_thinking=True)
    return note_on_truncation(tokenizer, text, qwen3.MAX_TOKENS, add_special_tokens=False)


class ZImage:
    """Text to image with Z-Image."""

    components: Mapping[str, ComponentSpec] = {
        "text_encoder": ComponentSpec(
            subfolder="text_encoder",
            class_name="Qwen3ForCausalLM",
            other_class_names=("Qwen3Model",),
            load=qwen3.load_text_encoder,
            companions=("tokenizer",),
            trained_part="model.",
            switches={"enable_npu_patch": npu.fuse_norms},
        ),
        "vae": autoencoder_kl.VAE,
        "dit": ComponentSpec(
            subfolder="transformer",
            class_name="ZImageTransformer2DModel",
            load=load_dit,
            build=build_dit,
            lora_layers={"diffusers": {}, "diffsynth": {}, "comfyui": ORIGINAL_LAYERS},
            switches={"enable_npu_patch": npu.fuse_rotary},
        ),
        **templates.component(),
    }
    units: tuple[EncodeUnit, ...] = (
        EncodeUnit(
            name="text",
            inputs=("prompt",),
            outputs=(FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True),),
            component="text_encoder",
            encode=encode_text,
            note=note_on_text,
            recipe={"enable_thinking": True, "max_tokens": qwen3.MAX_TOKENS, "hidden_state": -2},
        ),
        autoencoder_kl.LATENTS_UNIT,
        templates.UNIT,
    )
    noise_unit = autoencoder_kl.NOISE_UNIT
    schedule = FlowMatchSchedule(shift_type="linear", shift=3.0)
    blocks: tuple[BlockList, ...] = (BlockList(name="layers"),)
    size_multiple = 16
    latents_field = "latents"
    lora_target_modules: str | tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3")
    lora_prefix = "transformer"
    architecture = "Z-Image"
    pipelines: tuple[str, ...] = ("ZImagePipeline",)

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        expected = {"prompt_emb": (-1, dit_config["cap_feat_dim"]), "latents": (0, dit_config["in_channels"])}
        check_channels(shapes, expected)

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of 2x2 patches, without those that pad it to a multiple of 32; see ``ModelFamily``."""
        height, width = latents_shape[-2:]
        return height // PATCH * (width // PATCH)

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``. It is told 1 - σ, and predicts latents minus noise."""
        import torch

        text = batch.fields["prompt_emb"].to(noisy.dtype)
        predicted: list[Tensor] = models["dit"](
            list(noisy[:, :, None]),  # with a frame dimension
            1 - sigma,
            [item[:length] for item, length in zip(text, batch.lengths["prompt_emb"].tolist(), strict=True)],
            return_dict=False,
        )[0]
        return -torch.stack(predicted)[:, :, 0]

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the fields from a cached record of DiffSynth-Studio, which has a list of one prompt."""
        return {"latents": shared["input_latents"][0], "prompt_emb": positive["prompt_embeds"][0]}

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository; see ``modeling.tiny.write_repository``."""
        write_repository(folder, _tiny_pipeline)


def _tiny_pipeline() -> Any:
    """Build the real classes at the smallest size that keeps every structural constraint (head sizes, rope axes)."""
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    text_encoder, tokenizer = qwen3.tiny_text_encoder(hidden_size=64, num_layers=3)
    transformer = ZImageTransformer2DModel(
        in_channels=16,
        dim=128,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=4,
        n_kv_heads=4,
        cap_feat_dim=64,
        axes_dims=[8, 12, 12],
        axes_lens=[1536, 512, 512],
    )
    with torch.no_grad():
        # The class leaves them zero, or in older versions as the memory was.
        transformer.x_pad_token.normal_(std=0.02)
        transformer.cap_pad_token.normal_(std=0.02)
    return ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder_kl.tiny_vae(),
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        transformer=transformer,
    )


PLUGIN: ModelFamily = ZImage()
