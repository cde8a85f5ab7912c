"""The order of samples: a function of the step number, with no state and no memory of its own.

Sources: the Feistel network over a domain of 4^k values with cycle walking (Black and Rogaway, "Ciphers with Arbitrary
Finite Domains", 2002); splitmix64's finaliser as its round function (Steele et al., "Fast Splittable Pseudorandom
Number Generators", 2014).
"""

from __future__ import annotations

import bisect
import hashlib
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

NUM_ROUNDS = 6

U64 = npt.NDArray[np.uint64]


class BatchPlan(NamedTuple):
    """Which samples make up a batch.

    Attributes:
        bucket: The bucket that all of them are from.
        indices: Their places in the bucket.
        visits: How often each was seen before, counted from 0.
    """

    bucket: str
    indices: tuple[int, ...]
    visits: tuple[int, ...]

    def micro_batches(self, *, rank: int, world_size: int, batch_size: int) -> list[BatchPlan]:
        """Return this rank's micro-batches of a global batch, in order.

        Raises:
            ConfigError: The global batch does not divide into micro-batches for all ranks.
        """
        total = len(self.indices)
        if total % (world_size * batch_size):
            raise ConfigError(
                f"batch_size: a global batch of {total} samples does not divide by {world_size} ranks x {batch_size}"
            )
        starts = range(rank * batch_size, total, world_size * batch_size)
        return [
            BatchPlan(self.bucket, self.indices[start : start + batch_size], self.visits[start : start + batch_size])
            for start in starts
        ]


class KeyedPermutation:
    """A pseudo-random bijection of [0, size) with random access and O(1) memory."""

    def __init__(self, size: int, key: str) -> None:
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digest = hashlib.blake2b(key.encode(), digest_size=8 * NUM_ROUNDS).digest()
        self._round_keys = np.frombuffer(digest, dtype="<u8")

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Map positions to values, elementwise."""
        values = self._encrypt(positions.astype(np.uint64))
        # The domain is less than 4 x size, so a walk takes fewer than 4 turns on average.
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside])
        return values.astype(np.int64)

    def _encrypt(self, values: U64) -> U64:
        left, right = values >> self._half_bits, values & self._mask
        for round_key in self._round_keys:
            left, right = right, left ^ (_mix(right + round_key) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: U64) -> U64:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BucketSampler:
    """Cuts every bucket's endless stream of passes into global batches, and mixes the buckets' batches.

    A pass visits each sample of a bucket once, in an order of its own. A batch may straddle two passes, so nothing is
    padded and nothing dropped: after ``num_steps(passes)`` steps each sample was seen at least ``passes`` times, and
    exactly so where the global batch divides ``passes`` x the bucket's size. Otherwise the last batch of the bucket
    borrows from the next pass.

    Args:
        sizes: Number of samples per bucket, all at least 1.
        global_batch_size: Samples of one optimizer step, over all ranks and micro-batches.
        seed: Seed of the order.
    """

    def __init__(self, sizes: Mapping[str, int], global_batch_size: int, seed: int) -> None:
        self._sizes = dict(sizes)
        self._global_batch_size = global_batch_size
        self._seed = seed

    def num_steps(self, passes: int) -> int:
        """Return the number of optimizer steps of this many passes over the samples."""
        return sum(self._num_batches(size, passes) for size in self._sizes.values())

    def finished_passes(self, step: int) -> int:
        """Return how many passes are over before this step."""
        upper = step * self._global_batch_size // sum(self._sizes.values())
        return bisect.bisect_right(range(upper + 1), step, key=self.num_steps) - 1

    def plan(self, step: int) -> BatchPlan:
        """Return the global batch of one step."""
        epoch = self.finished_passes(step)
        start = self.num_steps(epoch)
        order = KeyedPermutation(self.num_steps(epoch + 1) - start, f"{self._seed}/order/{epoch}")
        offset = int(order(np.array([step - start]))[0])
        for bucket, size in self._sizes.items():
            first, end = self._num_batches(size, epoch), self._num_batches(size, epoch + 1)
            if offset < end - first:
                return self._batch(bucket, first + offset)
            offset -= end - first
        raise AssertionError(f"step {step} lies outside of pass {epoch}")

    def _num_batches(self, size: int, passes: int) -> int:
        return -(-passes * size // self._global_batch_size)

    def _batch(self, bucket: str, number: int) -> BatchPlan:
        size = self._sizes[bucket]
        start = number * self._global_batch_size
        visits, places = np.divmod(np.arange(start, start + self._global_batch_size, dtype=np.int64), size)
        indices = np.empty_like(places)
        for visit in np.unique(visits):
            chosen = visits == visit
            indices[chosen] = KeyedPermutation(size, f"{self._seed}/{bucket}/{visit}")(places[chosen])
        return BatchPlan(bucket, tuple(indices.tolist()), tuple(visits.tolist()))
