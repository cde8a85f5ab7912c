"""Digests of media, weights and recipes: what a key in the cache covers."""

from __future__ import annotations

import json
import logging
import os
import sqlite3
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from blake3 import blake3

from diffsynth_pipe.config import user_cache_dir
from diffsynth_pipe.errors import DataError

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from diffsynth_pipe.config import RunConfig, Stage
    from diffsynth_pipe.contracts import ComponentFiles, EncodeUnit

logger = logging.getLogger(__name__)

DIGEST_BYTES = 16
SETTLED_NS = 2_000_000_000
"""A digest is not remembered if the file changed shortly before: it may change again within one tick of its clock."""
BLOCK_BYTES = 1 << 20

CREATE_TABLE = "CREATE TABLE IF NOT EXISTS digests (path TEXT PRIMARY KEY, stamp TEXT, digest TEXT) WITHOUT ROWID"
SELECT_DIGEST = "SELECT digest FROM digests WHERE path = ? AND stamp = ?"
INSERT_DIGEST = "INSERT OR REPLACE INTO digests VALUES (?, ?, ?)"


def bytes_digest(data: bytes) -> str:
    """Return the BLAKE3 digest of the bytes as 32 hex digits."""
    return blake3(data).hexdigest(length=DIGEST_BYTES)


def json_digest(value: Any) -> str:
    """Return the digest of a JSON value: keys sorted, no spaces, UTF-8; NaN and Infinity are refused."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return bytes_digest(text.encode())


WEIGHT_SUFFIXES = (".safetensors", ".bin", ".msgpack", ".h5", ".pt", ".pth")
"""Of files that no tokenizer or processor reads: that of wav2vec 2.0 is published beside its weights, thrice."""

_INPUTS = {
    *("dataset_base_path", "dataset_metadata_path", "model_paths", "model_id_with_origin_paths", "fp8_models"),
    *("tokenizer_path", "tokenizer_1_path", "tokenizer_2_path", "processor_path", "audio_processor_path"),
    *("resume_from_checkpoint", "lora_checkpoint", "preset_lora_path", "quant_options", "template_model_id_or_path"),
}
"""Fields that name what a run reads: their content decides the keys of stages, which no name can wait for."""


def run_name(config: RunConfig, stages: Iterable[Stage]) -> str:
    """Name a run for people: ``qwen_image lora r16 on photos, 1f2e3d``; equal digits, equal parameters and paths."""
    if "train" not in stages:
        what = "cache"
    elif config.lora_base_model is not None:
        what = f"lora r{config.lora_rank}"
    else:
        what = f"full {config.trainable_models}"
    inputs = config.with_absolute_paths().model_dump(mode="json", include=_INPUTS)
    parameters = [config.keyed("cache"), config.keyed("weights"), inputs]
    return f"{config.family} {what} on {Path(config.dataset_base_path).absolute().name}, {json_digest(parameters)[:6]}"


def file_digest(path: Path) -> str:
    """Return the digest of a file's bytes; see ``digest_files``."""
    return digest_files([path], num_threads=1)[0]


def digest_files(paths: Sequence[Path], num_threads: int) -> list[str]:
    """Return the digests of files, in order.

    Digests are remembered per user in ``diffsynth-pipe/digests.sqlite3`` below the XDG cache folder and reused while
    size, times and inode of a file stay the same. The database only saves time: without it every file is hashed.

    Raises:
        DataError: A file cannot be read, or changes while it is hashed.
    """
    known = _recall(paths)
    unknown = [path for path in dict.fromkeys(paths) if path not in known]
    with ThreadPoolExecutor(num_threads) as pool:
        hashed = dict(zip(unknown, pool.map(_hash_file, unknown), strict=True))
    _remember(hashed)
    return [known.get(path) or hashed[path].digest for path in paths]


def component_digest(files: ComponentFiles) -> str:
    """Return the digest of a component: its config or code, weights and companions by name and content, not by place.

    Weights held in FP8 or quantised are other weights.

    Raises:
        DataError: A file cannot be read, or changes while it is hashed.
    """
    described = files.code or (files.folder / "config.json",)
    named = {str(file.relative_to(files.folder)): file for file in (*described, *files.weights)}
    for companion, folder in files.companions.items():
        named |= {f"{companion}/{file.name}": file for file in folder.iterdir() if _is_content(file)}
    digests = digest_files(list(named.values()), num_threads=min(4, os.cpu_count() or 1))
    content: dict[str, Any] = dict(zip(named, digests, strict=True))
    if files.fp8:
        content["fp8"] = True
    if files.quantization is not None:
        content["quantization"] = [files.quantization.method, *sorted(files.quantization.excluded)]
    return json_digest(content)


def unit_recipe(unit: EncodeUnit, component_digest: str | None, encode_dtype: str) -> dict[str, Any]:
    """Return all that decides what a unit makes of its inputs, as JSON values.

    Args:
        unit: The encode unit.
        component_digest: Digest of the component it runs; None if it runs none.
        encode_dtype: The dtype it computes in: ``float32`` or ``bfloat16``.
    """
    return {
        "unit": unit.name,
        "version": unit.version,
        "inputs": list(unit.inputs),
        "outputs": [asdict(field) | {"dims": list(field.dims)} for field in unit.outputs],
        "component": unit.component,
        "component_digest": component_digest,
        "encode_dtype": encode_dtype,
        "recipe": dict(unit.recipe),
    }


def record_key(unit_recipe_id: str, input_digests: Sequence[str]) -> str:
    """Return the key of one cache record: the recipe, and what went into it in the order of the unit's inputs."""
    return json_digest([unit_recipe_id, *input_digests])


def _is_content(file: Path) -> bool:
    return file.is_file() and not file.name.startswith(".") and file.suffix not in WEIGHT_SUFFIXES


def _database_path() -> Path:
    return user_cache_dir() / "digests.sqlite3"


@contextmanager
def _database() -> Iterator[sqlite3.Connection]:
    _database_path().parent.mkdir(parents=True, exist_ok=True)
    with closing(sqlite3.connect(_database_path(), timeout=10)) as database, database:
        database.execute(CREATE_TABLE)
        yield database


@contextmanager
def _warn_if_unusable() -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        logger.warning("%s cannot be used (%s): files are hashed again", _database_path(), error)


def _recall(paths: Iterable[Path]) -> dict[Path, str]:
    known: dict[Path, str] = {}
    with _warn_if_unusable(), _database() as database:
        for path in dict.fromkeys(paths):
            row = database.execute(SELECT_DIGEST, [os.path.realpath(path), _stamp(_stat(path))]).fetchone()
            if row:
                known[path] = row[0]
    return known


def _remember(hashed: Mapping[Path, _Hashed]) -> None:
    rows = [(os.path.realpath(path), file.stamp, file.digest) for path, file in hashed.items() if file.settled]
    if rows:
        with _warn_if_unusable(), _database() as database:
            database.executemany(INSERT_DIGEST, rows)


class _Hashed(NamedTuple):
    digest: str
    stamp: str
    settled: bool


def _hash_file(path: Path) -> _Hashed:
    before = _stat(path)
    now_ns = time.time_ns()
    hasher = blake3()
    try:
        with path.open("rb", buffering=0) as file:
            while block := file.read(BLOCK_BYTES):
                hasher.update(block)
    except OSError as error:
        raise _unreadable(path, error) from error
    if _stamp(_stat(path)) != _stamp(before):
        raise DataError(f"{path}: changed while it was read; run again when nothing writes to it")
    settled = now_ns - max(before.st_mtime_ns, before.st_ctime_ns) > SETTLED_NS
    return _Hashed(hasher.hexdigest(length=DIGEST_BYTES), _stamp(before), settled)


def _stat(path: Path) -> os.stat_result:
    try:
        return path.stat()
    except OSError as error:
        raise _unreadable(path, error) from error


def _stamp(stat: os.stat_result) -> str:
    # ctime catches an edit in place that puts size and mtime back, as `exiftool -P` does.
    return f"{stat.st_size}:{stat.st_mtime_ns}:{stat.st_ctime_ns}:{stat.st_ino}"


def _unreadable(path: Path, error: OSError) -> DataError:
    return DataError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions")
