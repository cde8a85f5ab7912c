"""Videos: which frames a clip is made of, and their pixels; decoded from the first frame on, one clip at a time."""

from __future__ import annotations

import itertools
from contextlib import closing, contextmanager
from dataclasses import dataclass
from fractions import Fraction
from os import SEEK_CUR
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
from PIL import Image, ImageSequence, UnidentifiedImageError

from diffsynth_pipe.data.images import cover, decoding_errors
from diffsynth_pipe.errors import ConfigError, DataError
from diffsynth_pipe.fingerprint import file_digest, json_digest

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Iterator
    from pathlib import Path

    from numpy.typing import NDArray

    from diffsynth_pipe.data.images import ImageInput

RULE_VERSION = 1
"""Bumped by hand when the same file, size and flags give other pixels."""

FRAMES_PER_LATENT = 4
"""Causal video VAEs make one latent frame of the first frame, and one of every four that follow."""

_EBML_ID, _SEGMENT_ID = bytes.fromhex("1A45DFA3"), bytes.fromhex("18538067")
"""What a Matroska file, and all of it behind its header, begin with."""

TURNS = {90: Image.Transpose.ROTATE_90, 180: Image.Transpose.ROTATE_180, 270: Image.Transpose.ROTATE_270}
"""What turns a frame upright, by the degrees of its display matrix, counterclockwise."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VideoInput:
    """The first frames of a video file, and the size they are encoded at.

    Attributes:
        path: The file.
        media_digest: Digest of its bytes.
        height: In pixels.
        width: In pixels.
        num_frames: Of the clip.
        frame_rate: Frames per second that are taken by their timestamps; None: all frames, one after the other.
        apply_exif: Turn frames upright as the container says.
        label: Names the metadata row in messages.
    """

    path: Path
    media_digest: str
    height: int
    width: int
    num_frames: int
    frame_rate: float | None
    apply_exif: bool
    label: str

    @property
    def digest(self) -> str:
        """Hex digest of the file's bytes and of the rule that makes pixels of them."""
        size = [self.num_frames, self.height, self.width]
        return json_digest([self.media_digest, size, self.frame_rate, self.apply_exif, "video", RULE_VERSION])

    def load(self) -> NDArray[np.uint8]:
        """Return the pixels, RGB ``[frame, height, width, 3]``; one decoded frame is held beside them.

        Raises:
            DataError: The file cannot be decoded, or is not the one that was digested.
        """
        try:
            if file_digest(self.path) != self.media_digest:
                raise DataError(f"{self.path}: changed since it was listed; run again when nothing writes to it")
            return load_video(
                self.path, self.height, self.width, self.num_frames, self.frame_rate, apply_exif=self.apply_exif
            )
        except DataError as error:
            raise DataError(f"{self.label}: {error}") from error


@dataclass(frozen=True, slots=True)
class StillInput:
    """An image as a video of one frame."""

    image: ImageInput

    @property
    def digest(self) -> str:
        """Hex digest of the image."""
        return self.image.digest

    def load(self) -> NDArray[np.uint8]:
        """Return the pixels ``[1, height, width, 3]``.

        Raises:
            DataError: As that of an image.
        """
        return np.asarray(self.image.load())[None]


@dataclass(frozen=True, slots=True)
class VideoSize:
    """What a video file holds: the size of its frames in pixels, upright, and how many frames its clip has."""

    width: int
    height: int
    num_frames: int


def check_num_frames(num_frames: int, frames_per_latent: int) -> None:
    """Refuse a number of frames that is no whole number of latent frames.

    Raises:
        ConfigError: It is not.
    """
    if (num_frames - 1) % frames_per_latent:
        raise ConfigError(
            f"num_frames: {num_frames} is not a multiple of {frames_per_latent} plus 1; "
            f"use {round((num_frames - 1) / frames_per_latent) * frames_per_latent + 1}"
        )


def is_image(path: Path) -> bool:
    """Say whether a file is an image and no video, by its first bytes; a GIF is a video.

    Raises:
        DataError: The file cannot be read.
    """
    return _image_format(path) not in {None, "GIF", "MPEG"}


def _image_format(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            return image.format
    except UnidentifiedImageError:
        return None
    except OSError as error:
        raise _unreadable(path, error) from error


def read_video_size(
    path: Path,
    num_frames: int,
    frame_rate: float | None,
    frames_per_latent: int = FRAMES_PER_LATENT,
    *,
    apply_exif: bool,
) -> VideoSize:
    """Measure a video: the first frame is decoded, and packets are counted, as headers may lie or keep silent.

    The clip has ``num_frames`` frames, or of a shorter video as many as are a multiple of ``frames_per_latent`` plus 1.
    With ``frame_rate`` a video has as many frames as its duration has periods.

    Raises:
        DataError: The file is no video, holds no frame, or ends early.
    """
    if _image_format(path) == "GIF":
        return _gif_size(path, num_frames, frame_rate, frames_per_latent)
    first: Any = None
    num_packets = num_shown = 0
    times: list[Fraction] = []
    end = Fraction(0)
    with _opened(path) as (container, stream):
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream is not stream:
                continue
            if packet.is_corrupt:
                raise _damaged(path, f"frame {num_packets + 1} is cut off")
            first = first or next(iter(packet.decode()), None)
            num_packets += packet.size > 0
            if packet.size and not packet.is_discard:
                num_shown += 1
                if packet.pts is not None:
                    # not end, which is that of the sound too
                    times += (packet.pts * packet.time_base, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if first and frame_rate is None and num_shown >= num_frames:
                break
        else:
            # An AVI also counts the frames that were dropped, which have no bytes.
            num_declared = 0 if container.format.name == "avi" else stream.frames
            _check_end(path, container, num_declared, num_packets, end)
    if first is None:
        raise DataError(f"{path}: holds no frame that can be decoded; replace or remove it")
    if frame_rate is not None:
        num_shown = int((max(times) - min(times)) * Fraction(frame_rate)) if times else 1
    width, height = first.width, first.height
    if apply_exif and first.rotation % 180:
        width, height = height, width
    return VideoSize(width, height, _clip_length(num_shown, num_frames, frames_per_latent))


def _clip_length(num_shown: int, num_frames: int, frames_per_latent: int) -> int:
    return (max(1, min(num_frames, num_shown)) - 1) // frames_per_latent * frames_per_latent + 1


def _gif_size(path: Path, num_frames: int, frame_rate: float | None, frames_per_latent: int) -> VideoSize:
    with closing(_gif_frames(path)) as frames:
        for num_shown, frame in enumerate(frames, start=1):  # noqa: B007 - the last one is wanted
            if frame_rate is None and num_shown == num_frames:
                break
    duration = (frame.pts + frame.duration) * frame.time_base
    if frame_rate is not None:
        num_shown = int(duration * Fraction(frame_rate))
    return VideoSize(*frame.image.size, _clip_length(num_shown, num_frames, frames_per_latent))


@dataclass(frozen=True, slots=True)
class _GifFrame:
    """A frame of a GIF, with what is used of PyAV's; times in milliseconds."""

    image: Image.Image
    pts: int
    duration: int
    time_base: Fraction = Fraction(1, 1000)
    rotation: int = 0
    is_corrupt: bool = False

    def to_ndarray(self, format: str) -> NDArray[np.uint8]:  # noqa: ARG002 - PyAV's name
        """Return the pixels as RGB."""
        return np.asarray(self.image.convert("RGB"))


def _gif_frames(path: Path) -> Generator[_GifFrame]:
    """Decode a GIF with PIL: FFmpeg 8 takes some, such as noise, for one frame."""
    time_ms = 0
    with decoding_errors(path), Image.open(path) as image:
        for frame in ImageSequence.Iterator(image):
            duration_ms = int(frame.info.get("duration") or 100)  # without one players take a tenth of a second
            yield _GifFrame(frame.convert("RGB"), time_ms, duration_ms)
            time_ms += duration_ms


def _check_end(path: Path, container: Any, num_declared: int, num_packets: int, end: Fraction) -> None:
    """Refuse a file that ends before its header says; by a second where only the duration tells, as in Matroska."""
    if num_packets < num_declared:
        raise _damaged(path, f"its header tells of {num_declared} frames, but {num_packets} are there")
    if "matroska" in container.format.name and (missing := _missing_matroska_bytes(path)):
        raise _damaged(path, f"its last {missing} bytes are cut off")
    duration = Fraction(container.duration or 0, 1_000_000)
    if end and end < duration - 1:
        raise _damaged(path, f"its header tells of {float(duration):.3g} s, but {float(end):.3g} s are there")


def _missing_matroska_bytes(path: Path) -> int:
    """Return how many bytes a Matroska or WebM file lacks of its segment (RFC 9559); 0 if that tells no size.

    FFmpeg takes the end of the file for the end of the video.
    """

    def read_size(file: BinaryIO) -> int | None:
        first = file.read(1)[0]
        length = 9 - first.bit_length()
        size = int.from_bytes(bytes([first & (0xFF >> length)]) + file.read(length - 1), "big")
        return None if size == (1 << 7 * length) - 1 else size

    with path.open("rb") as file:
        file.seek(len(_EBML_ID))
        file.seek(read_size(file) or 0, SEEK_CUR)
        size = read_size(file) if file.read(len(_SEGMENT_ID)) == _SEGMENT_ID else None
        return 0 if size is None else max(0, file.tell() + size - path.stat().st_size)


def load_video(
    path: Path, height: int, width: int, num_frames: int, frame_rate: float | None = None, *, apply_exif: bool
) -> NDArray[np.uint8]:
    """Return the first frames of a video, each scaled and cropped as an image, uint8 ``[frame, height, width, 3]``.

    Alpha is dropped, and more than 8 bits are rounded to 8. Decoding ends with the last frame that is needed.

    Raises:
        DataError: The file cannot be decoded, or has fewer frames.
    """
    clip = np.empty((num_frames, height, width, 3), np.uint8)
    num_done = 0
    with _frames(path) as frames:
        if frame_rate is not None:
            frames = _at_rate(path, frames, Fraction(frame_rate))
        for frame in itertools.islice(frames, num_frames):
            if frame.is_corrupt:
                raise _damaged(path, f"frame {num_done + 1} is damaged")
            image = Image.fromarray(frame.to_ndarray(format="rgb24"))
            if apply_exif and frame.rotation % 360 in TURNS:
                image = image.transpose(TURNS[frame.rotation % 360])
            clip[num_done] = np.asarray(cover(image, height, width))
            num_done += 1
    if num_done < num_frames:
        raise _damaged(path, f"{num_done} of its {num_frames} frames can be decoded")
    return clip


def _at_rate(path: Path, frames: Iterable[Any], frame_rate: Fraction) -> Iterator[Any]:
    """Yield the frame that is shown nearest to each i / frame_rate seconds; the last one for all later times.

    Of two as near the one with the even index is taken, as the reference rounds i / frame_rate * raw_fps.
    """
    start: Fraction | None = None
    last: tuple[int, Fraction, Any] | None = None
    num_taken = 0
    for index, frame in enumerate(frames):
        if frame.pts is None:
            raise DataError(f"{path}: its frames have no timestamps; set fix_frame_rate to false, or store it as mp4")
        time = frame.pts * frame.time_base
        start = time if start is None else start
        while time - start >= (wanted := num_taken / frame_rate):
            after, before = time - start - wanted, wanted - (last[1] - start) if last else None
            is_earlier = before is not None and (before < after or (before == after and index % 2 == 1))
            yield last[2] if last and is_earlier else frame
            num_taken += 1
        last = (index, time, frame)
    while last:
        yield last[2]


@contextmanager
def _frames(path: Path) -> Iterator[Iterable[Any]]:
    if _image_format(path) == "GIF":
        with closing(_gif_frames(path)) as frames:
            yield frames
    else:
        with _opened(path) as (container, stream):
            yield container.decode(stream)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """Open a file and yield its container and its video stream; what goes wrong is told in one line."""
    import av
    from av.error import FFmpegError

    try:
        with av.open(str(path)) as container:
            streams = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
            if not streams:
                raise DataError(f"{path}: has no video stream; replace or remove it")
            yield container, streams[0]
    except FileNotFoundError as error:
        raise _unreadable(path, error) from error
    except FFmpegError as error:
        raise _damaged(path, error.strerror or str(error)) from error


def _damaged(path: Path, reason: str) -> DataError:
    return DataError(f"{path}: is not a whole video that can be decoded ({reason}); replace or remove it")


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); check dataset_base_path and the metadata")
