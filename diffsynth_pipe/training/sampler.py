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

STEPS_AHEAD = 16
"""Steps that are planned at once, unless their batches are large."""
VISITS_AHEAD = 1024
"""Visits in them, at most, but for those of the first."""

I64 = npt.NDArray[np.int64]
U64 = npt.NDArray[np.uint64]


class BatchPlan(NamedTuple):
    """Which samples make up a batch.

    Attributes:
        bucket: The bucket that all of them are from.
        indices: Their places in the bucket.
        visits: How often each was seen before, counted from 0.
        slots: The stratum of each one's noise level, a permutation of all in a global batch; empty without strata.
        num_slots: How many strata there are.
    """

    bucket: str
    indices: tuple[int, ...]
    visits: tuple[int, ...]
    slots: tuple[int, ...] = ()
    num_slots: int = 1

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
        parts = (slice(start, start + batch_size) for start in starts)
        return [
            BatchPlan(self.bucket, self.indices[part], self.visits[part], self.slots[part], self.num_slots)
            for part in parts
        ]


class KeyedPermutation:
    """Pseudo-random bijections of [0, size), one per key, with random access and O(1) memory."""

    def __init__(self, size: int, *keys: str) -> None:
        self.size = size
        half_bits = max(1, ((size - 1).bit_length() + 1) // 2)
        self._half_bits = np.uint64(half_bits)
        self._mask = np.uint64((1 << half_bits) - 1)
        digests = b"".join(hashlib.blake2b(key.encode(), digest_size=8 * NUM_ROUNDS).digest() for key in keys)
        self._round_keys = np.frombuffer(digests, dtype="<u8").reshape(len(keys), NUM_ROUNDS).T

    def __call__(self, positions: I64, which: npt.NDArray[np.intp] | None = None) -> I64:
        """Map positions to values, elementwise, each by the key of this number; by default by the first."""
        round_keys = self._round_keys[:, np.zeros_like(positions) if which is None else which]
        values = self._encrypt(positions.astype(np.uint64), round_keys)
        # The domain is less than 4 x size, so a walk takes fewer than 4 turns on average.
        while (outside := values >= self.size).any():
            values[outside] = self._encrypt(values[outside], round_keys[:, outside])
        return values.astype(np.int64)

    def _encrypt(self, values: U64, round_keys: U64) -> U64:
        left, right = values >> self._half_bits, values & self._mask
        for keys in round_keys:
            left, right = right, left ^ (_mix(right + keys) & self._mask)
        return (left << self._half_bits) | right


def _mix(values: U64) -> U64:
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class BucketSampler:
    """Cuts every bucket's endless stream of passes into global batches, and mixes the buckets' batches.

    A pass visits each sample of a bucket once, in an order of its own. A batch may straddle two passes, so nothing is
    padded and nothing dropped: within ``num_steps(passes)`` steps each sample has every visit below ``passes`` exactly
    once. Where the global batch does not divide ``passes`` x the bucket's size, the batch at the end of the bucket's
    stream is filled from the next pass: it borrows ``-passes * size % global_batch_size`` visits, fewer than a batch,
    and that pass does not repeat them. A pass's batches come in random order, so this one need not come last.

    An optimizer step averages over its global batch, whatever its size: where buckets have batches of different sizes,
    a sample of a large batch moves the weights less than one of a small batch.

    Args:
        sizes: Number of samples per bucket, all at least 1.
        global_batch_size: Samples of one optimizer step, over all ranks and micro-batches; of each bucket, or of all.
        seed: Seed of the order.
        stratified: Give each sample of a global batch a stratum of its own for its noise level.
    """

    def __init__(
        self,
        sizes: Mapping[str, int],
        global_batch_size: int | Mapping[str, int],
        seed: int,
        *,
        stratified: bool = False,
    ) -> None:
        self._sizes = dict(sizes)
        self._global_batch_sizes = (
            dict.fromkeys(sizes, global_batch_size) if isinstance(global_batch_size, int) else dict(global_batch_size)
        )
        self._seed = seed
        self._stratified = stratified
        self._planned: list[BatchPlan] = []
        self._first_planned = 0

    def num_steps(self, passes: int) -> int:
        """Return the number of optimizer steps of this many passes over the samples."""
        return sum(self._num_batches(bucket, passes) for bucket in self._sizes)

    def finished_passes(self, step: int) -> int:
        """Return how many passes are over before this step."""
        upper = step * max(self._global_batch_sizes.values()) // sum(self._sizes.values())
        return bisect.bisect_right(range(upper + 1), step, key=self.num_steps) - 1

    def plan(self, step: int) -> BatchPlan:
        """Return the global batch of one step."""
        if not self._first_planned <= step < self._first_planned + len(self._planned):
            self._planned = self._plan_ahead(step)
            self._first_planned = step
        return self._planned[step - self._first_planned]

    def _plan_ahead(self, step: int) -> list[BatchPlan]:
        """Return the global batches of this step and the next ones of its pass: for many, numpy costs as for one."""
        epoch = self.finished_passes(step)
        start, end = self.num_steps(epoch), self.num_steps(epoch + 1)
        num_steps = min(STEPS_AHEAD, max(1, VISITS_AHEAD // max(self._global_batch_sizes.values())))
        steps = np.arange(step, min(end, step + num_steps))
        offsets = KeyedPermutation(end - start, f"{self._seed}/order/{epoch}")(steps - start)
        plans: list[BatchPlan] = [BatchPlan("", (), ())] * len(steps)
        for bucket in self._sizes:
            first = self._num_batches(bucket, epoch)
            num_batches = self._num_batches(bucket, epoch + 1) - first
            (mine,) = np.nonzero((offsets >= 0) & (offsets < num_batches))
            for place, plan in zip(mine.tolist(), self._batches(bucket, first + offsets[mine]), strict=True):
                plans[place] = self._with_slots(plan, int(steps[place])) if self._stratified else plan
            offsets = offsets - num_batches
        return plans

    def _with_slots(self, plan: BatchPlan, step: int) -> BatchPlan:
        num_slots = len(plan.indices)
        slots = KeyedPermutation(num_slots, f"{self._seed}/slots/{step}")(np.arange(num_slots, dtype=np.int64))
        return plan._replace(slots=tuple(slots.tolist()), num_slots=num_slots)

    def _num_batches(self, bucket: str, passes: int) -> int:
        return -(-passes * self._sizes[bucket] // self._global_batch_sizes[bucket])

    def _batches(self, bucket: str, numbers: I64) -> list[BatchPlan]:
        """Return the batches of a bucket with these numbers."""
        size, global_batch_size = self._sizes[bucket], self._global_batch_sizes[bucket]
        positions = numbers[:, None] * global_batch_size + np.arange(global_batch_size, dtype=np.int64)
        visits, places = np.divmod(positions, size)
        passes, which = np.unique(visits, return_inverse=True)
        permutation = KeyedPermutation(size, *(f"{self._seed}/{bucket}/{number}" for number in passes.tolist()))
        indices = permutation(places.ravel(), which.ravel()).reshape(visits.shape)
        return [
            BatchPlan(bucket, tuple(row.tolist()), tuple(row_visits.tolist()))
            for row, row_visits in zip(indices, visits, strict=True)
        ]
