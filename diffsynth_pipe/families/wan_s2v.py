"""Wan2.2-S2V: speech to video, from a reference picture, a text and an audio, with a video of poses if there is one.

The reference picture is the clip's first frame. It has a latent frame of its own, which is given: what is noised, and
what the loss sees, are the latent frames behind it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import AUDIO_SAMPLE_RATE, ComponentSpec, EncodeUnit
from diffsynth_pipe.errors import DataError, ModelError
from diffsynth_pipe.modeling import wan
from diffsynth_pipe.modeling.fields import check_channels, noise_unit
from diffsynth_pipe.modeling.loading import build_denoiser, load_encoder
from diffsynth_pipe.modeling.tiny import write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components, ModelFamily

SCALE = 8
"""Pixels per latent pixel."""
CHANNELS = 16
"""Of the latents."""
FRAME_RATE = 16
"""Frames of a clip per second, by which audio is laid beside them."""
WAV2VEC_RATE = 50
"""Hidden states of wav2vec 2.0 per second."""
FEATURE_RATE = 30
"""Features per second that are made of them first, of which each frame takes the one that is nearest to it."""
REFERENCE_FIELD = "reference_latents"
POSE_FIELD = "pose_latents"
AUDIO_FIELD = "audio_embeds"
LORA_LAYERS = {
    **wan.ORIGINAL_LAYERS,
    **{f"audio_injector.injector.{{}}.{name}": (f"audio_injector.injector.{{}}.to_{name}",) for name in "qkv"},
    "audio_injector.injector.{}.o": ("audio_injector.injector.{}.to_out.0",),
}
"""The layers of the original weights."""


@dataclass(frozen=True, slots=True)
class AudioEncoder:
    """wav2vec 2.0, what prepares audio for it, and how it computes, which its weights may not tell."""

    model: Any
    processor: Any
    dtype: dtype
    device: device


def load_audio_encoder(files: ComponentFiles, dtype: dtype, device: device) -> AudioEncoder:
    """Load wav2vec 2.0, and leave its head.

    Raises:
        ModelError: Its processor wants another sample rate.
    """
    from transformers import Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    folder = files.companions["audio_processor"]
    processor = Wav2Vec2FeatureExtractor.from_pretrained(folder, local_files_only=True)
    if processor.sampling_rate != AUDIO_SAMPLE_RATE:
        raise ModelError(
            f"{folder}: hears {processor.sampling_rate} samples a second, not {AUDIO_SAMPLE_RATE}; name another"
        )
    return AudioEncoder(load_encoder(Wav2Vec2ForCTC, files, dtype, device).wav2vec2, processor, dtype, device)


def load_dit(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the denoiser.

    Raises:
        ModelError: Its layers have other names: until diffusers has the class, it may have others elsewhere.
    """
    from diffsynth_pipe.modeling.wan_s2v import WanS2VTransformer3DModel

    model, info = WanS2VTransformer3DModel.from_pretrained(
        files.folder, dtype=dtype, use_safetensors=True, local_files_only=True, output_loading_info=True
    )
    for kind in ("missing", "unexpected"):
        if names := sorted(info[f"{kind}_keys"]):
            raise ModelError(
                f"{files.folder}: {len(names)} {kind} weights, such as {names[0]}; "
                "convert the published ones by diffsynth-pipe convert-wan-s2v"
            )
    return model.to(device).eval().requires_grad_(False)


def build_dit(folder: Path) -> Module:
    """Build the denoiser with new weights."""
    from diffsynth_pipe.modeling.wan_s2v import WanS2VTransformer3DModel

    return build_denoiser(WanS2VTransformer3DModel, folder)


def encode_latents(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode the clip; keep what is generated, all latent frames but the first: ``latents``.

    Raises:
        DataError: That is nothing.
    """
    if len(inputs["video"]) == 1:
        raise DataError("video: has one frame, which is the reference picture; a clip needs 5 at least")
    return {"latents": wan.video_latents(components["vae"], wan.to_video(inputs["video"]))[:, 1:]}


def encode_reference(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode the first frame alone: ``reference_latents`` [16, 1, height/8, width/8]."""
    return {REFERENCE_FIELD: wan.video_latents(components["vae"], wan.to_video(inputs["video"][:1]))}


def encode_pose(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode the poses of all frames but the first: ``pose_latents``, shaped as ``latents``.

    As in the reference its first frames are taken, black ones follow where they are too few, and the first one stands
    before them for the frame of which there is no latent.

    Raises:
        DataError: It has another size than the clip.
    """
    import torch

    clip, pose = inputs["video"], wan.to_video(inputs["s2v_pose_video"])
    if clip.shape[1:3] != pose.shape[2:]:
        sizes = ["x".join(map(str, size)) for size in (pose.shape[2:], clip.shape[1:3])]
        raise DataError(f"s2v_pose_video: is {sizes[0]} px where the video is {sizes[1]}; set height and width")
    num_frames = len(clip) - 1
    pose = torch.nn.functional.pad(pose[:, :num_frames], (0, 0, 0, 0, 0, max(0, num_frames - pose.shape[1])), value=-1)
    return {POSE_FIELD: wan.video_latents(components["vae"], torch.cat([pose[:, :1], pose], dim=1))[:, 1:]}


def encode_audio(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode all of the audio, and keep the hidden states of each frame but the first of the clip: ``audio_embeds``.

    [layer, channel, frame], as ``WanS2VAudioEncoder`` of the reference: the hidden states are stretched to 30 a second
    (linearly, the ends staying ends), and frame i takes the one at i · 30/16, rounded; after the end there are zeros.
    """
    import torch

    encoder: AudioEncoder = components["audio_encoder"]
    samples = encoder.processor(
        inputs["input_audio"], sampling_rate=AUDIO_SAMPLE_RATE, return_tensors="pt"
    ).input_values
    states = encoder.model(samples.to(encoder.device, encoder.dtype), output_hidden_states=True).hidden_states
    hidden = torch.cat(states).float().transpose(1, 2)
    num_features = int(hidden.shape[2] / WAV2VEC_RATE * FEATURE_RATE)
    features = torch.nn.functional.interpolate(hidden, size=num_features, mode="linear", align_corners=True)
    num_frames = len(inputs["video"]) - 1
    places = (torch.arange(num_frames, device=features.device) * (FEATURE_RATE / FRAME_RATE)).round().long()
    heard = places < num_features
    return {AUDIO_FIELD: features[:, :, places.clamp(max=num_features - 1)] * heard}


def note_on_audio(_: Components, inputs: Mapping[str, Any]) -> str | None:
    """Tell how many frames have no audio, if any."""
    num_frames = len(inputs["video"]) - 1
    num_heard = int(len(inputs["input_audio"]) / AUDIO_SAMPLE_RATE * FRAME_RATE)
    return f"the audio ends after {num_heard} of {num_frames} frames" if num_heard < num_frames else None


def row_noise_unit() -> EncodeUnit:
    """Return ``ModelFamily.noise_unit``: the noise of all latent frames, as the reference draws it, but the first."""

    def latents_shape(video: NDArray[np.uint8]) -> tuple[int, ...]:
        num_frames, height, width, _ = video.shape
        return (CHANNELS, (num_frames - 1) // wan.FRAMES_PER_LATENT + 1, height // SCALE, width // SCALE)

    unit = noise_unit("video", wan.LATENT_DIMS, latents_shape)

    def encode(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        return {"noise": unit.encode(components, inputs)["noise"][:, 1:]}

    return replace(unit, encode=encode, recipe={**unit.recipe, "frames": "all but the first"})


REFERENCE_UNIT = EncodeUnit(
    name="reference",
    inputs=("video",),
    outputs=(FieldSpec(name=REFERENCE_FIELD, dtype="bfloat16", dims=wan.LATENT_DIMS),),
    component="vae",
    encode=encode_reference,
    media={"video": "video"},
    recipe=wan.VIDEO_RECIPE,
)


class WanSpeechToVideo:
    """Speech to video with Wan2.2-S2V."""

    components: Mapping[str, ComponentSpec] = {
        "text_encoder": wan.TEXT_ENCODER,
        "audio_encoder": ComponentSpec(
            subfolder="audio_encoder",
            class_name="Wav2Vec2ForCTC",
            load=load_audio_encoder,
            companions=("audio_processor",),
        ),
        "vae": wan.vae(SCALE),
        "dit": ComponentSpec(
            subfolder="transformer",
            class_name="WanS2VTransformer3DModel",
            load=load_dit,
            build=build_dit,
            lora_layers={"diffusers": {}, "diffsynth": LORA_LAYERS, "comfyui": LORA_LAYERS},
        ),
    }
    units: tuple[EncodeUnit, ...] = (
        wan.TEXT_UNIT,
        EncodeUnit(
            name="latents",
            inputs=("video",),
            outputs=(FieldSpec(name="latents", dtype="bfloat16", dims=wan.LATENT_DIMS),),
            component="vae",
            encode=encode_latents,
            media={"video": "video"},
            recipe={**wan.VIDEO_RECIPE, "frames": "all but the first"},
        ),
        REFERENCE_UNIT,
        # the same: the reference's commands name it, and the model has no use for another picture or none
        replace(REFERENCE_UNIT, name="first_frame", enabled_by="input_image"),
        EncodeUnit(
            name="audio",
            inputs=("input_audio", "video"),
            outputs=(FieldSpec(name=AUDIO_FIELD, dtype="bfloat16", dims=("layer", "channel", "frame")),),
            component="audio_encoder",
            encode=encode_audio,
            media={"input_audio": "audio", "video": "video"},
            note=note_on_audio,
            recipe={"frame_rate": FRAME_RATE, "feature_rate": FEATURE_RATE, "interpolated": "linearly in float32"},
        ),
        EncodeUnit(
            name="pose",
            inputs=("s2v_pose_video", "video"),
            outputs=(FieldSpec(name=POSE_FIELD, dtype="bfloat16", dims=wan.LATENT_DIMS),),
            component="vae",
            encode=encode_pose,
            media={"s2v_pose_video": "video", "video": "video"},
            enabled_by="s2v_pose_video",
            recipe={**wan.VIDEO_RECIPE, "frames": "first, then all, black to the end; without the first latent"},
        ),
    )
    noise_unit = row_noise_unit()
    schedule = wan.SCHEDULE
    blocks = wan.BLOCKS
    size_multiple = SCALE * wan.PATCH
    latents_field = "latents"
    lora_target_modules: str | tuple[str, ...] = wan.LORA_TARGET_MODULES
    lora_prefix = "transformer"
    architecture = "Wan2.2-S2V"
    pipelines: tuple[str, ...] = ("WanSpeechToVideoPipeline",)

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        expected = {
            "prompt_emb": (-1, dit_config["text_dim"]),
            "latents": (0, dit_config["in_channels"]),
            REFERENCE_FIELD: (0, dit_config["in_channels"]),
            AUDIO_FIELD: (1, dit_config["audio_dim"]),
            POSE_FIELD: (0, dit_config["pose_dim"]),
        }
        check_channels(shapes, expected)

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of patches; see ``ModelFamily``."""
        return wan.num_tokens(latents_shape)

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``. Without poses it gets zeros for them."""
        import torch

        given = {name: batch.fields[name].to(noisy.dtype) for name in (REFERENCE_FIELD, AUDIO_FIELD)}
        pose = batch.fields.get(POSE_FIELD)
        velocity: Tensor = models["dit"](
            hidden_states=noisy,
            timestep=1000 * sigma,
            encoder_hidden_states=wan.text_of(batch).to(noisy.dtype),
            audio_embeds=given[AUDIO_FIELD],
            image_latents=given[REFERENCE_FIELD],
            pose_latents=torch.zeros_like(noisy) if pose is None else pose.to(noisy.dtype),
        )
        return velocity

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the fields from a cached record of DiffSynth-Studio, whose texts are padded; poses if it has them."""
        pose = shared.get("s2v_pose_latents")
        return {
            "latents": shared["input_latents"][0][:, 1:],
            REFERENCE_FIELD: shared["first_frame_latents"][0],
            "prompt_emb": wan.unpadded(positive["context"][0]),
            AUDIO_FIELD: positive["audio_embeds"][0],
            **({} if pose is None else {POSE_FIELD: pose[0]}),
        }

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository; see ``modeling.tiny.write_repository``."""
        write_repository(folder, _tiny_pipeline)


def _tiny_pipeline() -> Any:
    from diffusers import DiffusionPipeline
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2ForCTC

    from diffsynth_pipe.modeling.wan_s2v import WanS2VTransformer3DModel

    class WanSpeechToVideoPipeline(DiffusionPipeline):  # type: ignore[misc]  # diffusers has none yet
        # It saves the parts that have names here.
        def __init__(
            self,
            tokenizer: Any,
            text_encoder: Any,
            audio_encoder: Any,
            audio_processor: Any,
            vae: Any,
            transformer: Any,
            scheduler: Any,
        ) -> None:
            super().__init__()
            self.register_modules(
                tokenizer=tokenizer,
                text_encoder=text_encoder,
                audio_encoder=audio_encoder,
                audio_processor=audio_processor,
                vae=vae,
                transformer=transformer,
                scheduler=scheduler,
            )

    audio_encoder = Wav2Vec2ForCTC(
        Wav2Vec2Config(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=33,
            conv_dim=[16] * 7,
            conv_bias=True,
            do_stable_layer_norm=True,
            feat_extract_norm="layer",
            num_conv_pos_embeddings=16,
            num_conv_pos_embedding_groups=2,
        )
    )
    transformer = WanS2VTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        text_dim=64,
        audio_dim=32,
        audio_inject_layers=(0, 2),
        num_weighted_avg_layers=3,
        ffn_dim=256,
        num_layers=3,
    )
    return WanSpeechToVideoPipeline(
        audio_encoder=audio_encoder.eval(),
        audio_processor=Wav2Vec2FeatureExtractor(return_attention_mask=True),
        transformer=transformer.eval(),
        **wan.tiny_parts(),
    )


PLUGIN: ModelFamily = WanSpeechToVideo()
