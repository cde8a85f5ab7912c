"""What the families of Wan share: UMT5 texts, the causal video VAE, the denoiser and its call."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import BlockList, ComponentSpec, EncodeUnit, FlowMatchSchedule
from diffsynth_pipe.errors import CacheMismatch, ModelError
from diffsynth_pipe.modeling.fields import noise_unit
from diffsynth_pipe.modeling.loading import build_denoiser, load_denoiser, load_encoder

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor, device, dtype
    from torch.nn import Module

    from diffsynth_pipe.contracts import Batch, ComponentFiles, Components, LoraLayers

NUM_TEXT_TOKENS = 512
"""What the text encoder is padded to, and its output after it: the denoiser has no mask, so zeros are a part of it."""
FRAMES_PER_LATENT = 4
PATCH = 2
"""Latent pixels per side of one denoiser token."""
LATENT_DIMS = ("channel", "frame", "height", "width")
ORIGINAL_LAYERS: LoraLayers = {
    **{f"blocks.{{}}.self_attn.{name}": (f"blocks.{{}}.attn1.to_{name}",) for name in "qkv"},
    **{f"blocks.{{}}.cross_attn.{name}": (f"blocks.{{}}.attn2.to_{name}",) for name in "qkv"},
    **{f"blocks.{{}}.cross_attn.{name}_img": (f"blocks.{{}}.attn2.add_{name}_proj",) for name in "kv"},
    "blocks.{}.self_attn.o": ("blocks.{}.attn1.to_out.0",),
    "blocks.{}.cross_attn.o": ("blocks.{}.attn2.to_out.0",),
    "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
    "text_embedding.0": ("condition_embedder.text_embedder.linear_1",),
    "text_embedding.2": ("condition_embedder.text_embedder.linear_2",),
    "time_embedding.0": ("condition_embedder.time_embedder.linear_1",),
    "time_embedding.2": ("condition_embedder.time_embedder.linear_2",),
    "time_projection.1": ("condition_embedder.time_proj",),
    "img_emb.proj.1": ("condition_embedder.image_embedder.ff.net.0.proj",),
    "img_emb.proj.3": ("condition_embedder.image_embedder.ff.net.2",),
    "head.head": ("proj_out",),
}
"""The layers of the original weights, by whose names the reference and ComfyUI know them."""
VIDEO_RECIPE = {"pixels": "x/255*2-1 in float32", "posterior": "mode", "normalization": "(z-mean)*(1/std) in float32"}


@dataclass(frozen=True, slots=True)
class TextEncoder:
    """The encoder of UMT5 and its tokenizer."""

    model: Any
    tokenizer: Any


def load_text_encoder(files: ComponentFiles, dtype: dtype, device: device) -> TextEncoder:
    """Load UMT5's encoder and its tokenizer."""
    from transformers import AutoTokenizer, UMT5EncoderModel

    tokenizer = AutoTokenizer.from_pretrained(files.companions["tokenizer"], local_files_only=True)
    return TextEncoder(load_encoder(UMT5EncoderModel, files, dtype, device), tokenizer)


def load_vae(files: ComponentFiles, dtype: dtype, device: device, *, scale: int) -> Any:
    """Load the VAE.

    Raises:
        ModelError: It does not make one latent pixel of ``scale`` pixels each way.
    """
    from diffusers import AutoencoderKLWan

    vae = load_encoder(AutoencoderKLWan, files, dtype, device)
    found = vae.config.scale_factor_spatial
    if found != scale:
        raise ModelError(
            f"{files.folder}: makes latents of 1/{found} of the size, not 1/{scale}; name another VAE (1/16 is that of "
            "Wan2.2-TI2V-5B, family wan_ti2v)"
        )
    return vae


def vae(scale: int) -> ComponentSpec:
    """Return the VAE that makes one latent pixel of this many pixels each way."""
    return ComponentSpec(subfolder="vae", class_name="AutoencoderKLWan", load=partial(load_vae, scale=scale))


def load_dit(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the denoiser."""
    from diffusers import WanTransformer3DModel

    return load_denoiser(WanTransformer3DModel, files, dtype, device)


def build_dit(folder: Path) -> Module:
    """Build the denoiser with new weights."""
    from diffusers import WanTransformer3DModel

    return build_denoiser(WanTransformer3DModel, folder)


def clean(prompt: str) -> str:
    """Return a prompt as diffusers cleans it, but for ftfy, which it calls only where that is installed."""
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt)).strip()).strip()


def encode_text(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one prompt, padded to 512 tokens, and drop what is padding: ``prompt_emb`` [token, channel]."""
    encoder: TextEncoder = components["text_encoder"]
    tokens = encoder.tokenizer(
        [clean(inputs["prompt"])],
        padding="max_length",
        max_length=NUM_TEXT_TOKENS,
        truncation=True,
        return_tensors="pt",
    ).to(encoder.model.device)
    hidden = encoder.model(tokens.input_ids, tokens.attention_mask).last_hidden_state
    return {"prompt_emb": hidden[0, : int(tokens.attention_mask.sum())]}


def note_on_text(components: Components, inputs: Mapping[str, Any]) -> str | None:
    """Tell how many tokens ``encode_text`` cuts off, if any."""
    tokenizer = components["text_encoder"].tokenizer
    # verbose=False: the tokenizer would warn of what is told here
    num_tokens = len(tokenizer(clean(inputs["prompt"]), verbose=False).input_ids)
    num_cut = num_tokens - NUM_TEXT_TOKENS
    return f"truncated, {num_cut} of {num_tokens} tokens were cut off" if num_cut > 0 else None


def to_video(frames: NDArray[np.uint8]) -> Tensor:
    """Return uint8 frames [frame, height, width, 3] as float32 [3, frame, height, width] in [-1, 1]."""
    import torch

    return torch.from_numpy(frames).permute(3, 0, 1, 2).float() / 255.0 * 2.0 - 1.0


def video_latents(vae: Any, video: Tensor) -> Tensor:
    """Encode [3, frame, height, width] into normalised latents, float32 ``LATENT_DIMS``, the posterior's mode."""
    import torch

    mode = vae.encode(video[None].to(vae.device, vae.dtype)).latent_dist.mode()[0].float()
    mean, std = (
        torch.tensor(values, device=mode.device).view(-1, 1, 1, 1)
        for values in (vae.config.latents_mean, vae.config.latents_std)
    )
    latents: Tensor = (mode - mean) * (1.0 / std)
    return latents


def encode_latents(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode the clip that is to be generated: ``latents``."""
    return {"latents": video_latents(components["vae"], to_video(inputs["video"]))}


def encode_framewise(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode each frame of the clip alone, a latent frame of its own: ``latents``."""
    import torch

    frames = to_video(inputs["video"]).split_with_sizes([1] * len(inputs["video"]), dim=1)
    return {"latents": torch.cat([video_latents(components["vae"], frame) for frame in frames], dim=1)}


def num_tokens(latents_shape: Sequence[int]) -> int:
    """Return the number of 1x2x2 patches of latents."""
    frames, height, width = latents_shape[-3:]
    return frames * (height // PATCH) * (width // PATCH)


def text_of(batch: Batch) -> Tensor:
    """Return ``prompt_emb`` padded with zeros to 512 tokens, as the denoiser was trained."""
    import torch

    text, lengths = batch.fields["prompt_emb"], batch.lengths["prompt_emb"]
    is_text = torch.arange(text.shape[1], device=text.device) < lengths.to(text.device)[:, None]
    text = text.masked_fill(~is_text[..., None], 0)
    return torch.nn.functional.pad(text, (0, 0, 0, NUM_TEXT_TOKENS - text.shape[1]))


def unpadded(context: Tensor) -> Tensor:
    """Return a text [token, channel] without the zeros at its end."""
    return context[: int(context.abs().sum(1).nonzero().max()) + 1]


def check_present(shapes: Mapping[str, tuple[int, ...]], field: str, extra_input: str, *, wanted: bool) -> None:
    """Refuse a cache that lacks a field which ``extra_input`` makes, or holds one that the denoiser does not take.

    Raises:
        CacheMismatch: It does.
    """
    if (field in shapes) != wanted:
        problem = "lacks" if wanted else "holds"
        cure = f"{'with' if wanted else 'without'} {extra_input} in extra_inputs"
        raise CacheMismatch(
            f"the cache {problem} {field}, which this denoiser {'needs' if wanted else 'does not take'}; "
            f"run data_process {cure}, or train the model that the cache was made for"
        )


def with_framewise(
    unit: EncodeUnit, encode: Callable[[Components, Mapping[str, Any]], Mapping[str, Tensor]]
) -> EncodeUnit:
    """Return a unit with what encodes in its place under ``framewise_decoding``, for a latent frame of each frame."""
    framewise = replace(unit, encode=encode, recipe={**unit.recipe, "framewise": True})
    return replace(unit, switches={"framewise_decoding": framewise})


def row_noise_unit(num_channels: int, scale: int) -> EncodeUnit:
    """Return ``ModelFamily.noise_unit`` for latents of so many channels and pixels per latent pixel."""

    def unit(frames_per_latent: int) -> EncodeUnit:
        def latents_shape(video: NDArray[np.uint8]) -> tuple[int, ...]:
            num_frames, height, width, _ = video.shape
            return (num_channels, (num_frames - 1) // frames_per_latent + 1, height // scale, width // scale)

        return noise_unit("video", LATENT_DIMS, latents_shape)

    return with_framewise(unit(FRAMES_PER_LATENT), unit(1).encode)


TEXT_ENCODER = ComponentSpec(
    subfolder="text_encoder", class_name="UMT5EncoderModel", load=load_text_encoder, companions=("tokenizer",)
)
DIT = ComponentSpec(
    subfolder="transformer",
    class_name="WanTransformer3DModel",
    load=load_dit,
    build=build_dit,
    lora_layers={"diffusers": {}, "diffsynth": ORIGINAL_LAYERS, "comfyui": ORIGINAL_LAYERS},
)
TEXT_UNIT = EncodeUnit(
    name="text",
    inputs=("prompt",),
    outputs=(FieldSpec(name="prompt_emb", dtype="bfloat16", dims=("token", "channel"), ragged=True),),
    component="text_encoder",
    encode=encode_text,
    note=note_on_text,
    recipe={"clean": "html.unescape twice, spaces", "max_prompt_tokens": NUM_TEXT_TOKENS, "padded": True},
)
LATENTS_UNIT = with_framewise(
    EncodeUnit(
        name="latents",
        inputs=("video",),
        outputs=(FieldSpec(name="latents", dtype="bfloat16", dims=LATENT_DIMS),),
        component="vae",
        encode=encode_latents,
        media={"video": "video"},
        recipe=VIDEO_RECIPE,
    ),
    encode_framewise,
)
BLOCKS: tuple[BlockList, ...] = (BlockList(name="blocks"),)
SCHEDULE = FlowMatchSchedule(shift_type="linear", shift=5.0)
LORA_TARGET_MODULES: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
"""The reference's q, k, v, o, ffn.0 and ffn.2 by their names in diffusers."""


def tiny_tokenizer() -> Any:
    """Build a Unigram model of a few words and ASCII; trained ones differ from one training to the next."""
    from transformers import T5Tokenizer

    words = ["a", "photo", "of", "red", "circle", "on", "the", "white", "table", "three", "blue", "squares", "word"]
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocab += [(f"▁{word}", -1.0) for word in words]
    vocab += [(character, -3.0) for character in ("▁", *map(chr, range(33, 127)))]
    return T5Tokenizer(vocab=vocab, model_max_length=NUM_TEXT_TOKENS)


def tiny_parts(z_dim: int = 16, **vae: Any) -> dict[str, Any]:
    """Build the real classes at the smallest size that keeps every structural constraint, all but the denoiser."""
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler
    from transformers import UMT5Config, UMT5EncoderModel

    tokenizer = tiny_tokenizer()
    text_encoder = UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=64,
            d_kv=16,
            d_ff=128,
            num_layers=2,
            num_heads=4,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder.eval(),
        "vae": AutoencoderKLWan(
            base_dim=8,
            z_dim=z_dim,
            dim_mult=[1, 2, 4, 4],
            num_res_blocks=1,
            temperal_downsample=[False, True, True],
            **vae,
        ).eval(),
        "scheduler": UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
    }


def tiny_dit(in_channels: int, out_channels: int, **changes: Any) -> Any:
    """Build a tiny denoiser."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=(1, PATCH, PATCH),
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=in_channels,
        out_channels=out_channels,
        text_dim=64,
        freq_dim=256,
        ffn_dim=256,
        num_layers=2,
        **changes,
    ).eval()
