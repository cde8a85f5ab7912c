"""Wan2.2 TI2V-5B: text to video, and image to video by a first frame that is clean from the start."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import FIRST_FRAME_FIELD, ComponentSpec, EncodeUnit
from diffsynth_pipe.modeling import wan
from diffsynth_pipe.modeling.fields import check_channels
from diffsynth_pipe.modeling.tiny import write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, Components, ModelFamily

SCALE = 16
"""Pixels per latent pixel."""
CHANNELS = 48


def encode_first_frame(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode the first frame alone: ``first_frame_latents`` [48, 1, height/16, width/16]."""
    return {FIRST_FRAME_FIELD: wan.video_latents(components["vae"], wan.to_video(inputs["video"][:1]))}


class WanTextImageToVideo:
    """Text and image to video with Wan2.2 TI2V-5B."""

    components: Mapping[str, ComponentSpec] = {
        "text_encoder": wan.TEXT_ENCODER,
        "vae": wan.vae(SCALE),
        "dit": wan.DIT,
    }
    units: tuple[EncodeUnit, ...] = (
        wan.TEXT_UNIT,
        wan.LATENTS_UNIT,
        EncodeUnit(
            name="first_frame",
            inputs=("video",),
            outputs=(FieldSpec(name=FIRST_FRAME_FIELD, dtype="bfloat16", dims=wan.LATENT_DIMS),),
            component="vae",
            encode=encode_first_frame,
            media={"video": "video"},
            enabled_by="input_image",
            recipe=wan.VIDEO_RECIPE,
        ),
    )
    noise_unit = wan.row_noise_unit(CHANNELS, SCALE)
    schedule = wan.SCHEDULE
    blocks = wan.BLOCKS
    size_multiple = SCALE * wan.PATCH
    latents_field = "latents"
    lora_target_modules: str | tuple[str, ...] = wan.LORA_TARGET_MODULES
    lora_prefix = "transformer"
    architecture = "Wan2.2-TI2V-5B"
    pipelines: tuple[str, ...] = ("WanPipeline", "WanImageToVideoPipeline")

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        channels = dit_config["in_channels"]
        expected = {
            "prompt_emb": (-1, dit_config["text_dim"]),
            "latents": (0, channels),
            FIRST_FRAME_FIELD: (0, channels),
        }
        check_channels(shapes, expected)

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of patches; see ``ModelFamily``."""
        return wan.num_tokens(latents_shape)

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``. A first frame that is known is clean, at timestep 0."""
        import torch

        timestep = 1000 * sigma
        first = batch.fields.get(FIRST_FRAME_FIELD)
        if first is not None:
            noisy = torch.cat([first.to(noisy.dtype), noisy[:, :, 1:]], dim=2)
            num_tokens = wan.num_tokens(noisy.shape)
            timestep = timestep[:, None].repeat(1, num_tokens)
            timestep[:, : num_tokens // noisy.shape[2]] = 0
        velocity: Tensor = models["dit"](
            hidden_states=noisy,
            timestep=timestep,
            encoder_hidden_states=wan.text_of(batch).to(noisy.dtype),
            return_dict=False,
        )[0]
        return velocity

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the fields of text to video from a cached record of DiffSynth-Studio, whose texts are padded."""
        return {"latents": shared["input_latents"][0], "prompt_emb": wan.unpadded(positive["context"][0])}

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository; see ``modeling.tiny.write_repository``."""
        write_repository(folder, _tiny_pipeline)


def _tiny_pipeline() -> Any:
    from diffusers import WanPipeline

    parts = wan.tiny_parts(
        z_dim=CHANNELS,
        decoder_base_dim=8,
        latents_mean=[0.0] * CHANNELS,
        latents_std=[1.0] * CHANNELS,
        is_residual=True,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_spatial=SCALE,
    )
    return WanPipeline(transformer=wan.tiny_dit(CHANNELS, CHANNELS), expand_timesteps=True, **parts)


PLUGIN: ModelFamily = WanTextImageToVideo()
