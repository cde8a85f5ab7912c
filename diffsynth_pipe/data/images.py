"""Images: the size they are trained at, and the pixels of that size."""

from __future__ import annotations

import struct
from contextlib import contextmanager
from dataclasses import dataclass
from io import BytesIO
from typing import TYPE_CHECKING, Any

from PIL import Image

from diffsynth_pipe.errors import ConfigError, DataError
from diffsynth_pipe.fingerprint import bytes_digest, json_digest

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RULE_VERSION = 1
"""Bumped by hand when the same file, size and flags give other pixels."""

ORIENTATION_TAG = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What turns an image of each EXIF orientation upright."""
SIDEWAYS = range(5, 9)


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageInput:
    """An image file and the size it is encoded at.

    Attributes:
        path: The file.
        media_digest: Digest of its bytes.
        height: In pixels.
        width: In pixels.
        apply_exif: Turn it upright as its EXIF orientation says.
        label: Names the metadata row in messages.
    """

    path: Path
    media_digest: str
    height: int
    width: int
    apply_exif: bool
    label: str

    @property
    def digest(self) -> str:
        """Hex digest of the file's bytes and of the rule that makes pixels of them."""
        return json_digest([self.media_digest, self.height, self.width, self.apply_exif, RULE_VERSION])

    def load(self) -> Image.Image:
        """Return the pixels, RGB of ``width`` x ``height``.

        Raises:
            DataError: The file cannot be decoded, or is not the one that was digested.
        """
        try:
            data = _read_bytes(self.path)
            if bytes_digest(data) != self.media_digest:
                raise DataError(f"{self.path}: changed since it was listed; run again when nothing writes to it")
            return _decode(self.path, data, self.height, self.width, self.apply_exif)
        except DataError as error:
            raise DataError(f"{self.label}: {error}") from error


@dataclass(frozen=True, slots=True)
class ImagesInput:
    """Several images of one cell; a list of one is not the same as one image."""

    images: tuple[ImageInput, ...]

    @property
    def digest(self) -> str:
        """Hex digest of the images' digests."""
        return json_digest([image.digest for image in self.images])

    def load(self) -> list[Image.Image]:
        """Return the pixels of each.

        Raises:
            DataError: As that of an image.
        """
        return [image.load() for image in self.images]


@dataclass(frozen=True, slots=True)
class ValueInput:
    """A JSON value."""

    value: Any

    @property
    def digest(self) -> str:
        """Hex digest of the value."""
        return json_digest(self.value)

    def load(self) -> Any:
        """Return the value."""
        return self.value


@dataclass(frozen=True, slots=True)
class TextInput:
    """A text, taken as it is."""

    text: str

    @property
    def digest(self) -> str:
        """Hex digest of the text."""
        return json_digest(self.text)

    def load(self) -> str:
        """Return the text."""
        return self.text


def target_size_px(
    width: int, height: int, *, fixed_height: int | None, fixed_width: int | None, max_pixels: int, multiple: int
) -> tuple[int, int]:
    """Return the (height, width) in pixels at which an image is trained, by DiffSynth-Studio's ``ImageCropAndResize``.

    A fixed size is taken as it is. Without one, an image of more than ``max_pixels`` is scaled down to that area, a
    smaller one keeps its size, and both sides are then cut down to a multiple.

    Raises:
        ConfigError: The fixed size is not a multiple.
        DataError: A side would become zero.
    """
    if fixed_height is not None and fixed_width is not None:
        for name, side in (("height", fixed_height), ("width", fixed_width)):
            if side % multiple:
                nearest = max(1, round(side / multiple)) * multiple
                raise ConfigError(f"{name}: {side} is not a multiple of {multiple}; use {nearest}")
        return fixed_height, fixed_width
    target_height, target_width = height, width
    if width * height > max_pixels:
        # Not math.sqrt: the same float operations as the reference give the same pixel.
        scale = (width * height / max_pixels) ** 0.5
        target_height, target_width = int(height / scale), int(width / scale)
    target_height, target_width = target_height // multiple * multiple, target_width // multiple * multiple
    if not target_height or not target_width:
        raise DataError(f"{width}x{height} px leave a side below {multiple} px; remove the image or raise max_pixels")
    return target_height, target_width


def read_size_px(path: Path, apply_exif: bool) -> tuple[int, int]:
    """Return an image's (width, height) in pixels, upright if EXIF applies, from the header of the file.

    Raises:
        DataError: The file is not an image.
    """
    with decoding_errors(path), Image.open(path) as image:
        width, height = image.size
        return (height, width) if apply_exif and _orientation(image) in SIDEWAYS else (width, height)


def load_image(path: Path, height: int, width: int, apply_exif: bool) -> Image.Image:
    """Return an image as RGB of this size: scaled (bilinear, antialiased) to cover it, then cropped at its centre.

    Raises:
        DataError: The file cannot be decoded.
    """
    return _decode(path, _read_bytes(path), height, width, apply_exif)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error


def _decode(path: Path, data: bytes, height: int, width: int, apply_exif: bool) -> Image.Image:
    with decoding_errors(path), Image.open(BytesIO(data)) as image:
        orientation = _orientation(image) if apply_exif else 1
        rgb = _to_rgb(image)
    if orientation in UPRIGHT:
        rgb = rgb.transpose(UPRIGHT[orientation])
    return cover(rgb, height, width)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        import numpy as np

        # PIL would clip 16 bits at 255. The high byte is what it keeps of 16-bit RGB.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise ValueError(f"mode {image.mode!r} has no fixed range; save it with 8 or 16 bits per channel")
    return image.convert("RGB")


def cover(image: Image.Image, height: int, width: int) -> Image.Image:
    """Return an image scaled (bilinear, antialiased) to cover a size, then cropped at its centre."""
    scale = max(width / image.width, height / image.height)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BILINEAR)
    # torchvision's center_crop rounds halves to even.
    top, left = round((image.height - height) / 2), round((image.width - width) / 2)
    return image.crop((left, top, left + width, top + height))


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation that is still to be applied, from the header of the file alone."""
    if image.format == "TIFF":  # PIL turns it by itself
        return 1
    # PngImageFile.getexif would decode the whole file in search of a chunk after the pixels.
    return int(Image.Image.getexif(image).get(ORIENTATION_TAG, 1))


@contextmanager
def decoding_errors(path: Path) -> Iterator[None]:
    """Tell in one line what goes wrong while PIL decodes a file."""
    try:
        yield
    except (OSError, SyntaxError, ValueError, EOFError, struct.error, Image.DecompressionBombError) as error:
        if isinstance(error, OSError) and error.strerror:
            raise _unreadable(path, error) from error
        raise DataError(f"{path}: is not an image that can be decoded ({error}); replace or remove it") from error


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); check dataset_base_path and the metadata")
