"""The image VAE that FLUX.1 and Z-Image share: 16 channels at an eighth of the size, shifted and scaled."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import ComponentSpec, EncodeUnit
from diffsynth_pipe.modeling.fields import noise_unit, to_pixel_batch
from diffsynth_pipe.modeling.loading import load_encoder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor, device, dtype

    from diffsynth_pipe.contracts import ComponentFiles, Components

LATENT_DIMS = ("channel", "height", "width")


def load_vae(files: ComponentFiles, dtype: dtype, device: device) -> Any:
    """Load the VAE."""
    from diffusers import AutoencoderKL

    return load_encoder(AutoencoderKL, files, dtype, device)


def encode_latents(components: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Encode one RGB image into normalised latents: ``latents`` [16, height/8, width/8], the posterior's mode."""
    vae = components["vae"]
    mode = vae.encode(to_pixel_batch(inputs["image"]).to(vae.device, vae.dtype)).latent_dist.mode()[0]
    return {"latents": (mode - vae.config.shift_factor) * vae.config.scaling_factor}


VAE = ComponentSpec(subfolder="vae", class_name="AutoencoderKL", load=load_vae)
LATENTS_UNIT = EncodeUnit(
    name="latents",
    inputs=("image",),
    outputs=(FieldSpec(name="latents", dtype="bfloat16", dims=LATENT_DIMS),),
    component="vae",
    encode=encode_latents,
    recipe={"pixels": "x/255*2-1 in float32", "posterior": "mode", "normalization": "(z-shift)*scale"},
)
NOISE_UNIT = noise_unit("image", LATENT_DIMS, lambda image: (16, image.height // 8, image.width // 8))


def tiny_vae() -> Any:
    """Build the VAE at the smallest size, with its real shift and scale."""
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(16, 32, 32, 32),
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        use_quant_conv=False,
        use_post_quant_conv=False,
        scaling_factor=0.3611,
        shift_factor=0.1159,
    )
