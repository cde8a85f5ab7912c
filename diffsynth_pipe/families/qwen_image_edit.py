"""Qwen-Image-Edit: as Qwen-Image, but the text encoder and the denoiser also see the images to be edited.

The column ``edit_image`` holds one image, encoded as Qwen-Image-Edit takes it, or a list of images, encoded as
Edit-Plus (2509, 2511) takes them: this is the reference's rule, as the weights do not tell.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import ComponentSpec, EncodeUnit
from diffsynth_pipe.errors import DataError
from diffsynth_pipe.modeling import qwen
from diffsynth_pipe.modeling.fields import check_channels
from diffsynth_pipe.modeling.tiny import write_repository

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from PIL.Image import Image
    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components, ModelFamily

TEMPLATE = (
    "<|im_start|>system\nDescribe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. Generate a new image "
    "that meets the user's requirements while maintaining consistency with the original input where appropriate."
    "<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
NUM_PREFIX_TOKENS = 64
"""Tokens of the template before the images and the prompt; their hidden states are dropped."""
IMAGE_PAD = "<|image_pad|>"
PICTURE = "<|vision_start|>{}<|vision_end|>"
LATENTS_AREA_PX = 1024 * 1024
"""Area at which the VAE sees an image; also the text encoder, if there is but one."""
PICTURE_AREA_PX = 384 * 384
"""Area at which the text encoder sees each image of a list."""


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """The vision-language model, its tokenizer, and what makes patches of images for it."""

    model: Any
    tokenizer: Any
    image_processor: Any


def load_text_encoder(files: ComponentFiles, dtype: dtype, device: device) -> TextEncoder:
    """Load the vision-language model; its tokenizer must fit the prompt template."""
    # Not Qwen2VLProcessor, which cannot be built without torchvision, for the sake of videos; and with torchvision the
    # default image processor would give other pixels.
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    tokenizer = qwen.load_tokenizer(files.companions["tokenizer"], TEMPLATE, NUM_PREFIX_TOKENS)
    processor = Qwen2VLImageProcessorPil.from_pretrained(files.companions["processor"], local_files_only=True)
    return TextEncoder(qwen.load_language_model(files, dtype, device), tokenizer, processor)


def encode_text(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode prompt and images into the hidden states after the template's prefix: ``prompt_emb`` [token, channel].

    The model gets ``mm_token_type_ids``, without which transformers 5 numbers the tokens of an image as if they were
    text. diffusers 0.42 forgets them (its issue 14194), so its embeddings are not those that the model was trained on.

    Raises:
        DataError: The prompt itself holds an image token.
    """
    encoder: TextEncoder = components["text_encoder"]
    if IMAGE_PAD in inputs["prompt"]:
        raise DataError(f"prompt: holds {IMAGE_PAD!r}, which stands for an image; remove it")
    images = _as_list(inputs["edit_image"])
    is_list = isinstance(inputs["edit_image"], list)
    area_px = PICTURE_AREA_PX if is_list else LATENTS_AREA_PX
    patches = encoder.image_processor(images=[resize(image, area_px) for image in images], return_tensors="pt")
    counts = (patches["image_grid_thw"].prod(1) // encoder.image_processor.merge_size**2).tolist()
    pictures = [PICTURE.format(IMAGE_PAD * count) for count in counts]
    if is_list:
        pictures = [f"Picture {number}: {picture}" for number, picture in enumerate(pictures, start=1)]
    text = TEMPLATE.format("".join(pictures) + inputs["prompt"])
    tokens = encoder.tokenizer(text, return_tensors="pt").to(encoder.model.device)
    is_image = tokens.input_ids == encoder.tokenizer.convert_tokens_to_ids(IMAGE_PAD)
    # The inner model: the language head's logits over 152k tokens are of no use here.
    hidden = encoder.model.model(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        mm_token_type_ids=is_image.int(),
        **patches.to(encoder.model.device),
    ).last_hidden_state
    return {"prompt_emb": hidden[0, NUM_PREFIX_TOKENS:]}


def encode_edit_latents(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode the images to be edited into denoiser tokens, one image after the other.

    Yields ``edit_latents`` [token, 64] and, as the denoiser must know where which image lies, ``edit_shapes``
    [image, 2]: the rows and columns of tokens of each.
    """
    import torch

    latents = [
        qwen.image_latents(components["vae"], resize(image, LATENTS_AREA_PX))
        for image in _as_list(inputs["edit_image"])
    ]
    shapes = [(item.shape[-2] // qwen.PATCH, item.shape[-1] // qwen.PATCH) for item in latents]
    return {
        "edit_latents": torch.cat([qwen.pack(item[None])[0] for item in latents]),
        "edit_shapes": torch.tensor(shapes, dtype=torch.int32),
    }


def resize(image: Image, area_px: int) -> Image:
    """Scale an image to an area, both sides rounded to 32 px, as diffusers' ``calculate_dimensions``."""
    from PIL.Image import Resampling

    ratio = image.width / image.height
    width = math.sqrt(area_px * ratio)
    return image.resize((round(width / 32) * 32, round(width / ratio / 32) * 32), Resampling.LANCZOS)


def _as_list(images: Image | list[Image]) -> list[Image]:
    return images if isinstance(images, list) else [images]


def use_zero_cond_t(dit: Module) -> None:
    """Tell the denoiser that the images to be edited are free of noise, as 2511 was trained."""
    for module in (dit, *dit.transformer_blocks):  # type: ignore[misc]
        module.zero_cond_t = True


class QwenImageEdit:
    """Image editing with Qwen-Image-Edit."""

    components: Mapping[str, ComponentSpec] = {
        "text_encoder": ComponentSpec(
            subfolder="text_encoder",
            class_name="Qwen2_5_VLForConditionalGeneration",
            load=load_text_encoder,
            companions=("tokenizer", "processor"),
            trained_part="model.language_model.",
        ),
        "vae": qwen.VAE,
        "dit": replace(qwen.DIT, switches={"zero_cond_t": use_zero_cond_t}),
    }
    units: tuple[EncodeUnit, ...] = (
        EncodeUnit(
            name="text",
            inputs=("prompt", "edit_image"),
            outputs=(qwen.TEXT_FIELD,),
            component="text_encoder",
            encode=encode_text,
            media={"edit_image": "images"},
            recipe={
                "template": TEMPLATE,
                "num_dropped_tokens": NUM_PREFIX_TOKENS,
                "picture": PICTURE,
                "areas_px": [LATENTS_AREA_PX, PICTURE_AREA_PX],
                "hidden_state": "last",
            },
        ),
        EncodeUnit(
            name="edit_latents",
            inputs=("edit_image",),
            outputs=(
                FieldSpec(name="edit_latents", dtype="bfloat16", dims=("token", "channel")),
                FieldSpec(name="edit_shapes", dtype="int32", dims=("image", "side")),
            ),
            component="vae",
            encode=encode_edit_latents,
            media={"edit_image": "images"},
            recipe={**qwen.LATENTS_UNIT.recipe, "area_px": LATENTS_AREA_PX},
        ),
        qwen.LATENTS_UNIT,
    )
    noise_unit = qwen.NOISE_UNIT
    schedule = qwen.SCHEDULE
    blocks = qwen.BLOCKS
    size_multiple = 16
    latents_field = "latents"
    lora_target_modules: str | tuple[str, ...] = qwen.LORA_TARGET_MODULES
    lora_prefix = "transformer"
    architecture = "Qwen-Image-Edit"
    pipelines: tuple[str, ...] = ("QwenImageEditPipeline", "QwenImageEditPlusPipeline")

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        token_channels = dit_config["in_channels"]
        expected = {
            "prompt_emb": (-1, dit_config["joint_attention_dim"]),
            "latents": (0, token_channels // qwen.PATCH**2),
            "edit_latents": (-1, token_channels),
        }
        check_channels(shapes, expected)

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of 2x2 patches of the generated image; see ``ModelFamily``."""
        return qwen.num_tokens(latents_shape)

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``. The tokens of the images to be edited follow."""
        import torch

        count, _, _, height, width = noisy.shape
        edit_shapes = batch.fields["edit_shapes"][0].tolist()  # those of a bucket are equal
        shapes = [(1, rows, columns) for rows, columns in [(height // qwen.PATCH, width // qwen.PATCH), *edit_shapes]]
        tokens: Tensor = models["dit"](
            hidden_states=torch.cat([qwen.pack(noisy), batch.fields["edit_latents"].to(noisy.dtype)], dim=1),
            encoder_hidden_states=batch.fields["prompt_emb"].to(noisy.dtype),
            encoder_hidden_states_mask=qwen.text_mask(batch),
            timestep=sigma,
            img_shapes=[shapes] * count,
            return_dict=False,
        )[0]
        return qwen.unpack(tokens[:, : qwen.num_tokens(noisy.shape)], noisy.shape)

    def fields_of_diffsynth_record(
        self, shared: Mapping[str, Any], positive: Mapping[str, Any]
    ) -> Mapping[str, Tensor]:
        """Return the fields from a cached record of DiffSynth-Studio, which holds edit latents unpacked."""
        import torch

        edit_latents = shared["edit_latents"]
        latents = [item[:, :, None] for item in (edit_latents if isinstance(edit_latents, list) else [edit_latents])]
        num_tokens = int(positive["prompt_emb_mask"][0].sum())
        return {
            "latents": shared["input_latents"][0][:, None],
            "prompt_emb": positive["prompt_emb"][0, :num_tokens],
            "edit_latents": torch.cat([qwen.pack(item)[0] for item in latents]),
            "edit_shapes": torch.tensor(
                [(item.shape[-2] // qwen.PATCH, item.shape[-1] // qwen.PATCH) for item in latents], dtype=torch.int32
            ),
        }

    def write_tiny(self, folder: Path) -> None:
        """Write a tiny repository of Edit-Plus; see ``modeling.tiny.write_repository``."""
        write_repository(folder, _tiny_pipeline, _add_processor)


def _tiny_pipeline() -> Any:
    from diffusers import QwenImageEditPlusPipeline

    tokenizer = qwen.tiny_tokenizer([TEMPLATE, "Picture 1: 2: 3:"])
    return QwenImageEditPlusPipeline(processor=None, **qwen.tiny_parts(tokenizer, vae_base_dim=8))


def _add_processor(folder: Path) -> None:
    """Write what saving a ``Qwen2VLProcessor`` would, which needs torchvision."""
    from transformers import Qwen2Tokenizer
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    Qwen2VLImageProcessorPil().save_pretrained(folder / "processor")
    Qwen2Tokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder / "processor")
    index = folder / "model_index.json"
    content = {**json.loads(index.read_text("utf-8")), "processor": ["transformers", "Qwen2VLProcessor"]}
    index.write_text(json.dumps(content, indent=2) + "\n", "utf-8")


PLUGIN: ModelFamily = QwenImageEdit()
