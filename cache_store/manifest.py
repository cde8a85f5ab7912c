"""``store.json`` and ``recipes/``: what makes a folder a cache, and what its records were made by."""

from __future__ import annotations

import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from cache_store.contract import CacheCorrupt, CacheNotFound, CacheSchemaError
from cache_store.durable import fsync_folder, replace_file

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

SCHEMA = 1
FORMAT = "diffsynth-pipe cache"
SCRATCH = "tmp"
SEGMENTS = "segments"
JOURNAL = "journal"
RECIPES = "recipes"
SNAPSHOTS = "snapshots"


def read_manifest(root: Path) -> str:
    """Return the name of a cache's backend.

    Raises:
        CacheNotFound: The folder is not a cache.
        CacheCorrupt: ``store.json`` is damaged.
        CacheSchemaError: A newer version wrote the cache.
    """
    path = root / "store.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CacheNotFound(f"{root} is not a cache: no store.json; run data-process first") from None
    except ValueError as error:
        raise CacheCorrupt(f"{path} is damaged: {error}; restore it, or choose another cache_path") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CacheNotFound(f"{root} is not a cache: its store.json is of something else; choose another cache_path")
    if not isinstance(manifest.get("schema"), int) or manifest["schema"] > SCHEMA:
        raise CacheSchemaError(
            f"{path}: schema {manifest.get('schema')!r} is newer than {SCHEMA}; upgrade diffsynth-pipe"
        )
    return str(manifest.get("backend"))


def create_store(root: Path, backend: str) -> None:
    """Make a folder a cache; what is there already is left alone."""
    scratch = root / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    if not (root / "store.json").exists():
        manifest = {
            "schema": SCHEMA,
            "format": FORMAT,
            "backend": backend,
            "created_by": f"diffsynth-pipe {version('diffsynth-pipe')}",
        }
        # before the other folders, so that a killed run leaves a cache or nothing but an empty scratch folder
        replace_file(root / "store.json", json.dumps(manifest, indent=1).encode() + b"\n", scratch)
        fsync_folder(root.parent)
    for name in (SEGMENTS, JOURNAL, RECIPES, SNAPSHOTS):
        (root / name).mkdir(exist_ok=True)
    fsync_folder(root)


def canonical_json(value: Any) -> bytes:
    """Return the one spelling of a JSON value that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def recipe_id(recipe: Mapping[str, Any]) -> str:
    """Return the id of an encoder recipe: 32 hex digits of the blake3 of its canonical JSON."""
    return blake3(canonical_json(recipe)).hexdigest(length=16)


def write_recipe(root: Path, recipe: Mapping[str, Any]) -> str:
    """Store a recipe under its id, once; return the id."""
    name = recipe_id(recipe)
    path = root / RECIPES / f"{name}.json"
    if not path.exists():
        replace_file(path, canonical_json(recipe), root / SCRATCH)
    return name
