"""Where the loop gets its batches from."""

from __future__ import annotations

import dataclasses
import heapq
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch

from diffsynth_pipe.contracts import EMPTY_CAPTION_ID, Batch
from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray
    from torch import Tensor

    from cache_store.contract import FieldSpec
    from cache_store.local_copies import LocalCopies
    from cache_store.reader import RawBatch
    from cache_store.snapshot import Snapshot
    from diffsynth_pipe.training.randomness import CaptionDropout
    from diffsynth_pipe.training.sampler import BatchPlan


class SampleSource(Protocol):
    """Samples in buckets.

    Attributes:
        bucket_sizes: Number of samples per bucket, all at least 1.
        digest: Digest of the ordered samples.
    """

    @property
    def bucket_sizes(self) -> Mapping[str, int]:
        """Return the number of samples per bucket."""

    @property
    def digest(self) -> str:
        """Return the digest of the samples and their order."""

    def sample_ids(self, bucket: str) -> Iterator[str]:
        """Yield the ids of the samples of a bucket, in their order."""

    def field_shape(self, bucket: str, field: str) -> tuple[int, ...]:
        """Return the shape that a field, not a ragged one, has in all samples of a bucket."""

    def batches(self, plans: Iterable[BatchPlan], dropout: CaptionDropout | None = None) -> Iterator[Batch]:
        """Yield one batch per plan, in order, on the CPU and in storage dtype.

        The tensors of a batch may be overwritten when the next one is asked for.

        Args:
            plans: What each batch holds.
            dropout: Whose captions are emptied; None: nobody's.
        """


class CachedSource:
    """The samples of a sealed snapshot, read ahead by threads.

    Args:
        snapshot: The samples.
        fields: The fields that cross the cut.
        caption_fields: Those that are made of the caption alone, and read of the empty one where it is dropped.
        num_threads: Reading threads.
        copies: Where what is read of a cache in an object store is kept.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        fields: Sequence[str],
        caption_fields: Sequence[str] = (),
        num_threads: int = 1,
        copies: LocalCopies | None = None,
    ) -> None:
        self._snapshot = snapshot
        self._copies = copies
        self._fields = tuple(fields)
        self._caption_fields = tuple(caption_fields)
        self._num_threads = num_threads

    @property
    def bucket_sizes(self) -> Mapping[str, int]:
        """Return the number of samples per bucket."""
        return {name: len(members) for name, members in self._snapshot.bucket_members.items()}

    @property
    def digest(self) -> str:
        """Return the digest of the samples and their order."""
        return self._snapshot.digest

    def sample_ids(self, bucket: str) -> Iterator[str]:
        """Yield the ids of the samples of a bucket, in their order."""
        return map(self._snapshot.sample_id, self._snapshot.bucket_members[bucket].tolist())

    def field_shape(self, bucket: str, field: str) -> tuple[int, ...]:
        """Return the shape that a field, not a ragged one, has in all samples of a bucket."""
        (number,) = self._snapshot.placements(field, self._snapshot.bucket_members[bucket][:1])[:, 0].tolist()
        shape: tuple[int, ...] = self._snapshot.arrays[number].layout.item_shape
        return shape

    def batches(self, plans: Iterable[BatchPlan], dropout: CaptionDropout | None = None) -> Iterator[Batch]:
        """Yield one batch per plan, in order.

        Raises:
            CacheCorrupt: The files are not what was committed.
        """
        from cache_store.durable import NUM_REQUESTS
        from cache_store.reader import BatchReader, Prefetcher

        members = self._snapshot.bucket_members
        requests = (
            (plan, positions := members[plan.bucket][list(plan.indices)], self._captions(positions, plan, dropout))
            for plan in plans
        )
        dtypes = {name: self._snapshot.fields[name].dtype for name in self._fields}
        is_remote = not isinstance(self._snapshot.root, Path)
        reader = BatchReader(
            self._snapshot,
            self._fields,
            num_threads=NUM_REQUESTS if is_remote else 0,
            allocate=_pinned if torch.cuda.is_available() else None,
            copies=self._copies,
        )

        def finish(plan: BatchPlan, raw: RawBatch) -> Batch:
            return Batch(
                fields={name: _tensor(raw.fields[name], dtypes[name]) for name in self._fields},
                lengths={name: torch.from_numpy(lengths) for name, lengths in raw.lengths.items()},
                sample_ids=raw.sample_ids,
                visits=plan.visits,
                slots=plan.slots,
                num_slots=plan.num_slots,
            )

        # latency is hidden by batches in flight, not by threads that work
        ahead = {"depth": 16, "num_threads": 8} if is_remote else {"num_threads": self._num_threads}
        with Prefetcher(reader, requests, finish=finish, **ahead) as prefetcher:
            for _, batch in prefetcher:
                yield batch

    def _captions(
        self, positions: NDArray[np.int64], plan: BatchPlan, dropout: CaptionDropout | None
    ) -> dict[str, NDArray[np.int64]]:
        """Return the samples from which the fields made of captions are read."""
        if dropout is None:
            return {}
        ids = map(self._snapshot.sample_id, positions)
        dropped = [dropout.drops(sample_id, visit) for sample_id, visit in zip(ids, plan.visits, strict=True)]
        sources = np.where(dropped, self._snapshot.reserved[EMPTY_CAPTION_ID], positions)
        return dict.fromkeys(self._caption_fields, sources)


class Subset:
    """Some samples of a source, as a source of its own.

    Args:
        source: Has more samples.
        members: For each bucket the places of the samples in the source's; at least one.
    """

    def __init__(self, source: SampleSource, members: Mapping[str, NDArray[np.int64]]) -> None:
        self._source = source
        self._members = members

    @property
    def bucket_sizes(self) -> Mapping[str, int]:
        """Return the number of samples per bucket."""
        return {bucket: len(places) for bucket, places in self._members.items()}

    @property
    def digest(self) -> str:
        """Return the digest of the whole source."""
        return self._source.digest

    def sample_ids(self, bucket: str) -> Iterator[str]:
        """Yield the ids of the samples of a bucket, in their order."""
        wanted = set(self._members[bucket].tolist())
        return (sample_id for place, sample_id in enumerate(self._source.sample_ids(bucket)) if place in wanted)

    def field_shape(self, bucket: str, field: str) -> tuple[int, ...]:
        """Return the shape that a field, not a ragged one, has in all samples of a bucket."""
        return self._source.field_shape(bucket, field)

    def batches(self, plans: Iterable[BatchPlan], dropout: CaptionDropout | None = None) -> Iterator[Batch]:
        """Yield one batch per plan, in order, as the source does."""
        members = self._members
        return self._source.batches(
            (plan._replace(indices=tuple(members[plan.bucket][list(plan.indices)].tolist())) for plan in plans), dropout
        )


def hold_out(source: SampleSource, num_samples: int) -> tuple[Subset, Subset]:
    """Split a source into samples to train on and samples to validate with.

    Held out are the samples with the smallest ids: ids are digests of the content, so this is a random choice that
    spreads over the buckets by their sizes, and a data set that grows changes little of it. In each bucket the sample
    with the largest id stays, so that none is emptied.

    Raises:
        ConfigError: So many cannot be held out.
    """
    sizes = source.bucket_sizes
    most = sum(sizes.values()) - len(sizes)
    if num_samples > most:
        raise ConfigError(
            f"num_held_out_samples: {num_samples} are more than {most}: of {sum(sizes.values())} samples, "
            f"one in each of {len(sizes)} buckets must be left to train on; lower it"
        )
    all_samples = (
        (sample_id, bucket, place) for bucket in sizes for place, sample_id in enumerate(source.sample_ids(bucket))
    )
    held_out: dict[str, list[int]] = {bucket: [] for bucket in sizes}
    num_left = num_samples
    # A bucket skips at most one of them, its last.
    for _, bucket, place in heapq.nsmallest(num_samples + len(sizes), all_samples):
        if num_left and len(held_out[bucket]) + 1 < sizes[bucket]:
            held_out[bucket].append(place)
            num_left -= 1
    return (
        Subset(source, {bucket: np.delete(np.arange(sizes[bucket]), held_out[bucket]) for bucket in sizes}),
        Subset(source, {bucket: np.array(sorted(places)) for bucket, places in held_out.items() if places}),
    )


def collate(
    specs: Iterable[FieldSpec], records: Sequence[Mapping[str, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Put the fields of samples side by side.

    Returns:
        One tensor per field, ``[batch, *shape]``, and the lengths of ragged ones, as ``Batch`` holds them.
    """
    fields, lengths = {}, {}
    for spec in specs:
        items = [record[spec.name] for record in records]
        if spec.ragged:
            fields[spec.name] = torch.nn.utils.rnn.pad_sequence(items, batch_first=True)
            lengths[spec.name] = torch.tensor([len(item) for item in items])
        else:
            fields[spec.name] = torch.stack(items)
    return fields, lengths


def to_device(batch: Batch, device: torch.device, compute_dtype: torch.dtype) -> Batch:
    """Copy a batch to the training device, its float fields in the compute dtype."""

    def move(tensor: Tensor) -> Tensor:
        return tensor.to(device, compute_dtype if tensor.is_floating_point() else tensor.dtype, copy=True)

    return dataclasses.replace(
        batch,
        fields={name: move(tensor) for name, tensor in batch.fields.items()},
        lengths={name: move(tensor) for name, tensor in batch.lengths.items()},
    )


def _pinned(num_bytes: int) -> np.ndarray:
    """Return memory that the device copies from without a detour; the array keeps its tensor alive."""
    return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=True).numpy()


def _tensor(array: np.ndarray, dtype: str) -> Tensor:
    tensor = torch.from_numpy(array)
    return tensor.view(torch.bfloat16) if dtype == "bfloat16" else tensor
