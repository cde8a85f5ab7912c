"""Random numbers that depend only on (seed, sample id, visit): never on rank, worker, batch or order."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor


class SampleDraws:
    """The draws of one batch.

    Args:
        seed: Seed of the run.
        sample_ids: One id per sample.
        visits: How often each sample was seen before.
        stream: Keeps draws of different uses apart: ``train``, ``validation``.
    """

    def __init__(self, seed: int, sample_ids: Sequence[str], visits: Sequence[int], *, stream: str = "train") -> None:
        self._keys = [
            f"{stream}/{seed}/{sample_id}/{visit}" for sample_id, visit in zip(sample_ids, visits, strict=True)
        ]

    def noise(self, like: Tensor) -> Tensor:
        """Return standard normal noise, fp32, of the shape and on the device of ``like``.

        It is drawn on the CPU, one generator per sample, so that every kind of device sees the same numbers.
        """
        noise = torch.empty(like.shape, dtype=torch.float32)
        for row, key in zip(noise, self._keys, strict=True):
            # The CPU generator keeps only the low 32 bits of its seed.
            row.normal_(generator=torch.Generator().manual_seed(_uniform_64(key, "noise") & 0xFFFFFFFF))
        return noise.to(like.device)

    def timestep_index(self, num_steps: int) -> Tensor:
        """Return one index per sample, uniform over [0, num_steps), int64 ``[batch]``, on CPU."""
        return torch.tensor([_uniform_64(key, "timestep") * num_steps >> 64 for key in self._keys])


def _uniform_64(key: str, purpose: str) -> int:
    """Return an integer that is uniform over [0, 2^64)."""
    return int.from_bytes(hashlib.blake2b(f"{key}/{purpose}".encode(), digest_size=8).digest(), "little")
