"""Qwen-Image: Qwen2.5-VL text encoder, causal video VAE on one frame, MMDiT denoiser; called as in diffusers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth_pipe.contracts import ComponentSpec, EncodeUnit
from diffsynth_pipe.modeling import qwen
from diffsynth_pipe.modeling.fields import check_channels
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


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """The language model and its tokenizer."""

    model: Any
    tokenizer: Any


def load_text_encoder(files: ComponentFiles, dtype: dtype, device: device) -> TextEncoder:
    """Load the language model and its tokenizer, which must fit the prompt template."""
    tokenizer = qwen.load_tokenizer(files.companions["tokenizer"], TEMPLATE, NUM_PREFIX_TOKENS)
    return TextEncoder(qwen.load_language_model(files, dtype, device), tokenizer)


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
        "vae": qwen.VAE,
        "dit": qwen.DIT,
    }
    units: tuple[EncodeUnit, ...] = (
        EncodeUnit(
            name="text",
            inputs=("prompt",),
            outputs=(qwen.TEXT_FIELD,),
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
        qwen.LATENTS_UNIT,
    )
    noise_unit = qwen.NOISE_UNIT
    schedule = qwen.SCHEDULE
    blocks = qwen.BLOCKS
    size_multiple = 16
    latents_field = "latents"
    lora_target_modules: str | tuple[str, ...] = qwen.LORA_TARGET_MODULES
    lora_prefix = "transformer"
    architecture = "Qwen-Image"
    pipelines: tuple[str, ...] = ("QwenImagePipeline",)

    def check_fields(self, dit_config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Refuse cached fields that this denoiser cannot take; see ``ModelFamily``."""
        latent_channels = dit_config["in_channels"] // qwen.PATCH**2
        check_channels(shapes, {"prompt_emb": (-1, dit_config["joint_attention_dim"]), "latents": (0, latent_channels)})

    def num_tokens(self, latents_shape: Sequence[int]) -> int:
        """Return the number of 2x2 patches; see ``ModelFamily``."""
        return qwen.num_tokens(latents_shape)

    def predict_velocity(self, models: Mapping[str, Module], batch: Batch, noisy: Tensor, sigma: Tensor) -> Tensor:
        """Return the denoiser's velocity; see ``ModelFamily``. Latents are packed 2x2 into tokens for the call."""
        count, _, _, height, width = noisy.shape
        tokens: Tensor = models["dit"](
            hidden_states=qwen.pack(noisy),
            encoder_hidden_states=batch.fields["prompt_emb"].to(noisy.dtype),
            encoder_hidden_states_mask=qwen.text_mask(batch),
            timestep=sigma,
            img_shapes=[[(1, height // qwen.PATCH, width // qwen.PATCH)]] * count,
            return_dict=False,
        )[0]
        return qwen.unpack(tokens, noisy.shape)

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


def _tiny_pipeline() -> Any:
    from diffusers import QwenImagePipeline

    return QwenImagePipeline(**qwen.tiny_parts(qwen.tiny_tokenizer([TEMPLATE])))


PLUGIN: ModelFamily = QwenImage()
