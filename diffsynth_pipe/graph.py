"""The cut: which encode units run once into the cache, which run in every training step, and what crosses between."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import TYPE_CHECKING

from diffsynth_pipe.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from diffsynth_pipe.contracts import EncodeUnit


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """Where a graph of units is split.

    Attributes:
        cached: Units that run once, in order; every one of them is needed after the cut.
        live: Units that run in every training step, in order.
        crossing: Fields and metadata columns that come from before the cut and are read after it.
        columns: Those of them that are metadata columns.
    """

    cached: tuple[EncodeUnit, ...]
    live: tuple[EncodeUnit, ...]
    crossing: tuple[str, ...]
    columns: tuple[str, ...]


def cut(units: Sequence[EncodeUnit], trainable: frozenset[str], wanted: tuple[str, ...]) -> Cut:
    """Split the units where gradients begin.

    A unit is live if its component is trained or it reads what a live unit wrote. Where the first live reader of a
    field also rewrites it, all later writers of that field are live too, or they would run before it. What remains is
    cached, as far as somebody after the cut reads it.

    Args:
        units: In the order in which they run.
        trainable: Components that are trained, as a whole or through a LoRA.
        wanted: Fields that the loss reads.

    Raises:
        ConfigError: No unit writes a wanted field.
    """
    last_writer: dict[str, int] = {}
    writers: dict[str, list[int]] = defaultdict(list)
    sources: list[dict[str, int | None]] = []  # per unit: who wrote what it reads; None for a metadata column
    for index, unit in enumerate(units):
        sources.append({name: last_writer.get(name) for name in unit.inputs})
        for spec in unit.outputs:
            last_writer[spec.name] = index
            writers[spec.name].append(index)
    for name in wanted:
        if name not in last_writer:
            raise ConfigError(f"task: its loss reads {name!r}, but the family's units yield {', '.join(last_writer)}")

    live = _live(units, trainable, sources, writers)
    crossing: dict[str, int | None] = {}
    reads = [source for index in sorted(live) for source in sources[index].items()]
    for name, writer in reads + [(name, last_writer[name]) for name in wanted]:
        if writer not in live:
            crossed = crossing.setdefault(name, writer)
            assert crossed == writer, f"two versions of {name} would cross the cut"
    needed = {writer for writer in crossing.values() if writer is not None}
    for index in reversed(range(len(units))):
        if index in needed:
            needed.update(writer for writer in sources[index].values() if writer is not None)
    return Cut(
        cached=tuple(units[index] for index in sorted(needed)),
        live=tuple(units[index] for index in sorted(live)),
        crossing=tuple(crossing),
        columns=tuple(name for name, writer in crossing.items() if writer is None),
    )


def _live(
    units: Sequence[EncodeUnit],
    trainable: frozenset[str],
    sources: Sequence[dict[str, int | None]],
    writers: dict[str, list[int]],
) -> set[int]:
    """Return the indices of the live units."""
    live = {index for index, unit in enumerate(units) if unit.component in trainable}
    while True:
        for index, source in enumerate(sources):
            if not live.isdisjoint(source.values()):
                live.add(index)
        overtaken: set[int] = set()
        for name, chain in writers.items():
            first_reader = min((index for index in live if name in sources[index]), default=None)
            if first_reader is not None and first_reader in chain:
                overtaken.update(index for index in chain if index > first_reader)
        if overtaken <= live:
            return live
        live |= overtaken
