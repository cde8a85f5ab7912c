"""Loss on a fixed bank of samples, noise levels and noise: it falls if and only if the model learns."""

from __future__ import annotations

import bisect
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from diffsynth_pipe.training.randomness import SampleDraws
from diffsynth_pipe.training.sampler import BatchPlan
from diffsynth_pipe.training.sources import to_device

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from torch import Tensor
    from torch.nn import Module

    from diffsynth_pipe.training.sources import SampleSource

NUM_LEVELS = 4
"""Noise levels per sample: the middles of as many equal parts of their distribution."""


class ValidationDraws:
    """Draws of the bank: visit k stands for noise level k; no seed of a run changes them."""

    def __init__(self, sample_ids: Sequence[str], visits: Sequence[int]) -> None:
        self._levels = visits
        self._draws = SampleDraws(0, sample_ids, visits, stream="validation")

    def noise(self, like: Tensor) -> Tensor:
        """Return standard normal noise, fp32, of the shape and on the device of ``like``."""
        return self._draws.noise(like)

    def uniform(self) -> Tensor:
        """Return the middle of each item's part of the noise levels, fp64."""
        return torch.tensor([(2 * level + 1) / (2 * NUM_LEVELS) for level in self._levels], dtype=torch.float64)


def validation_plans(bucket_sizes: Mapping[str, int], num_samples: int) -> list[BatchPlan]:
    """Choose samples spread evenly over the buckets, one batch per sample with one item per noise level."""
    names, ends = list(bucket_sizes), list(accumulate(bucket_sizes.values()))
    num_chosen = min(num_samples, ends[-1])
    plans = []
    for place in (number * ends[-1] // num_chosen for number in range(num_chosen)):
        bucket = names[bisect.bisect_right(ends, place)]
        index = place - (ends[names.index(bucket)] - bucket_sizes[bucket])
        plans.append(BatchPlan(bucket, (index,) * NUM_LEVELS, tuple(range(NUM_LEVELS))))
    return plans


@torch.no_grad()
def validation_loss(
    model: Module,
    source: SampleSource,
    num_samples: int,
    device: torch.device,
    compute_dtype: torch.dtype,
) -> float | None:
    """Return the mean loss over the bank; None if it is empty.

    Every rank computes all of it: ZeRO-3 wants equal forward calls on all ranks.
    """
    losses = []
    for raw in source.batches(validation_plans(source.bucket_sizes, num_samples)):
        batch = to_device(raw, device, compute_dtype)
        losses.append(model(batch, ValidationDraws(batch.sample_ids, batch.visits)))
    return float(torch.cat(losses).double().mean()) if losses else None
