"""Samples that are encoded while training: the two stages in one process, without a cache."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from cache_store.store import RESERVED_BUCKET
from diffsynth_pipe.contracts import CAPTION_COLUMN, EMPTY_CAPTION_ID
from diffsynth_pipe.stages.encode import (
    encode,
    encode_device,
    load_inputs,
    map_ahead,
    num_decode_threads,
)

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import Tensor

    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import Batch, Sample
    from diffsynth_pipe.stages.plan import EncodePlan
    from diffsynth_pipe.training.randomness import CaptionDropout
    from diffsynth_pipe.training.sampler import BatchPlan


class LiveSource:
    """The samples of a plan, encoded as ``data_process`` would, to the bit; the encoders stay loaded.

    Args:
        config: The run.
        encoding: Its samples and the units before the cut.
    """

    def __init__(self, config: RunConfig, encoding: EncodePlan) -> None:
        import torch

        device, dtype = encode_device(), getattr(torch, config.encode_dtype)
        self._units = encoding.cut.cached
        self._components: dict[str, Any] = {
            name: encoding.family.components[name].load(files, dtype, device) for name, files in encoding.files.items()
        }
        self._buckets: dict[str, list[Sample]] = {}
        for sample in encoding.samples:
            self._buckets.setdefault(sample.bucket, []).append(sample)
        self._reserved = {sample.sample_id: sample for sample in self._buckets.pop(RESERVED_BUCKET, ())}
        self._digest = encoding.digest
        self._num_threads = num_decode_threads(config.dataset_num_workers)

    @property
    def bucket_sizes(self) -> Mapping[str, int]:
        """Return the number of samples per bucket."""
        return {name: len(samples) for name, samples in self._buckets.items()}

    @property
    def digest(self) -> str:
        """Return the digest of the samples and their order, as a sealed snapshot of them would have it."""
        return self._digest

    def sample_ids(self, bucket: str) -> Iterator[str]:
        """Yield the ids of the samples of a bucket, in their order."""
        return (sample.sample_id for sample in self._buckets[bucket])

    def field_shape(self, bucket: str, field: str) -> tuple[int, ...]:
        """Return the shape that a field, not a ragged one, has in all samples of a bucket; one of them is encoded."""
        (unit,) = (unit for unit in self._units if field in (spec.name for spec in unit.outputs))
        record = encode(unit, self._components, load_inputs(unit, self._buckets[bucket][0].inputs))
        return tuple(record[field].shape)

    def batches(self, plans: Iterable[BatchPlan], dropout: CaptionDropout | None = None) -> Iterator[Batch]:
        """Yield one batch per plan, in order, on the CPU and in storage dtype.

        Raises:
            DataError: A file cannot be decoded.
        """
        from diffsynth_pipe.contracts import Batch
        from diffsynth_pipe.training.sources import collate

        specs = [spec for unit in self._units for spec in unit.outputs]
        has_video = any("video" in unit.media.values() for unit in self._units)
        num_ahead = self._num_threads if has_video else None
        for plan, loaded in map_ahead(partial(self._load, dropout), plans, self._num_threads, num_ahead):
            fields, lengths = collate(specs, [self._encode(inputs) for _, inputs in loaded])
            yield Batch(
                fields=fields,
                lengths=lengths,
                sample_ids=tuple(sample.sample_id for sample, _ in loaded),
                visits=plan.visits,
                slots=plan.slots,
                num_slots=plan.num_slots,
            )

    def _load(self, dropout: CaptionDropout | None, plan: BatchPlan) -> list[tuple[Sample, dict[str, Any]]]:
        """Load every column once, however many units read it."""
        columns = dict.fromkeys(name for unit in self._units for name in unit.inputs)
        loaded = []
        for index, visit in zip(plan.indices, plan.visits, strict=True):
            sample = self._buckets[plan.bucket][index]
            inputs = sample.inputs
            if dropout is not None and dropout.drops(sample.sample_id, visit):
                inputs = {**inputs, CAPTION_COLUMN: self._reserved[EMPTY_CAPTION_ID].inputs[CAPTION_COLUMN]}
            loaded.append((sample, {name: inputs[name].load() for name in columns}))
        return loaded

    def _encode(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        record: dict[str, Tensor] = {}
        for unit in self._units:
            record |= encode(unit, self._components, {name: inputs[name] for name in unit.inputs})
        return record
