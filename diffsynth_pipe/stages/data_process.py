"""Stage 1: encode what the cache lacks, one component after the other, and seal a snapshot."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
from typing import TYPE_CHECKING, Any

from diffsynth_pipe.errors import ConfigError, DataError
from diffsynth_pipe.stages.plan import STATE_OF_VERDICT, StageResult, plan_data_process, plan_encoding, summarize

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from cache_store.store import Cache
    from cache_store.writer import Writer
    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.contracts import EncodeUnit, Sample
    from diffsynth_pipe.stages.plan import EncodePlan

logger = logging.getLogger(__name__)


def data_process(config: RunConfig, *, force: bool = False) -> StageResult:
    """Bring the cache up to date with the metadata.

    Only records that no journal has are encoded, and only the components that they need are loaded, one at a time.
    With several processes (``RANK`` and ``WORLD_SIZE`` in the environment) each takes its share of the keys. None waits
    for another: whoever then finds all records committed seals the snapshot, which a second one finds done.

    Args:
        config: The run.
        force: Encode all records again; the new ones take the place of the old.

    Raises:
        DataError, ModelError, ConfigError: As their messages say; what was encoded before stays committed.
        RecordRefused: An encoder yielded NaN or Inf.
    """
    from cache_store.store import Cache, SealedSample

    rank, world_size = _rank(config)
    encoding = plan_encoding(config)
    before = plan_data_process(config, encoding)
    cache = Cache.open_or_new(config.cache_dir, config.cache_backend)
    encoded: dict[str, int] = {}
    if force or before.verdict != "hit":
        with _stopped_by_sigterm():
            encoded = _encode(config, encoding, cache, force, rank, world_size)
        if any(encoding.missing(cache).values()):
            why = f"rank {rank} of {world_size} is done; other processes are still encoding, the last one seals"
            return StageResult(
                stage="data_process",
                state="Completed",
                key=before.key,
                path=cache.root,
                summary={"encoded": encoded, "why": why},
            )
        units = {name: cache.put_recipe(recipe) for name, recipe in encoding.recipes.items()}
        cache.seal(
            (
                SealedSample(sample_id=sample.sample_id, bucket=sample.bucket, source=sample.source, keys=keys)
                for sample, keys in zip(encoding.samples, encoding.keys, strict=True)
            ),
            {"family": config.family, "units": units},
        )
    if rank == 0 or encoded:
        _warn_of_notes(cache, encoding)
    return StageResult(
        stage="data_process",
        state="Completed" if force else STATE_OF_VERDICT[before.verdict],
        key=before.key,
        path=cache.root,
        summary={**summarize(before), "encoded": encoded},
    )


def _warn_of_notes(cache: Cache, encoding: EncodePlan) -> None:
    """Warn if samples have notes, whichever run encoded them."""
    from cache_store.journal import read_notes

    notes = read_notes(cache.root)
    noted = [
        f"{sample.source}: {unit} {notes[unit, key]}"
        for sample, keys in zip(encoding.samples, encoding.keys, strict=True)
        for unit, key in keys.items()
        if (unit, key) in notes
    ]
    if noted:
        logger.warning("notes: %d, first %s; `diffsynth-pipe cache info %s` tells", len(noted), noted[0], cache.root)


def _rank(config: RunConfig) -> tuple[int, int]:
    """Return rank and world size of this process.

    Raises:
        ConfigError: They are no such numbers, or not as many processes were started as the config names.
    """
    rank, world_size = (os.environ.get(name, default) for name, default in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if not (rank.isdecimal() and world_size.isdecimal() and int(rank) < int(world_size)):
        raise ConfigError(
            f"RANK={rank} WORLD_SIZE={world_size}: shares are numbered from 0 to WORLD_SIZE-1; set both so"
        )
    started = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if "RANK" in os.environ and config.data_process_num_processes not in (1, started):
        raise ConfigError(
            f"data_process_num_processes: is {config.data_process_num_processes}, but {started} were started on this"
            " machine; leave it out where a launcher is used"
        )
    return int(rank), int(world_size)


@contextlib.contextmanager
def _stopped_by_sigterm() -> Iterator[None]:
    """Leave the block with SystemExit on SIGTERM, which a launcher sends if another rank failed: records are kept."""
    if threading.current_thread() is not threading.main_thread():  # Python allows no handlers there
        yield
        return
    old = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def _encode(
    config: RunConfig, encoding: EncodePlan, cache: Cache, force: bool, rank: int, world_size: int
) -> dict[str, int]:
    """Encode this process's share of the missing records, or of all; return how many per unit."""
    import torch

    from diffsynth_pipe.stages.encode import encode_device

    device, dtype = encode_device(), getattr(torch, config.encode_dtype)
    encoded: dict[str, int] = {}
    with cache.writer(commit_seconds=config.cache_commit_seconds) as writer:
        # within the block, where no garbage collection takes the others away
        wanted = encoding.records() if force else encoding.missing(cache)
        for unit in encoding.cut.cached:
            share = {
                key: encoding.samples[index]
                for key, index in wanted[unit.name].items()
                if int(key[:8], 16) % world_size == rank
            }
            if not share:
                continue
            components: dict[str, Any] = {}
            if unit.component:
                load = encoding.family.components[unit.component].load
                components[unit.component] = load(encoding.files[unit.component], dtype, device)
            _encode_unit(unit, components, share, writer, config.dataset_num_workers)
            encoded[unit.name] = len(share)
    return encoded


def _encode_unit(
    unit: EncodeUnit,
    components: Mapping[str, Any],
    share: Mapping[str, Sample],
    writer: Writer,
    dataset_num_workers: int,
) -> None:
    from tqdm import tqdm

    from diffsynth_pipe.stages.encode import encode, load_inputs, map_ahead, num_decode_threads, storage_arrays

    num_threads = num_decode_threads(dataset_num_workers)
    # a clip is large: one per thread, and the one that is encoded
    num_ahead = num_threads if "video" in unit.media.values() else None
    loaded = map_ahead(lambda item: load_inputs(unit, item[1].inputs), share.items(), num_threads, num_ahead)
    # One bar per machine: keys are digests, so the shares of its ranks are of one size, give or take a few records.
    shown = f"data_process {unit.name}"
    if (world_size := os.environ.get("WORLD_SIZE", "1")) != "1":
        shown += f", rank {os.environ['RANK']} of {world_size}"
    is_silent = os.environ.get("LOCAL_RANK", "0") != "0"
    with tqdm(total=len(share), desc=shown, unit="record", disable=is_silent) as progress:
        for (key, sample), inputs in loaded:
            try:
                fields = storage_arrays(encode(unit, components, inputs))
            except DataError as error:
                raise DataError(f"{sample.source}: {error}") from error
            note = unit.note(components, inputs) if unit.note else None
            del inputs
            writer.add(unit.name, key, fields, unit.outputs, label=sample.source, note=note or "")
            progress.update()
