"""Bring a damaged cache back: rescue what is whole, and encode only what is lost."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cache_store.object_path import Root
    from diffsynth_pipe.config import RunConfig


def repair_cache(root: Root, config: RunConfig | None) -> Iterator[str]:
    """Repair a cache, and yield a line for each thing done.

    Args:
        root: The cache.
        config: The run whose cache it is; encodes the lost records. Without it they are only declared lost.

    Raises:
        CacheCorrupt: Something is left that only the run can restore.
        CacheError: As ``cache_store.maintain.repair``.
    """
    from cache_store.contract import CacheCorrupt
    from cache_store.maintain import repair
    from cache_store.store import Cache
    from cache_store.verify import verify

    done = repair(root)
    yield from done.lines
    num_lost = sum(map(len, done.lost.values()))
    yield f"records: {done.num_rescued} copied out of damaged files, {num_lost} lost"
    if config is not None:
        from diffsynth_pipe.stages.data_process import data_process
        from diffsynth_pipe.stages.plan import plan_encoding

        result = data_process(config)
        for recipe in plan_encoding(config).recipes.values():
            Cache.open(root).put_recipe(recipe)
        yield f"encoded again: {result.summary['encoded']}"
    damage = verify(root, full=False)
    if damage:
        cure = f"run `diffsynth-pipe cache repair {root} RUN.yaml` to encode what is lost"
        raise CacheCorrupt(f"cache {root}: {damage[0]}, {len(damage)} in all; {cure}")
