"""Wan 2.1 and Wan 2.2 A14B: text to video, and image to video from the first frame or the first and the last.

The two denoisers of A14B are trained one at a time, from one cache: the model entry names the folder ``transformer``
(high noise) or ``transformer_2`` (low noise), and ``min/max_timestep_boundary`` the part of the grid that is its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import ComponentSpec, EncodeUnit
from diffsynth_pipe.modeling import wan
from diffsynth_pipe.modeling.fields import check_channels
from diffsynth_pipe.modeling.loading import load_encoder
from diffsynth_pipe.modeling.tiny import write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components, ModelFamily

SCALE = 8
"""Pixels per latent pixel."""
CHANNELS = 16
"""Of the latents."""
CONDITION_CHANNELS = 20
"""Of ``y``: four of the mask, 16 of latents."""


@dataclass(frozen=True, slots=True)
class ImageEncoder:
    """CLIP's vision tower and what prepares images for it."""

    model: Any
    processor: Any


def load_image_encoder(files: ComponentFiles, dtype: dtype, device: device) -> ImageEncoder:
    """Load CLIP's vision tower."""
    # Not the default processor, which with torchvision would give other pixels.
    from transformers import CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    processor = CLIPImageProcessorPil.from_pretrained(files.companions["image_processor"], local_files_only=True)
    return ImageEncoder(load_encoder(CLIPVisionModel, files, dtype, device), processor)


def encode_condition(
    components: Components, inputs: Mapping[str, Any], *, has_last: bool, framewise: bool = False
) -> dict[str, Tensor]:
    """Encode which frames are known, and a clip in which the others are grey: ``y`` [20, frame, height, width].

    As ``WanImageToVideoPipeline.prepare_latents``: the mask has a channel for each of the four frames of a latent
    frame, and the first frame, which has a latent frame of its own, stands in all four. If each frame of the video has
    one (``framewise``), the clip is as much longer, as in the reference.
    """
    import torch

    vae, frames = components["vae"], inputs["video"]
    known = [0, -1] if has_last else [0]
    num_frames = (len(frames) - 1) * wan.FRAMES_PER_LATENT + 1 if framewise else len(frames)
    is_known = torch.zeros(num_frames)
    is_known[known] = 1
    video = torch.zeros(3, num_frames, *frames.shape[1:3])
    video[:, known] = wan.to_video(frames[known])
    latents = wan.video_latents(vae, video)
    mask = torch.cat([is_known[:1].repeat(wan.FRAMES_PER_LATENT), is_known[1:]])
    mask = mask.view(-1, wan.FRAMES_PER_LATENT).T[:, :, None, None].expand(-1, -1, *latents.shape[2:])
    return {"y": torch.cat([mask.to(latents.device), latents])}


def condition_unit(name: str, enabled_by: str, known_frames: str, *, has_last: bool) -> EncodeUnit:
    """Return the unit that encodes ``y`` of the first frame, or of the first and the last."""
    unit = EncodeUnit(
        name=name,
        inputs=("video",),
        outputs=(FieldSpec(name="y", dtype="bfloat16", dims=wan.LATENT_DIMS),),
        component="vae",
        encode=partial(encode_condition, has_last=has_last),
        media={"video": "video"},
        enabled_by=enabled_by,
        recipe={**wan.VIDEO_RECIPE, "known_frames": known_frames},
    )
    return wan.with_framewise(unit, partial(encode_condition, has_last=has_last, framewise=True))


def encode_clip(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode the first and the last frame with CLIP: ``clip_feature`` [2, token, channel], the last state but one.

    A denoiser without places for two images, which is all but FLF2V, takes the first.
    """
    import torch
    from PIL import Image

    encoder: ImageEncoder = components["image_encoder"]
    images = [Image.fromarray(inputs["video"][index]) for index in (0, -1)]
    pixels = encoder.processor(images=images, return_tensors="pt").pixel_values
    pixels = pixels.to(encoder.model.device, encoder.model.dtype)
    # one after the other, so that the first frame's bits do not depend on the last
    hidden = [encoder.model(image[None], output_hidden_states=True).hidden_states[-2][0] for image in pixels]
    return {"clip_feature": torch.stack(hidden)}


class Wan:
    """Text and image to video with Wan 2.1 and Wan 2.2 A14B."""

    components: Mapping[str, ComponentSpec] = {
        "text_encoder": wan.TEXT_ENCODER,
        "image_encoder": ComponentSpec(
            subfolder="image_encoder",
            class_name="CLIPVisionModel",
            load=load_image_encoder,
            companions=("image_processor",),
        ),
        "vae": wan.vae(SCALE),
        "dit": replace(wan.DIT, other_subfolders=("transformer_2",)),
    }
    units: tuple[EncodeUnit, ...] = (
        wan.TEXT_UNIT,
        wan.LATENTS_UNIT,
        condition_unit("first_frame", "input_image", "first", has_last=False),
        # writes over the field of the unit before, which then does not run
        condition_unit("first_and_last_frame", "end_image", "first and last", has_last=True),
        EncodeUnit(
            name="clip",
            inputs=("video",),
            outputs=(FieldSpec(name="clip_feature", dtype="bfloat16", dims=("frame", "token", "channel")),),
            component="image_encoder",
            encode=encode_clip,
            media={"video": "video"},
            enabled_by="clip_feature",
            recipe={"hidden_state": "last but one"},
        ),
    )
    noise_unit = wan.row_noise_unit(CHANNELS, SCALE)
    schedule = wan.SCHEDULE
    blocks = wan.BLOCKS
    size_multiple = SCALE * wan.PATCH
    latents_field = "latents"
    lora_target_modules: str | tuple[str, ...] = wan.LORA_TARGET_MODULES
    lora_prefix = "transformer"
    architecture = "Wan"
    pipelines: tuple[str, ...] = ("WanPipeline", "WanImageToVideoPipeline")

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        channels = dit_config["out_channels"]
        expected = {
            "prompt_emb": (-1, dit_config["text_dim"]),
            "latents": (0, channels),
            "y": (0, CONDITION_CHANNELS),
            "clip_feature": (-1, dit_config.get("image_dim")),
        }
        wan.check_present(shapes, "y", "input_image", wanted=dit_config["in_channels"] != channels)
        wan.check_present(shapes, "clip_feature", "clip_feature", wanted=bool(dit_config.get("image_dim")))
        check_channels(shapes, expected)

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of patches; see ``ModelFamily``."""
        return wan.num_tokens(latents_shape)

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``. The condition ``y`` is joined to the channels."""
        import torch

        dit: Any = models["dit"]
        image = batch.fields.get("clip_feature")
        if image is not None:
            image = image.flatten(0, 1) if dit.config.pos_embed_seq_len else image[:, 0]
            image = image.to(noisy.dtype)
        known = [batch.fields["y"].to(noisy.dtype)] if "y" in batch.fields else []
        velocity: Tensor = dit(
            hidden_states=torch.cat([noisy, *known], dim=1),
            timestep=1000 * sigma,
            encoder_hidden_states=wan.text_of(batch).to(noisy.dtype),
            encoder_hidden_states_image=image,
            return_dict=False,
        )[0]
        return velocity

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the fields of text to video from a cached record of DiffSynth-Studio, whose texts are padded."""
        return {"latents": shared["input_latents"][0], "prompt_emb": wan.unpadded(positive["context"][0])}

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository of Wan2.1 text to video; see ``modeling.tiny.write_repository``."""
        write_tiny_variant(folder, "t2v")


Variant = Literal["t2v", "t2v-a14b", "i2v", "flf2v", "i2v-a14b"]


def write_tiny_variant(folder: Path, variant: Variant) -> None:
    """Write a tiny repository of one of the models; see ``modeling.tiny.write_repository``."""
    write_repository(folder, lambda: _tiny_pipeline(variant))


def _tiny_pipeline(variant: Variant) -> Any:
    from diffusers import WanImageToVideoPipeline, WanPipeline

    parts = wan.tiny_parts()
    if variant == "t2v":
        return WanPipeline(transformer=wan.tiny_dit(16, 16), **parts)
    if variant == "t2v-a14b":
        experts = {name: wan.tiny_dit(16, 16) for name in ("transformer", "transformer_2")}
        return WanPipeline(boundary_ratio=0.875, **experts, **parts)
    if variant == "i2v-a14b":
        experts = {name: wan.tiny_dit(16 + CONDITION_CHANNELS, 16) for name in ("transformer", "transformer_2")}
        return WanImageToVideoPipeline(boundary_ratio=0.9, **experts, **parts)
    from transformers import CLIPVisionConfig, CLIPVisionModel
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=28,
            patch_size=14,
        )
    )
    processor = CLIPImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    image = {"image_dim": 32, "added_kv_proj_dim": 128, "pos_embed_seq_len": 10 if variant == "flf2v" else None}
    dit = wan.tiny_dit(16 + CONDITION_CHANNELS, 16, **image)
    return WanImageToVideoPipeline(transformer=dit, image_encoder=encoder.eval(), image_processor=processor, **parts)


PLUGIN: ModelFamily = Wan()
