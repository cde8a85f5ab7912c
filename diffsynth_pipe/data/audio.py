"""Audio: the samples of a file, at one rate."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING

import numpy as np

from diffsynth_pipe.contracts import AUDIO_SAMPLE_RATE
from diffsynth_pipe.errors import DataError
from diffsynth_pipe.fingerprint import file_digest, json_digest

if TYPE_CHECKING:
    from pathlib import Path

    from numpy.typing import NDArray

RULE_VERSION = 1
"""Bumped by hand when the same file gives other samples."""

MIN_SECONDS = 0.1
"""wav2vec 2.0 makes no feature of less."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AudioInput:
    """The audio of a file.

    Attributes:
        path: The file.
        media_digest: Digest of its bytes.
        label: Names the metadata row in messages.
    """

    path: Path
    media_digest: str
    label: str

    @property
    def digest(self) -> str:
        """Hex digest of the file's bytes and of the rule that makes samples of them."""
        return json_digest([self.media_digest, AUDIO_SAMPLE_RATE, "audio", RULE_VERSION])

    def load(self) -> NDArray[np.float32]:
        """Return the samples, ``[sample]``.

        Raises:
            DataError: The file cannot be decoded, or is not the one that was digested.
        """
        try:
            if file_digest(self.path) != self.media_digest:
                raise DataError(f"{self.path}: changed since it was listed; run again when nothing writes to it")
            return load_audio(self.path)
        except DataError as error:
            raise DataError(f"{self.label}: {error}") from error


def load_audio(path: Path) -> NDArray[np.float32]:
    """Return all of a file's first audio stream at ``AUDIO_SAMPLE_RATE``, the mean of its channels, in [-1, 1].

    Raises:
        DataError: The file holds no audio that can be decoded, or too little.
    """
    import av
    from av.error import FFmpegError

    pieces = []
    # The resampler would mix channels by other weights.
    resampler = av.AudioResampler(format="fltp", rate=AUDIO_SAMPLE_RATE)
    try:
        with av.open(str(path)) as container:
            if not container.streams.audio:
                raise DataError(f"{path}: has no audio stream; replace or remove it")
            for frame in chain(container.decode(container.streams.audio[0]), [None]):
                pieces += [piece.to_ndarray().mean(axis=0) for piece in resampler.resample(frame)]
    except DataError:  # a ValueError, too
        raise
    except FileNotFoundError as error:
        raise DataError(f"{path}: does not exist; check dataset_base_path and the metadata") from error
    except (FFmpegError, ValueError) as error:
        raise DataError(f"{path}: is no audio that can be decoded ({error}); replace or remove it") from error
    samples = np.concatenate(pieces) if pieces else np.zeros(0, np.float32)
    if len(samples) < MIN_SECONDS * AUDIO_SAMPLE_RATE:
        raise DataError(
            f"{path}: has {len(samples) / AUDIO_SAMPLE_RATE:.3g} s of audio, less than {MIN_SECONDS}; remove it"
        )
    if not np.isfinite(samples).all():
        raise DataError(f"{path}: holds samples that are no numbers; replace or remove it")
    return samples
