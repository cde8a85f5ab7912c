"""``store.json`` and ``recipes/``: what makes a folder a cache, and what its records were made by."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from awscrt.checksums import crc32c
from blake3 import blake3

from cache_store.backends import backend_names
from cache_store.contract import CacheCorrupt, CacheError, CacheNotFound, CacheSchemaError
from cache_store.durable import fsync_folder, publish_new_file, replace_file, scratch_folder, write_file
from cache_store.object_path import ObjectPath

if TYPE_CHECKING:
    from collections.abc import Mapping

    from cache_store.object_path import Root

SCHEMA = 2
FORMAT = "diffsynth-pipe cache"
SCRATCH = "tmp"
SEGMENTS = "segments"
JOURNAL = "journal"
RECIPES = "recipes"
SNAPSHOTS = "snapshots"
FOLDERS = (SEGMENTS, JOURNAL, RECIPES, SNAPSHOTS)


def read_manifest(root: Root) -> str:
    """Return the name of a cache's backend.

    Raises:
        CacheNotFound: The folder is not a cache.
        CacheCorrupt: ``store.json`` is damaged.
        CacheSchemaError: A newer version wrote the cache, or an older one, or one with another backend.
        CacheError: The disk refuses.
    """
    path = root / "store.json"
    try:
        manifest = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        raise CacheNotFound(f"{root} is not a cache: no store.json; run data-process first") from None
    except OSError as error:
        raise CacheError(f"{path} cannot be read ({error.strerror}); check it and its permissions") from None
    except ValueError as error:
        raise CacheCorrupt(f"{path} is damaged: {error}; run `diffsynth-pipe cache repair {root}`") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CacheNotFound(f"{root} is not a cache: its store.json is of something else; choose another cache_path")
    if not isinstance(manifest.get("schema"), int) or manifest["schema"] > SCHEMA:
        raise CacheSchemaError(
            f"{path}: schema {manifest.get('schema')!r} is newer than {SCHEMA}; upgrade diffsynth-pipe"
        )
    if manifest["schema"] < SCHEMA:
        raise CacheSchemaError(
            f"{path}: schema {manifest['schema']} is older than {SCHEMA}; encode again into another cache_path"
        )
    backend, known = manifest.get("backend"), backend_names()
    if backend not in known:
        raise CacheSchemaError(f"{path}: backend {backend!r} is not one of {', '.join(known)}; upgrade diffsynth-pipe")
    return str(backend)


def missing_folders(root: Root) -> list[str]:
    """Return the folders that a cache must have and this one lacks, as after a copy that was cut short."""
    if isinstance(root, ObjectPath):  # there are no folders, only what lies in them
        return []
    return [name for name in FOLDERS if not (root / name).is_dir()]


def check_folders(root: Root) -> None:
    """Refuse a cache that lacks a folder.

    Raises:
        CacheCorrupt: Names the first that is missing.
    """
    missing = missing_folders(root)
    if missing:
        raise CacheCorrupt(
            f"{root / missing[0]} is missing: copy the whole cache, or run `diffsynth-pipe cache repair {root}`"
        )


def create_store(root: Root, backend: str) -> None:
    """Make a folder a cache; what is there already is left alone.

    Raises:
        CacheSchemaError: It is one of another backend.
    """
    scratch = root / SCRATCH
    scratch.mkdir(parents=True, exist_ok=True)
    if not (root / "store.json").exists():
        # before the other folders, so that a killed run leaves a cache or nothing but an empty scratch folder
        with contextlib.suppress(FileExistsError):  # another writer was first
            _publish_manifest(root, backend)
        fsync_folder(root.parent)
    if (found := read_manifest(root)) != backend:
        raise CacheSchemaError(f"cache {root} has backend {found!r}, not {backend!r}; set cache_backend")
    for name in FOLDERS:
        (root / name).mkdir(exist_ok=True)
    fsync_folder(root)


def write_manifest(root: Root, backend: str) -> None:
    """Write ``store.json``, in place of one that was damaged if there is one."""
    replace_file(root / "store.json", _new_manifest(backend), root / SCRATCH)


def _publish_manifest(root: Root, backend: str) -> None:
    folder = scratch_folder(root / SCRATCH, f"manifest-{os.getpid()}-{secrets.token_hex(4)}")
    try:
        write_file(folder / "store.json", _new_manifest(backend))
        publish_new_file(folder / "store.json", root / "store.json")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _new_manifest(backend: str) -> bytes:
    created_by = f"diffsynth-pipe {version('diffsynth-pipe')}"
    return encode_manifest({"schema": SCHEMA, "format": FORMAT, "backend": backend, "created_by": created_by})


def is_manifest_intact(root: Root) -> bool:
    """Tell whether ``store.json`` is as it was written."""
    try:
        data = (root / "store.json").read_bytes()
        manifest = json.loads(data)
    except (FileNotFoundError, ValueError):
        return False
    return isinstance(manifest, dict) and data == encode_manifest(manifest)


def encode_manifest(manifest: Mapping[str, Any]) -> bytes:
    """Return the bytes of ``store.json``, with a checksum of its other values."""
    values = {name: value for name, value in manifest.items() if name != "crc32c"}
    checksum = crc32c(canonical_json(values))
    return json.dumps({**values, "crc32c": f"{checksum:08x}"}, indent=1).encode() + b"\n"


def canonical_json(value: Any) -> bytes:
    """Return the one spelling of a JSON value that digests are taken of."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def recipe_id(recipe: Mapping[str, Any]) -> str:
    """Return the id of an encoder recipe: 32 hex digits of the blake3 of its canonical JSON."""
    return blake3(canonical_json(recipe)).hexdigest(length=16)


def write_recipe(root: Root, recipe: Mapping[str, Any]) -> str:
    """Store a recipe under its id, once; return the id."""
    name = recipe_id(recipe)
    if read_recipe(root, name) is None:
        replace_file(root / RECIPES / f"{name}.json", canonical_json(recipe), root / SCRATCH)
    return name


def read_recipe(root: Root, name: str) -> dict[str, Any] | None:
    """Return the recipe of this id; None if it is missing or not what its name says."""
    try:
        data = (root / RECIPES / f"{name}.json").read_bytes()
    except FileNotFoundError:
        return None
    if blake3(data).hexdigest(length=16) != name:
        return None
    recipe: dict[str, Any] = json.loads(data)
    return recipe
