"""Fields that families make, and check, alike."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from cache_store.contract import FieldSpec
from diffsynth_pipe.contracts import EncodeUnit
from diffsynth_pipe.errors import CacheMismatch, DataError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from PIL.Image import Image
    from torch import Tensor

    from diffsynth_pipe.contracts import Components


def to_pixels(image: Image) -> Tensor:
    """Return an RGB image as float32 [3, height, width] in [-1, 1]."""
    import numpy as np
    import torch

    pixels_hwc = np.asarray(image, dtype=np.float32) / 255.0
    return torch.from_numpy(pixels_hwc.transpose(2, 0, 1)) * 2.0 - 1.0


def to_pixel_batch(image: Image) -> Tensor:
    """Return ``to_pixels`` with a batch dimension, channels last in memory.

    diffusers' image processor lays pixels out so, and convolutions have other bits on other strides.
    """
    return to_pixels(image).permute(1, 2, 0)[None].permute(0, 3, 1, 2)


def note_on_truncation(tokenizer: Any, text: str, max_tokens: int, *, add_special_tokens: bool = True) -> str | None:
    """Tell how many tokens of a text are cut off, if any."""
    # verbose=False: the tokenizer would warn of what is told here
    num_tokens = len(tokenizer(text, add_special_tokens=add_special_tokens, verbose=False).input_ids)
    num_cut = num_tokens - max_tokens
    return f"truncated, {num_cut} of {num_tokens} tokens were cut off" if num_cut > 0 else None


def noise_unit(column: str, dims: tuple[str, ...], latents_shape: Callable[[Any], tuple[int, ...]]) -> EncodeUnit:
    """Return the unit that draws the noise which a row's ``seed`` and ``rand_device`` stand for.

    It is drawn in float32 and rounded to bfloat16 when it is stored, as the reference does. diffusers' pipelines draw
    in their own dtype; in bfloat16 torch's CPU rounds the same float32 numbers, as 16 divides their count. CUDA draws
    others than the CPU for the same seed.

    Args:
        column: The media column that the latents are made of.
        dims: The dimensions of the latents.
        latents_shape: Maps the loaded media to the shape of its latents.
    """

    def encode(_: Components, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        import torch

        device = inputs["rand_device"]
        if device == "cuda" and not torch.cuda.is_available():
            raise DataError(
                "rand_device: 'cuda', but there is none here; write cpu if the teacher drew its noise there"
            )
        generator = torch.Generator(device).manual_seed(inputs["seed"])
        shape = latents_shape(inputs[column])
        return {"noise": torch.randn(shape, generator=generator, device=device, dtype=torch.float32)}

    return EncodeUnit(
        name="noise",
        inputs=(column, "seed", "rand_device"),
        outputs=(FieldSpec(name="noise", dtype="bfloat16", dims=dims),),
        component=None,
        encode=encode,
        parse={"seed": _parse_seed, "rand_device": _parse_rand_device},
        recipe={"draw": "torch.randn in float32"},
    )


def check_channels(shapes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, int]]) -> None:
    """Refuse cached fields whose channels are not those of the denoiser.

    Args:
        shapes: As ``ModelFamily.check_fields`` gets them.
        expected: For each field that may be there, the axis of its channels and their number.

    Raises:
        CacheMismatch: A number differs.
    """
    for name, (axis, count) in expected.items():
        if name in shapes and shapes[name][axis] != count:
            raise CacheMismatch(
                f"the cache holds {name} with {shapes[name][axis]} channels, but the denoiser takes {count}; "
                "train the model that the cache was made for, or run data_process with this one"
            )


def _parse_seed(cell: Any) -> int:
    try:
        seed = int(str(cell))
    except ValueError:
        seed = -1
    if not 0 <= seed < 2**63:
        message = "a whole number from 0 to 2^63-1"
        raise ValueError(message)
    return seed


def _parse_rand_device(cell: Any) -> str:
    """Read the kind of a device; its number does not change what it draws."""
    kind, _, number = str(cell).strip().partition(":")
    if kind not in ("cpu", "cuda") or not (number or "0").isdigit():
        message = "cpu, cuda or cuda:<number>"
        raise ValueError(message)
    return kind
