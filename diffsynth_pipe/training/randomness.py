"""Random numbers that depend only on (seed, sample id, visit): never on rank, worker, batch or order."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from diffsynth_pipe.contracts import Batch

TIMESTEP = "timestep"


class SampleDraws:
    """The draws of one batch.

    Args:
        seed: Seed of the run.
        sample_ids: One id per sample.
        visits: How often each sample was seen before.
        stream: Keeps draws of different uses apart: ``train``, ``validation``.
        slots: The stratum of each sample's uniform number; empty: all of [0, 1) for each.
        num_slots: How many strata there are.
    """

    def __init__(
        self,
        seed: int,
        sample_ids: Sequence[str],
        visits: Sequence[int],
        *,
        stream: str = "train",
        slots: Sequence[int] = (),
        num_slots: int = 1,
    ) -> None:
        self._keys = [
            f"{stream}/{seed}/{sample_id}/{visit}" for sample_id, visit in zip(sample_ids, visits, strict=True)
        ]
        self._slots = slots or (0,) * len(self._keys)
        self._num_slots = num_slots

    @classmethod
    def of(cls, batch: Batch, seed: int) -> Self:
        """Return the draws of a batch in training."""
        return cls(seed, batch.sample_ids, batch.visits, slots=batch.slots, num_slots=batch.num_slots)

    def noise(self, like: Tensor, purpose: str = "noise") -> Tensor:
        """Return standard normal noise, fp32, of the shape and on the device of ``like``.

        It is drawn on the CPU, one generator per sample, so that every kind of device sees the same numbers.
        """
        noise = torch.empty(like.shape, dtype=torch.float32)
        for row, key in zip(noise, self._keys, strict=True):
            # The CPU generator keeps only the low 32 bits of its seed.
            row.normal_(generator=torch.Generator().manual_seed(_uniform_64(key, purpose) & 0xFFFFFFFF))
        return noise.to(like.device)

    def uniform(self, purpose: str = TIMESTEP) -> Tensor:
        """Return one number per sample, uniform over [0, 1), fp64 ``[batch]``, on CPU.

        Those that decide timesteps are uniform over the sample's stratum.
        """
        own = [(_uniform_64(key, purpose) >> 11) * 2.0**-53 for key in self._keys]
        if purpose != TIMESTEP:
            return torch.tensor(own, dtype=torch.float64)
        values = [(slot + value) / self._num_slots for slot, value in zip(self._slots, own, strict=True)]
        return torch.tensor(values, dtype=torch.float64).clamp(max=1 - 2.0**-53)  # the division may round up to 1


@dataclass(frozen=True, slots=True)
class CaptionDropout:
    """Which samples are trained without their caption, and when.

    Attributes:
        seed: Seed of the run.
        probability: Of each visit of each sample.
    """

    seed: int
    probability: float

    def drops(self, sample_id: str, visit: int) -> bool:
        """Tell whether this visit of a sample goes without its caption."""
        return _uniform_64(f"train/{self.seed}/{sample_id}/{visit}", "caption") < self.probability * 2**64


def _uniform_64(key: str, purpose: str) -> int:
    """Return an integer that is uniform over [0, 2^64)."""
    return int.from_bytes(hashlib.blake2b(f"{key}/{purpose}".encode(), digest_size=8).digest(), "little")
