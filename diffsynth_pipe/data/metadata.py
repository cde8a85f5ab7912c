"""Rows of metadata from csv, json or jsonl."""

from __future__ import annotations

import csv
import io
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffsynth_pipe.errors import DataError

if TYPE_CHECKING:
    from pathlib import Path


@dataclass(frozen=True, slots=True)
class Row:
    """One row of metadata.

    Attributes:
        number: Counted from 1, without the header and without blank lines.
        values: By column. A csv holds text only.
    """

    number: int
    values: dict[str, Any]


def read_metadata(path: Path) -> list[Row]:
    """Read all rows; the suffix tells the format.

    Raises:
        DataError: The file is missing, broken, empty or of an unknown format.
    """
    readers = {".csv": _read_csv, ".json": _read_json, ".jsonl": _read_jsonl}
    read = readers.get(path.suffix.lower())
    if read is None:
        raise DataError(f"{path}: metadata of type {path.suffix!r}; expected one of {', '.join(readers)}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: byte {error.start} is not UTF-8; save the file as UTF-8") from error
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check dataset_metadata_path") from error
    values = read(path, text)
    if not values:
        raise DataError(f"{path}: holds no rows; add at least one")
    return [Row(number, row) for number, row in enumerate(values, start=1)]


def _read_csv(path: Path, text: str) -> list[dict[str, Any]]:
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    rows: list[dict[str, Any]] = []
    try:
        header = next(reader, [])
        repeated = sorted({column for column in header if header.count(column) > 1})
        if repeated:
            raise DataError(f"{path}: the header names column {repeated[0]!r} twice; rename one")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise DataError(
                    f"{path} row {len(rows) + 1}: {len(cells)} cells, but the header names {len(header)} columns; "
                    f"quote a cell that holds a comma"
                )
            rows.append(dict(zip(header, cells, strict=True)))
    except csv.Error as error:
        raise DataError(f"{path} line {reader.line_num}: broken csv ({error})") from error
    return rows


def _read_json(path: Path, text: str) -> list[dict[str, Any]]:
    try:
        rows = json.loads(text or "[]")
    except ValueError as error:
        raise DataError(f"{path}: broken json ({error})") from error
    if not isinstance(rows, list):
        raise DataError(f"{path}: holds a {type(rows).__name__}; expected a list of objects")
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise DataError(f'{path} row {number}: {row!r} is not an object; write {{"column": value, ...}}')
    return rows


def _read_jsonl(path: Path, text: str) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines: it also splits at U+2028, which may stand inside a JSON string.
    for line_number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path} line {line_number}: broken json ({error})") from error
        if not isinstance(row, dict):
            raise DataError(f'{path} line {line_number}: {row!r} is not an object; write {{"column": value, ...}}')
        rows.append(row)
    return rows
