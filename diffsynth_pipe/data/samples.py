"""The rows of a dataset as samples: checked, digested and sized, but not decoded yet."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from tqdm import tqdm

from cache_store.store import RESERVED_BUCKET
from diffsynth_pipe.config import RunConfig, comma_list
from diffsynth_pipe.contracts import CAPTION_COLUMN, EMPTY_CAPTION_ID, Sample
from diffsynth_pipe.data.audio import AudioInput, load_audio
from diffsynth_pipe.data.images import ImageInput, ImagesInput, TextInput, ValueInput, read_size_px, target_size_px
from diffsynth_pipe.data.metadata import read_metadata
from diffsynth_pipe.data.videos import (
    FRAMES_PER_LATENT,
    StillInput,
    VideoInput,
    check_num_frames,
    is_image,
    read_video_size,
)
from diffsynth_pipe.errors import ConfigError, DataError
from diffsynth_pipe.fingerprint import digest_files, json_digest

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from diffsynth_pipe.contracts import EncodeUnit, Input, Media
    from diffsynth_pipe.data.metadata import Row

K = TypeVar("K")
T = TypeVar("T")

FILES_PER_CHUNK = 1024
PROGRESS_FROM_FILES = 2000


def list_samples(config: RunConfig, units: Sequence[EncodeUnit], size_multiple: int) -> list[Sample]:
    """List the dataset; every row and every file is checked before the first one is encoded.

    Args:
        config: The run.
        units: Those that read the samples.
        size_multiple: Height and width of each image become multiples of it.

    Raises:
        ConfigError: No metadata is named, no column is a file column, or the fixed size does not suit the family.
        DataError: Metadata or files cannot be used; tells the first such row and how many more there are.
    """
    if config.dataset_metadata_path is None:
        raise ConfigError("dataset_metadata_path: not set; name the csv, json or jsonl file that lists the samples")
    metadata_path = Path(config.dataset_metadata_path)
    columns = needed_columns(units)
    parsers = {column: parse for unit in units for column, parse in unit.parse.items()}
    extra = list(dict.fromkeys(column for unit in units for column in unit.extra_columns))
    if unnamed := [column for column in extra if column not in comma_list(config.extra_inputs)]:
        raise ConfigError(
            f"extra_inputs: task {config.task!r} of family {config.family!r} reads the columns {', '.join(extra)}; "
            f"also name {', '.join(unnamed)}"
        )
    bucket_columns = [column for unit in units for column in unit.bucket_by]
    file_columns = [column for column in columns if column in comma_list(config.data_file_keys)]
    media = {column: kind for unit in units for column, kind in unit.media.items()}
    if texts := [column for column in media if column not in file_columns]:
        raise ConfigError(
            f"data_file_keys: {config.data_file_keys!r} must also name {', '.join(texts)}, which hold files"
        )
    lists = [column for column, kind in media.items() if kind == "images"]
    if not file_columns:
        raise ConfigError(f"data_file_keys: {config.data_file_keys!r} names none of the columns {', '.join(columns)}")

    rows = [
        (_source(metadata_path, row, file_columns), row)
        for row in (_with_lists(row, lists) for row in read_metadata(metadata_path))
    ]
    _check_cells(metadata_path, rows, columns, file_columns, lists, parsers)
    kinds: dict[str, Media] = {column: media.get(column, "image") for column in file_columns}
    _check_video_parameters(config, has_video="video" in kinds.values())
    base = Path(config.dataset_base_path)
    sizes = _measure_files(config, size_multiple, rows, kinds)
    paths = list(dict.fromkeys(path for path, _ in sizes))
    digests = _by_chunks(paths, "hashing files", partial(digest_files, num_threads=_num_threads(config)))

    samples = []
    occurrences: Counter[str] = Counter()
    for source, row in rows:
        inputs: dict[str, Input] = {}
        contents: dict[str, Any] = {}
        for column in columns:
            if column in file_columns:
                files = _paths(base, row, column)
                kind = kinds[column]
                images = [_media_input(config, path, digests[path], sizes[path, kind], source, kind) for path in files]
                is_list = isinstance(row.values[column], list)
                inputs[column] = ImagesInput(tuple(images)) if is_list else images[0]  # type: ignore[arg-type]
                contents[column] = [digests[path] for path in files] if is_list else digests[files[0]]
            else:
                value = row.values[column]
                inputs[column] = ValueInput(parsers[column](value)) if column in parsers else TextInput(value)
                contents[column] = inputs[column].digest
        content = json_digest(contents)
        shapes = [sizes[path, kind] for column, kind in kinds.items() for path in _paths(base, row, column)]
        sizes_px = "+".join("x".join(map(str, shape)) for shape in shapes if shape)
        samples.append(
            Sample(
                sample_id=json_digest([content, occurrences[content]]),
                source=source,
                bucket="/".join([sizes_px, *(f"{column}={inputs[column].load()}" for column in bucket_columns)]),
                inputs=inputs,
            )
        )
        occurrences[content] += 1
    return samples


def _check_video_parameters(config: RunConfig, *, has_video: bool) -> None:
    if has_video:
        check_num_frames(config.num_frames, _frames_per_latent(config))
        return
    for name in ("num_frames", "fix_frame_rate", "framewise_decoding"):
        if getattr(config, name) != RunConfig.model_fields[name].default:
            raise ConfigError(
                f"{name}: has no effect with family {config.family!r}, which reads no video; leave it out"
            )


def _media_input(config: RunConfig, path: Path, digest: str, shape: tuple[int, ...], label: str, kind: Media) -> Input:
    """Return the input of a file of this training shape: height and width in pixels, and frames of a video."""
    if kind == "audio":
        return AudioInput(path=path, media_digest=digest, label=label)
    known: dict[str, Any] = {
        "path": path,
        "media_digest": digest,
        "height": shape[0],
        "width": shape[1],
        "apply_exif": config.apply_exif_orientation,
        "label": label,
    }
    if kind != "video":
        return ImageInput(**known)
    if is_image(path):
        return StillInput(ImageInput(**known))
    return VideoInput(**known, num_frames=shape[2], frame_rate=_frame_rate(config))


def _frames_per_latent(config: RunConfig) -> int:
    return 1 if config.framewise_decoding else FRAMES_PER_LATENT


def _frame_rate(config: RunConfig) -> float | None:
    return config.frame_rate if config.fix_frame_rate else None


def empty_caption(first: Sample) -> Sample:
    """Return the reserved sample whose caption is empty, made from the first one."""
    return Sample(
        sample_id=EMPTY_CAPTION_ID,
        source="the empty caption",
        bucket=RESERVED_BUCKET,
        inputs={**first.inputs, CAPTION_COLUMN: TextInput("")},
    )


def needed_columns(units: Sequence[EncodeUnit]) -> list[str]:
    """Return the metadata columns that the units read: their inputs that no earlier unit yields."""
    columns: dict[str, None] = {}
    fields: set[str] = set()
    for unit in units:
        columns |= dict.fromkeys(name for name in unit.inputs if name not in fields)
        fields |= {field.name for field in unit.outputs}
    return list(columns)


def _with_lists(row: Row, columns: Sequence[str]) -> Row:
    """Read the JSON lists that a csv holds as texts."""
    values = dict(row.values)
    for column in columns:
        text = values.get(column)
        if isinstance(text, str) and text.lstrip().startswith("["):
            with contextlib.suppress(ValueError):
                values[column] = json.loads(text)
    return replace(row, values=values)


def _names(row: Row, column: str) -> list[Any]:
    value = row.values.get(column)
    return value if isinstance(value, list) else [value]


def _paths(base: Path, row: Row, column: str) -> list[Path]:
    return [base / name for name in _names(row, column)]


def _source(metadata_path: Path, row: Row, file_columns: Sequence[str]) -> str:
    files = ", ".join(str(name) for column in file_columns for name in _names(row, column) if name)
    return f"{metadata_path.name} row {row.number}" + (f" ({files})" if files else "")


def _check_cells(
    metadata_path: Path,
    rows: Sequence[tuple[str, Row]],
    columns: Sequence[str],
    file_columns: Sequence[str],
    lists: Sequence[str],
    parsers: Mapping[str, Callable[[Any], Any]],
) -> None:
    for column in columns:
        if not any(column in row.values for _, row in rows):
            raise DataError(f"{metadata_path}: no column {column!r}, found {', '.join(rows[0][1].values)}; add it")
    _raise_first(
        f"{source}: {problem}"
        for source, row in rows
        for column in columns
        if (
            problem := _cell_problem(
                row, column, parsers.get(column), is_file=column in file_columns, may_be_list=column in lists
            )
        )
    )


def _cell_problem(
    row: Row, column: str, parse: Callable[[Any], Any] | None, *, is_file: bool, may_be_list: bool
) -> str | None:
    if column not in row.values:
        return f"no {column!r}, found {', '.join(row.values)}; add it"
    value = row.values[column]
    if may_be_list and isinstance(value, list):
        if value and all(isinstance(name, str) and name.strip() for name in value):
            return None
        return f"{column!r} is {value!r}, expected a list of file names"
    if parse is not None:
        try:
            parse(value)
        except ValueError as error:
            return f"{column!r} is {value!r}, must be {error}"
        return None
    if not isinstance(value, str):
        return f"{column!r} is {value!r}, expected {'a file name' if is_file else 'a text'}"
    if is_file and not value.strip():
        return f"{column!r} is empty, expected a file name"
    if any("\ud800" <= character <= "\udfff" for character in value):
        return f"{column!r} is {value!r}, which is not valid Unicode (half a surrogate pair); write the whole character"
    return None


def _measure_files(
    config: RunConfig,
    multiple: int,
    rows: Sequence[tuple[str, Row]],
    kinds: Mapping[str, Media],
) -> dict[tuple[Path, Media], tuple[int, ...]]:
    """Return the training shape of every file, by its path and how it is read: height, width, frames; none of audio."""
    base = Path(config.dataset_base_path)
    files = list(
        dict.fromkeys(
            (path, kind) for _, row in rows for name, kind in kinds.items() for path in _paths(base, row, name)
        )
    )
    with ThreadPoolExecutor(_num_threads(config)) as pool:
        measure = partial(_measure, config, multiple)
        measured = _by_chunks(files, "checking files", lambda chunk: pool.map(measure, chunk))
    _raise_first(
        f"{source}: {error}"
        for source, row in rows
        for column, kind in kinds.items()
        for path in _paths(base, row, column)
        if isinstance(error := measured[path, kind], DataError)
    )
    return {file: shape for file, shape in measured.items() if not isinstance(shape, DataError)}


def _measure(config: RunConfig, multiple: int, file: tuple[Path, Media]) -> tuple[int, ...] | DataError:
    path, kind = file
    upright = config.apply_exif_orientation
    frames: tuple[int, ...] = (1,) if kind == "video" else ()
    try:
        if kind == "audio":
            load_audio(path)
            return ()
        if kind == "video" and not is_image(path):
            video = read_video_size(
                path, config.num_frames, _frame_rate(config), _frames_per_latent(config), apply_exif=upright
            )
            width, height, frames = video.width, video.height, (video.num_frames,)
        else:
            width, height = read_size_px(path, upright)
        size = target_size_px(
            width,
            height,
            fixed_height=config.height,
            fixed_width=config.width,
            max_pixels=config.max_pixels,
            multiple=multiple,
        )
    except DataError as error:
        return error
    return (*size, *frames)


def _by_chunks(paths: Sequence[K], title: str, function: Callable[[Sequence[K]], Iterable[T]]) -> dict[K, T]:
    """Map files a chunk at a time: memory stays bounded, and a killed run keeps the digests of finished chunks."""
    results: dict[K, T] = {}
    disable = None if len(paths) > PROGRESS_FROM_FILES else True  # None: no bar unless stderr is a terminal
    with tqdm(total=len(paths), desc=title, unit="file", disable=disable) as bar:
        for start in range(0, len(paths), FILES_PER_CHUNK):
            chunk = paths[start : start + FILES_PER_CHUNK]
            results.update(zip(chunk, function(chunk), strict=True))
            bar.update(len(chunk))
    return results


def _num_threads(config: RunConfig) -> int:
    return max(1, config.dataset_num_workers)


def _raise_first(problems: Iterable[str]) -> None:
    """Raise the first problem, if there is one, and tell how many more there are."""
    found = list(problems)
    if found:
        raise DataError(found[0] + (f" ({len(found) - 1} more rows like this)" if len(found) > 1 else ""))
