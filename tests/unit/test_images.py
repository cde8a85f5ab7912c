import math
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps

from diffsynth_pipe.data.images import ImageInput, TextInput, load_image, read_size_px, target_size_px
from diffsynth_pipe.errors import ConfigError, DataError
from diffsynth_pipe.fingerprint import bytes_digest


def target(width, height, max_pixels=1048576, fixed=(None, None), multiple=16):
    return target_size_px(
        width, height, fixed_height=fixed[0], fixed_width=fixed[1], max_pixels=max_pixels, multiple=multiple
    )


@pytest.mark.parametrize(
    ("width", "height", "max_pixels", "expected"),
    [
        (1024, 1024, 1048576, (1024, 1024)),  # not above the limit: kept
        (640, 427, 1048576, (416, 640)),  # only floored: 427 = 26*16 + 11
        (17, 31, 1048576, (16, 16)),
        (2048, 2048, 1048576, (1024, 1024)),  # scale 2
        (4000, 3000, 1048576, (880, 1168)),  # scale 3.38291; 886.8, 1182.4
        (3000, 4000, 1048576, (1168, 880)),
        (1025, 1024, 1048576, (1008, 1024)),  # scale 1.000488; 1023.5 falls below 64*16, 1024.5 does not
        (512, 512, 65536, (256, 256)),
        (513, 511, 65536, (240, 256)),  # scale 1.999996; 255.5005, 256.5005
        (1999, 1001, 262144, (352, 720)),  # scale 2.762793; 362.3, 723.5
    ],
)
def test_sizes_worked_out_by_hand(width, height, max_pixels, expected):
    assert target(width, height, max_pixels) == expected


def test_a_dynamic_size_fits_the_limit_and_never_grows():
    for width in range(16, 2000, 97):
        for height in range(16, 2000, 89):
            for max_pixels in (256 * 256, 1024 * 1024):
                got_height, got_width = target(width, height, max_pixels)
                assert got_height * got_width <= max_pixels
                assert got_height <= height
                assert got_width <= width
                # The exact side lies less than one multiple (and one pixel of truncation) above.
                shrink = min(1.0, math.sqrt(max_pixels / (width * height)))
                assert got_height % 16 == got_width % 16 == 0
                assert height * shrink - got_height < 17
                assert width * shrink - got_width < 17


def test_fixed_size_is_taken_as_it_is():
    assert target(100, 3000, max_pixels=256, fixed=(512, 384)) == (512, 384)
    with pytest.raises(ConfigError, match="height: 500 is not a multiple of 16; use 496"):
        target(100, 100, fixed=(500, 512))
    with pytest.raises(ConfigError, match="width: 5 is not a multiple of 16; use 16"):
        target(100, 100, fixed=(512, 5))


@pytest.mark.parametrize(("width", "height"), [(15, 400), (400, 15), (100000, 20)])
def test_a_side_of_zero_is_refused(width, height):
    with pytest.raises(DataError, match=f"{width}x{height} px leave a side below 16 px"):
        target(width, height)


def photo(width, height, seed=0):
    """Smooth and sharp structure together."""
    y, x = np.mgrid[0:height, 0:width]
    noise = np.random.default_rng(seed).integers(0, 256, (height, width))
    channels = [x * 255 // max(1, width - 1), (x // 3 + y // 2) % 2 * 255, noise]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def saved(path, image, **options):
    image.save(path, **options)
    return path


def triangle_weights(size, new_size):
    """Weights [new_size, size] of an antialiased linear resize: a triangle as wide as one new pixel, or one old one."""
    scale = size / new_size
    centres = (np.arange(new_size) + 0.5) * scale
    distances = np.abs(np.arange(size)[None, :] + 0.5 - centres[:, None])
    weights = np.clip(1 - distances / max(scale, 1.0), 0, None)
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize(
    ("size", "height", "width", "scaled", "offset"),
    # scaled (height, width) covers the target with its tighter side equal; offset (top, left) is half the rest.
    [
        ((100, 60), 48, 64, (48, 80), (0, 8)),
        ((60, 100), 48, 48, (80, 48), (16, 0)),
        ((50, 45), 32, 32, (32, 36), (0, 2)),
        ((20, 17), 32, 32, (32, 38), (0, 3)),  # grows; 20 * 32/17 = 37.6
        ((35, 32), 32, 32, (32, 35), (0, 2)),  # 1.5 rounds to even: 2
        ((37, 32), 32, 32, (32, 37), (0, 2)),  # 2.5 rounds to even: 2
        ((64, 48), 48, 64, (48, 64), (0, 0)),
    ],
)
def test_pixels_match_a_triangle_filter_and_a_centre_crop(tmp_path, size, height, width, scaled, offset):
    image = photo(*size)
    got = load_image(saved(tmp_path / "a.png", image), height, width, apply_exif=True)
    pixels = np.asarray(image, dtype=np.float64)
    rows, columns = triangle_weights(size[1], scaled[0]), triangle_weights(size[0], scaled[1])
    resized = np.einsum("yh,xw,hwc->yxc", rows, columns, pixels)
    expected = resized[offset[0] : offset[0] + height, offset[1] : offset[1] + width]
    assert (got.mode, got.size) == ("RGB", (width, height))
    # PIL rounds to bytes after each of its two passes.
    assert np.abs(np.asarray(got) - expected).max() < 1.001


def stored_as(upright, orientation):
    """What a camera stores for an upright image, from the meaning of the tag: where row 0 and column 0 are shown."""
    pixels = np.asarray(upright)
    stored = {
        1: pixels,  # row 0 top, column 0 left
        2: pixels[:, ::-1],  # top, right
        3: pixels[::-1, ::-1],  # bottom, right
        4: pixels[::-1],  # bottom, left
        5: pixels.transpose(1, 0, 2),  # left, top
        6: pixels[:, ::-1].transpose(1, 0, 2),  # right, top
        7: pixels[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: pixels[::-1].transpose(1, 0, 2),  # left, bottom
    }[orientation]
    return Image.fromarray(np.ascontiguousarray(stored))


@pytest.mark.parametrize("suffix", ["png", "webp"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path, orientation, suffix):
    upright = photo(48, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if suffix == "webp" else {}
    stored = stored_as(upright, orientation)
    path = saved(tmp_path / f"a.{suffix}", stored, exif=exif, **options)
    with Image.open(path) as image:
        assert ImageOps.exif_transpose(image).tobytes() == upright.tobytes(), "the test itself stores it wrongly"
    assert read_size_px(path, apply_exif=True) == (48, 32)
    assert load_image(path, 32, 48, apply_exif=True).tobytes() == upright.tobytes()
    assert read_size_px(path, apply_exif=False) == stored.size
    width, height = stored.size
    assert load_image(path, height, width, apply_exif=False).tobytes() == stored.tobytes()


@pytest.mark.parametrize("apply_exif", [True, False])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_tiff_is_always_upright(tmp_path, orientation, apply_exif):
    """PIL itself applies the orientation of this format, so the reference sees it upright too."""
    upright = photo(48, 32)
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.tiff", stored_as(upright, orientation), exif=exif)
    assert read_size_px(path, apply_exif) == (48, 32)
    assert load_image(path, 32, 48, apply_exif).tobytes() == upright.tobytes()


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_an_invalid_orientation_is_upright(tmp_path, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = saved(tmp_path / "a.png", photo(48, 32), exif=exif)
    assert read_size_px(path, apply_exif=True) == (48, 32)
    assert load_image(path, 32, 48, apply_exif=True).tobytes() == photo(48, 32).tobytes()


def late_exif_png(path, orientation):
    """A PNG whose eXIf chunk stands after the pixels, where a header does not tell it."""
    saved(path, photo(48, 32))
    payload = b"II*\0\x08\0\0\0" + struct.pack("<HHHIHHI", 1, 0x0112, 3, 1, orientation, 0, 0)
    chunk = struct.pack(">I", len(payload)) + b"eXIf" + payload + struct.pack(">I", zlib.crc32(b"eXIf" + payload))
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])
    return path


def test_size_and_pixels_agree_on_an_orientation_after_the_pixels(tmp_path):
    path = late_exif_png(tmp_path / "a.png", 6)
    with Image.open(path) as image:
        image.load()
        assert ImageOps.exif_transpose(image).size == (32, 48), "the test itself wrote no such chunk"
    width, height = read_size_px(path, apply_exif=True)
    pixels = load_image(path, height, width, apply_exif=True)
    # Sized from the header: what matters is that an image is never turned one way and sized the other.
    assert pixels.tobytes() == photo(48, 32).tobytes()


GREY = np.linspace(0, 255, 32 * 48).astype(np.uint8).reshape(32, 48)


@pytest.mark.parametrize(
    ("name", "image", "expected"),
    [
        ("grey.png", Image.fromarray(GREY), GREY),
        ("bilevel.png", Image.fromarray(GREY).convert("1", dither=Image.Dither.NONE), (GREY >= 128) * 255),
        ("grey16.png", Image.fromarray(GREY.astype(np.uint16) * 256 + 77), GREY),
        ("grey16.tiff", Image.fromarray(GREY.astype(np.uint16) * 256 + 77), GREY),
        ("palette.png", Image.fromarray(GREY).convert("P"), GREY),
        ("grey_alpha.png", Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(255 - GREY)]), GREY),
        ("rgba.png", Image.merge("RGBA", [Image.fromarray(GREY)] * 3 + [Image.new("L", (48, 32), 0)]), GREY),
        ("cmyk.tiff", Image.merge("CMYK", [Image.fromarray(255 - GREY)] * 3 + [Image.new("L", (48, 32), 0)]), GREY),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_every_mode_becomes_rgb(tmp_path, name, image, expected):
    got = np.asarray(load_image(saved(tmp_path / name, image), 32, 48, apply_exif=True))
    assert got.shape == (32, 48, 3)
    assert np.array_equal(got, np.repeat(expected[:, :, None], 3, axis=2))


@pytest.mark.parametrize("mode", ["I", "F"])
def test_a_mode_without_a_range_is_refused(tmp_path, mode):
    path = saved(tmp_path / "a.tiff", Image.new(mode, (48, 32), 3))
    with pytest.raises(DataError, match=f"a.tiff: .*mode '{mode}' has no fixed range"):
        load_image(path, 32, 48, apply_exif=True)


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_a_truncated_file_is_refused(tmp_path, suffix):
    path = saved(tmp_path / f"a.{suffix}", photo(200, 200))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(DataError, match=rf"a\.{suffix}: is not an image that can be decoded") as caught:
        load_image(path, 32, 48, apply_exif=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff"])
def test_what_is_not_an_image_is_refused(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    for read in (lambda: read_size_px(path, apply_exif=True), lambda: load_image(path, 32, 48, apply_exif=True)):
        with pytest.raises(DataError, match=r"a\.jpg: is not an image that can be decoded"):
            read()


def test_a_decompression_bomb_is_refused(tmp_path):
    ihdr = struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", len(ihdr)) + b"IHDR" + ihdr + struct.pack(">I", zlib.crc32(b"IHDR" + ihdr))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunk + b"\0\0\0\0IDAT\x35\xaf\x06\x1e")
    with pytest.raises(DataError, match=r"a\.png: .*3600000000 pixels"):
        read_size_px(tmp_path / "a.png", apply_exif=True)


def test_missing_file_and_folder_are_told_apart_from_broken_ones(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jpg: cannot be read \(No such file or directory\)"):
        read_size_px(tmp_path / "nowhere.jpg", apply_exif=True)
    with pytest.raises(DataError, match=r"cannot be read \(Is a directory\)"):
        load_image(tmp_path, 32, 48, apply_exif=True)


def image_input(path, **changes):
    attributes = {
        "path": path,
        "media_digest": bytes_digest(path.read_bytes()),
        "height": 32,
        "width": 48,
        "apply_exif": True,
        "label": "metadata.csv row 12 (a.png)",
    }
    return ImageInput(**(attributes | changes))


def test_an_input_digest_covers_what_decides_the_pixels(tmp_path):
    path = saved(tmp_path / "a.png", photo(48, 32))
    digests = [
        image_input(path).digest,
        image_input(path, media_digest="0" * 32).digest,
        image_input(path, height=48).digest,
        image_input(path, width=32).digest,
        image_input(path, height=48, width=32).digest,
        image_input(path, apply_exif=False).digest,
    ]
    assert len(set(digests)) == len(digests)
    moved = saved(tmp_path / "b.png", photo(48, 32))
    assert image_input(moved, label="elsewhere").digest == digests[0]
    assert image_input(path).load().tobytes() == photo(48, 32).tobytes()


def test_a_file_that_changed_since_it_was_digested_is_refused(tmp_path):
    path = saved(tmp_path / "a.png", photo(48, 32))
    listed = image_input(path)
    saved(path, photo(48, 32, seed=1))
    with pytest.raises(DataError, match=r"^metadata\.csv row 12 \(a\.png\): .*a\.png: changed since it was listed"):
        listed.load()


def test_text_input():
    assert TextInput("a cat").load() == "a cat"
    assert len({TextInput(text).digest for text in ("", " ", "a cat", "a cat ", "A cat")}) == 5
