"""Which records a run would encode again, and what changed since the cache was sealed."""

from __future__ import annotations

import contextlib
from collections import deque
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache_store.contract import CacheError
from cache_store.store import RESERVED_BUCKET
from diffsynth_pipe.config import load_config
from diffsynth_pipe.errors import ConfigError
from diffsynth_pipe.fingerprint import json_digest
from diffsynth_pipe.stages.plan import latest_snapshot, plan_encoding

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from cache_store.object_path import Root
    from diffsynth_pipe.config import RunConfig
    from diffsynth_pipe.stages.plan import StagePlan

NUM_LINES = 5
"""Lines of changes in a plan, before the one with the totals."""


def explain_changes(root: Root, config: RunConfig) -> Iterator[str]:
    """Yield a line for each recipe and each sample that is not as in the newest snapshot.

    Samples are compared by their source first, then by their id: an edited caption keeps the row, a moved row the id.

    Raises:
        CacheNotFound: Nothing is sealed.
        DataError, ModelError, ConfigError: As their messages say.
    """
    from cache_store.manifest import read_recipe

    snapshot = latest_snapshot(config)
    encoding = plan_encoding(config)
    sealed_recipes: Mapping[str, str] = snapshot.header.get("units", {})
    changed_units = set()
    for unit, recipe in encoding.recipes.items():
        sealed_id = sealed_recipes.get(unit)
        if sealed_id == json_digest(recipe):
            continue
        changed_units.add(unit)
        sealed = None if sealed_id is None else read_recipe(root, sealed_id)
        yield f"recipe of {unit}: {_difference(sealed, recipe)}"
    sealed_samples = [sample for sample in snapshot.samples() if sample.bucket != RESERVED_BUCKET]
    by_source = {sample.source: sample for sample in sealed_samples}
    by_id = {sample.sample_id: sample for sample in sealed_samples}
    num_same = num_new = 0
    matched = set()
    pairs = zip(encoding.samples, encoding.keys, strict=True)
    rows = [(sample, keys) for sample, keys in pairs if sample.bucket != RESERVED_BUCKET]
    for sample, keys in rows:
        known = by_source.get(sample.source) or by_id.get(sample.sample_id)
        if known is None:
            num_new += 1
            yield f"{sample.source}: new"
            continue
        matched.add(known.sample_id)
        changed = [unit for unit in encoding.cut.cached if known.keys.get(unit.name) != keys[unit.name]]
        num_same += not changed
        reasons = [
            f"{unit.name} by its {'recipe' if unit.name in changed_units else ' or '.join(unit.inputs)}"
            for unit in changed
        ]
        if reasons:
            yield f"{sample.source}: {', '.join(reasons)}"
    num_gone = len(by_id.keys() - matched)
    num_changed = len(rows) - num_same - num_new
    yield f"samples: {num_same} as sealed, {num_changed} changed, {num_new} new, {num_gone} gone"


def changes_since(config: RunConfig, plans: Iterable[StagePlan]) -> dict[str, list[str]]:
    """Say, for stages that are not done, what is not as in the newest snapshot and in the newest other training."""
    changes: dict[str, list[str]] = {}
    for plan in plans:
        if plan.verdict == "hit":
            continue
        with contextlib.suppress(CacheError, ConfigError, OSError):  # nothing sealed, other parameters, just deleted
            if plan.stage == "train":
                assert isinstance(plan.path, Path)
                changes[plan.stage] = _changed_parameters(config, plan.path)
            else:
                lines = explain_changes(plan.path, config)
                changes[plan.stage] = [*islice(lines, NUM_LINES), *deque(lines, maxlen=1)]
    return {stage: lines for stage, lines in changes.items() if lines}


def _changed_parameters(config: RunConfig, run_dir: Path) -> list[str]:
    """Compare with the newest other training in the same folder."""
    others = [path for path in run_dir.parent.glob("train-*/config.yaml") if path.parent != run_dir]
    if not others:
        return []
    newest = max(others, key=lambda path: path.stat().st_mtime)
    before, now = load_config(newest, {}).keyed("weights"), config.keyed("weights")
    return [f"{newest.parent.name}: {_difference(before, now) or 'the same parameters, but other samples or models'}"]


def _difference(sealed: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> str:
    if sealed is None:
        return "the sealed one is lost, or the unit was not cached"
    names = sorted(name for name in sealed.keys() | recipe.keys() if sealed.get(name) != recipe.get(name))
    return ", ".join(f"{name} was {sealed.get(name)!r}, is {recipe.get(name)!r}" for name in names)
