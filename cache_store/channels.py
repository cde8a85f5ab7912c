"""Mean and deviation of each channel, gathered while records are written: what a VAE's latents are judged by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from cache_store.journal import unit_entries

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from numpy.typing import NDArray

    from cache_store.contract import FieldSpec
    from cache_store.object_path import Root

MAX_MEAN = 1.0
MIN_STD, MAX_STD = 0.5, 2.0
"""A normalised latent has mean 0 and standard deviation 1 in every channel, over many images. A factor of two leaves
room for a small or narrow data set. A normalisation that was forgotten, or done twice, is off by more in most channels:
by 1.1 to 3.3 for Qwen-Image's VAE, by 5.5 for Stable Diffusion's."""


@dataclass(frozen=True, slots=True)
class ChannelMoments:
    """The first two moments of each channel.

    Attributes:
        count: Values in one channel.
        sums: Their sums, float64 ``[channels]``.
        squares: The sums of their squares, float64 ``[channels]``.
    """

    count: int
    sums: NDArray[np.float64]
    squares: NDArray[np.float64]

    @classmethod
    def of(cls, values: NDArray[Any]) -> Self:
        """Return the moments of ``[channels, ...]``."""
        rows = values.reshape(len(values), -1).astype(np.float64)
        return cls(rows.shape[1], rows.sum(axis=1), np.einsum("cv,cv->c", rows, rows))

    def plus(self, other: ChannelMoments) -> ChannelMoments:
        """Return the moments of both together."""
        return ChannelMoments(self.count + other.count, self.sums + other.sums, self.squares + other.squares)

    @property
    def mean(self) -> NDArray[np.float64]:
        """The mean of each channel."""
        return self.sums / self.count

    @property
    def std(self) -> NDArray[np.float64]:
        """The standard deviation of each channel."""
        return np.sqrt(np.maximum(self.squares / self.count - self.mean**2, 0))

    def far_channels(self) -> list[int]:
        """Return the channels that are far from what a normalised latent has."""
        is_far = (abs(self.mean) > MAX_MEAN) | (self.std < MIN_STD) | (self.std > MAX_STD)
        return [int(channel) for channel in np.flatnonzero(is_far)]

    def encode(self) -> dict[str, Any]:
        """Return JSON values, to seven digits: means and deviations, which lose less to rounding than sums."""
        return {"count": self.count, "mean": _rounded(self.mean), "std": _rounded(self.std)}

    @classmethod
    def decode(cls, value: Mapping[str, Any]) -> Self:
        """Return what ``encode`` was called on."""
        count, mean, std = value["count"], np.array(value["mean"], np.float64), np.array(value["std"], np.float64)
        return cls(count, count * mean, count * (std**2 + mean**2))


def has_channels(spec: FieldSpec) -> bool:
    """Tell whether a field's items are ``[channels, ...]``."""
    return not spec.ragged and spec.dims[:1] == ("channel",)


def read_channels(root: Root, segments: Collection[str]) -> dict[tuple[str, int], ChannelMoments]:
    """Return the moments of the records of these segments, by field and number of channels.

    A segment counts as it was written, with records that were retracted later or that no snapshot names.
    """
    moments: dict[tuple[str, int], ChannelMoments] = {}
    for _, records in unit_entries(root, segments):
        for value in records.get("channels", ()):
            found = ChannelMoments.decode(value)
            group = value["field"], len(found.sums)
            moments[group] = moments[group].plus(found) if group in moments else found
    return moments


def _rounded(values: NDArray[np.float64]) -> list[float]:
    return [float(f"{value:.7g}") for value in values.tolist()]
