"""Samples for any family: a value in memory or a file for every column that its units read."""

from __future__ import annotations

import wave
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image

from diffsynth_pipe.contracts import Batch, ComponentFiles
from diffsynth_pipe.data.samples import needed_columns
from diffsynth_pipe.training.sources import collate

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable
    from pathlib import Path

    from diffsynth_pipe.contracts import Components, EncodeUnit, ModelFamily

PROMPTS = ("", "a red circle", "three blue squares on a white table, 在 soft light")
CELLS = {"seed": 11, "rand_device": "cpu", "num_inference_steps": 3, "cfg_scale": 1}
"""A cell for every column that units parse; a new one needs a line here."""


def media_columns(units: tuple[EncodeUnit, ...]) -> dict[str, str]:
    """Return how each column of files is loaded."""
    media = {column: kind for unit in units for column, kind in unit.media.items()}
    return {
        column: media.get(column, "image")
        for column in needed_columns(units)
        if column != "prompt" and column not in CELLS
    }


def random_media(kind: str, seed: int, height_px: int = 48, width_px: int = 64) -> Any:
    """Return noise as an encode unit gets it: an image, two of different sizes, a video of five frames, 0.5 s of audio.

    The audio is of 16 bits, as a file may have it.
    """
    if kind == "audio":
        return np.random.default_rng(seed).integers(-(2**15), 2**15, 8000).astype(np.float32) / 2**15
    pixels = np.random.default_rng(seed).integers(0, 256, (5, height_px, width_px, 3), dtype=np.uint8)
    if kind == "video":
        return pixels
    if kind == "images":
        return [Image.fromarray(pixels[0]), Image.fromarray(pixels[1].transpose(1, 0, 2))]
    return Image.fromarray(pixels[0])


def units_of(units: Iterable[EncodeUnit]) -> tuple[EncodeUnit, ...]:
    """Return those that take part without being named."""
    return tuple(unit for unit in units if unit.enabled_by is None)


def sample_values(units: tuple[EncodeUnit, ...], prompt: str, seed: int, multiple: int = 16) -> dict[str, Any]:
    """Return a loaded value for every column of one sample, media of 3 x 4 multiples in pixels."""
    size_px = (3 * multiple, 4 * multiple)
    media = {column: random_media(kind, seed, *size_px) for column, kind in media_columns(units).items()}
    return {"prompt": prompt, **media, **CELLS, "seed": CELLS["seed"] + seed}


def write_media(folder: Path, kind: str, seed: int) -> Any:
    """Write ``random_media`` below a folder; return the metadata cell that names it."""
    media = random_media(kind, seed)
    if kind == "audio":
        with wave.open(str(folder / f"{seed}.wav"), "wb") as file:
            file.setparams((1, 2, 16000, len(media), "NONE", ""))
            file.writeframes((media * 2**15).astype("<i2").tobytes())
        return f"{seed}.wav"
    if kind == "video":
        first, *rest = map(Image.fromarray, media)
        first.save(folder / f"{seed}.gif", save_all=True, append_images=rest)
        return f"{seed}.gif"
    images = media if kind == "images" else [media]
    names = [f"{kind}-{seed}-{number}.png" for number in range(len(images))]
    for image, name in zip(images, names, strict=True):
        image.save(folder / name)
    return names if kind == "images" else names[0]


def load_components(family: ModelFamily, repo: Path, dtype: torch.dtype) -> dict[str, Any]:
    """Load the components that a repository holds, on the CPU."""
    loaded = {}
    for name, spec in family.components.items():
        folder = repo / spec.subfolder
        if not folder.is_dir():  # of a unit that must be named
            continue
        companions = {companion: repo / companion for companion in spec.companions}
        files = ComponentFiles(weights=tuple(folder.glob("*.safetensors")), folder=folder, companions=companions)
        loaded[name] = spec.load(files, dtype, torch.device("cpu"))
    return loaded


def batch_of_one(family: ModelFamily, components: Components, values: dict[str, Any]) -> Batch:
    """Encode one sample in the dtype of the components."""
    specs = [spec for unit in units_of(family.units) for spec in unit.outputs]
    with torch.no_grad():
        record = {
            name: value
            for unit in units_of(family.units)
            for name, value in unit.encode(components, {column: values[column] for column in unit.inputs}).items()
        }
    fields, lengths = collate(specs, [record])
    return Batch(fields=fields, lengths=lengths, sample_ids=("0" * 32,), visits=(0,))


def first_call(module: torch.nn.Module, run: Callable[[], Any]) -> tuple[tuple[Any, ...], dict[str, Any], Any]:
    """Return the arguments and the result of the first call of a module while something runs."""
    calls = []
    hook = module.register_forward_hook(
        lambda _module, args, kwargs, output: calls.append((args, kwargs, output)), with_kwargs=True
    )
    with hook:
        run()
    return calls[0]
