"""Quality label files: how labels are read from and written to ``.npz``, ``.csv``, ``.tsv``, ``.json`` and ``.txt``.

``.npz`` is the plugin's own format: arrays ``keys`` (unicode), ``score``, ``raw``, ``spread`` (float64) and ``header``
(JSON text), no pickles. ``.csv`` and ``.tsv`` say the same in text: ``# name: value`` lines, then the columns
``key,score,raw,spread``. ``.json`` holds ``{"header": {...}, "labels": {key: {"score": ...}}}`` or just
``{key: score}``. ``.txt`` is the two-column text of the QSD and SDD-FIQA programs, ``path <white space> score``; it has
no room for raw values or a header, though a header is accepted when reading.
"""

from __future__ import annotations

import csv
import io
import json
import os
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import LabelError

#: Columns of numbers, in file order; ``score`` is always there, the others are NaN where unknown.
COLUMNS = ("score", "raw", "spread")
#: What the standard library and NumPy raise on files that are cut off, of another kind, or have the wrong contents.
UNREADABLE = (
    ValueError,
    KeyError,
    TypeError,
    AttributeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    csv.Error,
)


@dataclass(frozen=True)
class LabelTable:
    """What a label file holds: one key and one number per column for every image, and the header."""

    keys: tuple[str, ...]
    columns: Mapping[str, NDArray[np.float64]]
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_table(path: Path) -> LabelTable:
    """Read a label file of any supported format.

    Raises:
        LabelError: No such file, unknown format, or contents that are not labels; names the line where there is one.
    """
    form = _format_of(path)
    if not path.is_file():
        raise LabelError(
            f"Label file {path} does not exist",
            remedy="Make it with tools/quality_labels.py, or correct the path (QUALITY.FILES).",
        )
    try:
        return form.read(path)
    except UNREADABLE as error:
        raise LabelError(
            f"Label file {path} is not a readable {path.suffix} label file",
            value=str(error),
            expected=form.expected,
            remedy="Make it again, or check that the file was copied whole.",
        ) from error


def write_table(path: Path, table: LabelTable) -> None:
    """Write a label file in the format of its suffix; a reader sees the old file or the whole new one, never a part.

    Raises:
        LabelError: Unknown format, or the folder cannot be written to.
    """
    content = _format_of(path).write(table)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise LabelError(
            f"Label file {path} cannot be written", value=str(error), remedy="Choose a folder that you can write to."
        ) from error


def _read_npz(path: Path) -> LabelTable:
    with np.load(path, allow_pickle=False) as arrays:
        keys = tuple(str(key) for key in arrays["keys"])
        columns = {name: np.asarray(arrays[name], np.float64) for name in COLUMNS if name in arrays}
        meta = json.loads(str(arrays["header"])) if "header" in arrays else {}
    return _table(keys, columns, meta)


def _write_npz(table: LabelTable) -> bytes:
    arrays: dict[str, Any] = {"keys": np.array(table.keys, dtype=np.str_), **table.columns}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, header=np.array(json.dumps(table.meta)), **arrays)
    return buffer.getvalue()


def _read_columns(path: Path, *, delimiter: str) -> LabelTable:
    meta, lines, first = _split_header(path.read_text(encoding="utf-8"))
    rows = csv.reader(lines, delimiter=delimiter)
    titles = next(rows, [])
    if titles[:2] != ["key", "score"] or not set(titles[2:]) <= set(COLUMNS):
        raise ValueError(f"column titles {titles}")
    keys: list[str] = []
    values: list[list[float]] = []
    for number, row in enumerate(rows, first + 1):
        if not row:
            continue
        if len(row) != len(titles):
            raise ValueError(f"line {number} has {len(row)} fields, not {len(titles)}")
        keys.append(row[0])
        values.append([_number(cell, number) for cell in row[1:]])
    matrix = np.array(values, dtype=np.float64).reshape(len(keys), len(titles) - 1)
    return _table(tuple(keys), dict(zip(titles[1:], matrix.T, strict=True)), meta)


def _write_columns(table: LabelTable, *, delimiter: str) -> bytes:
    text = io.StringIO()
    text.writelines(f"# {name}: {json.dumps(value)}\n" for name, value in table.meta.items())
    writer = csv.writer(text, delimiter=delimiter, lineterminator="\n")
    writer.writerow(["key", *table.columns])
    for key, *numbers in _rows(table):
        writer.writerow([key, *("" if number is None else repr(number) for number in numbers)])
    return text.getvalue().encode()


def _read_json(path: Path) -> LabelTable:
    content = json.loads(path.read_text(encoding="utf-8"))
    meta = content.get("header", {}) if "labels" in content else {}
    labels: dict[str, Any] = content.get("labels", content)
    records = [record if isinstance(record, dict) else {"score": record} for record in labels.values()]
    columns = {
        name: np.array([_missing_as_nan(record.get(name)) for record in records], dtype=np.float64) for name in COLUMNS
    }
    return _table(tuple(labels), columns, meta)


def _write_json(table: LabelTable) -> bytes:
    labels = {key: dict(zip(table.columns, numbers, strict=True)) for key, *numbers in _rows(table)}
    return json.dumps({"header": table.meta, "labels": labels}, indent=1).encode()


def _read_two_columns(path: Path) -> LabelTable:
    meta, lines, first = _split_header(path.read_text(encoding="utf-8"))
    scores: dict[str, float] = {}
    repeated: list[str] = []
    for number, line in enumerate(lines, first):
        if not line.strip():
            continue
        key, score = _split_two_columns(line, number)
        if key in scores:
            repeated.append(key)
        scores[key] = _number(score, number)
    if repeated:
        warnings.warn(
            f"Label file {path} gives {len(repeated)} paths more than once, e.g. {repeated[0]!r}; the last one counts.",
            stacklevel=4,
        )
    return _table(tuple(scores), {"score": np.array(list(scores.values()), dtype=np.float64)}, meta)


def _split_two_columns(line: str, number: int) -> tuple[str, str]:
    """Path and score of a line; paths may hold spaces, so the score is what stands right of the last white space."""
    fields = line.split("\t") if "\t" in line else line.strip().rsplit(maxsplit=1)
    if len(fields) != 2:
        raise ValueError(f"line {number} is not one path and one score: {line!r}")
    key, score = fields
    if "\t" not in line and " " in key and _is_number(key.split()[-1]):
        raise ValueError(
            f"line {number} ends in two numbers, so which is the label? {line!r} (put a tab after the path)"
        )
    return key, score


def _write_two_columns(table: LabelTable) -> bytes:
    scores = table.columns["score"].tolist()
    return "".join(f"{key}\t{score!r}\n" for key, score in zip(table.keys, scores, strict=True)).encode()


def _table(keys: tuple[str, ...], columns: Mapping[str, NDArray[np.float64]], meta: Mapping[str, Any]) -> LabelTable:
    unknown = np.full(len(keys), np.nan)
    complete = {"score": columns["score"], **{name: columns.get(name, unknown) for name in COLUMNS[1:]}}
    for name, column in complete.items():
        if column.shape != (len(keys),):
            raise ValueError(f"{len(keys)} keys, but {name!r} has shape {column.shape}")
    return LabelTable(keys, complete, meta)


def _rows(table: LabelTable) -> Iterator[tuple[Any, ...]]:
    """Key and numbers of each image, ``None`` for NaN."""
    columns = [
        [None if np.isnan(number) else number for number in column.tolist()] for column in table.columns.values()
    ]
    return zip(table.keys, *columns, strict=True)


def _split_header(text: str) -> tuple[dict[str, Any], Sequence[str], int]:
    """The ``# name: value`` lines at the top, the lines below them, and the number of the first of those."""
    lines = text.split("\n")  # splitlines() would also cut keys that hold U+2028 and the like
    meta: dict[str, Any] = {}
    first = 0
    while first < len(lines) and lines[first].startswith("#"):
        name, colon, value = lines[first].lstrip("#").strip().partition(":")
        if colon:
            meta[name.strip()] = _json_or_text(value.strip())
        first += 1
    return meta, lines[first:], first + 1


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except ValueError:
        return value


def _number(text: str, line: int) -> float:
    try:
        return float(text) if text else float("nan")
    except ValueError:
        raise ValueError(f"line {line} holds {text!r} where a number belongs") from None


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _missing_as_nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _format_of(path: Path) -> _Format:
    try:
        return _FORMATS[path.suffix.lower()]
    except KeyError:
        raise LabelError(
            f"Label file {path} has an unknown format",
            value=path.suffix,
            expected=f"one of {', '.join(_FORMATS)}",
            remedy="Rename or convert the file.",
        ) from None


@dataclass(frozen=True)
class _Format:
    read: Callable[[Path], LabelTable]
    write: Callable[[LabelTable], bytes]
    expected: str


_COLUMN_TEXT = "'# name: value' lines, the titles key, score [, raw, spread], then one line per image"
_FORMATS = {
    ".npz": _Format(
        _read_npz, _write_npz, "arrays 'keys' and 'score' (also 'raw', 'spread', 'header'), no pickled objects"
    ),
    ".csv": _Format(partial(_read_columns, delimiter=","), partial(_write_columns, delimiter=","), _COLUMN_TEXT),
    ".tsv": _Format(partial(_read_columns, delimiter="\t"), partial(_write_columns, delimiter="\t"), _COLUMN_TEXT),
    ".json": _Format(_read_json, _write_json, '{"key": score, ...} or {"header": {...}, "labels": {...}}'),
    ".txt": _Format(_read_two_columns, _write_two_columns, "one image per line: path, white space, score"),
}
