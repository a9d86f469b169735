"""Lists of face images: CSV files ``path,identity`` to train on and ``first,second,same`` to verify.

Paths are absolute or relative to the list's folder; other columns are ignored.
"""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.items import check_listed

FACE_COLUMNS = ("path", "identity")
PAIR_COLUMNS = ("first", "second", "same")
#: Columns that a pair list may have.
KNOWN_COLUMNS = ("identity", "quality")


@dataclass(frozen=True, eq=False)
class PairList:
    """Pairs of images in the order of the list.

    Attributes:
        first: Image files [P].
        second: [P].
        same: Whether both show one person, [P].
        identity: Whom the first image shows, [P]; ``None`` where the list does not tell.
        quality: Of each pair, [P], higher is better; ``None`` where the list does not tell.
    """

    first: list[Path]
    second: list[Path]
    same: NDArray[np.bool_]
    identity: list[str] | None = None
    quality: NDArray[np.float64] | None = None


def read_faces(file: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Path and identity of every listed image, sorted by identity, then path.

    Raises:
        DataError: The list is missing, misformed or empty, or lists files that do not exist or twice the same one.
    """
    path = Path(file).expanduser()
    folder = path.parent.absolute()
    faces = []
    for line, row in _rows(path, "Face list", FACE_COLUMNS, ()):
        if not row["path"] or not row["identity"]:
            raise DataError(f"Face list {path}, line {line}", value=row, expected="a path and an identity")
        faces.append((row["identity"], os.path.normpath(folder / row["path"])))
    if not faces:
        raise DataError("Face list without images", value=str(file), expected="one image per line after the header")
    check_listed(path, [image for _, image in faces], what="Face list")
    return [(image, identity) for identity, image in sorted(faces)]


def read_pairs(file: str | os.PathLike[str]) -> PairList:
    """Read a pair list: ``first,second,same`` with 1 or 0, and optionally ``identity`` and ``quality``.

    Whether the images exist is not checked here.

    Raises:
        DataError: The list is missing or misformed, or gives only some pairs an identity or a quality.
    """
    path = Path(file).expanduser()
    rows = _rows(path, "Pair list", PAIR_COLUMNS, KNOWN_COLUMNS)
    for line, row in rows:
        if not row["first"] or not row["second"] or row["same"] not in ("0", "1"):
            raise DataError(f"Pair list {path}, line {line}", value=row, expected="two images and 0 or 1")
        lacking = [name for name in KNOWN_COLUMNS if not row.get(name, "given")]
        if lacking or not _is_number(row.get("quality", "0")):
            raise DataError(
                f"Pair list {path}, line {line}",
                value=row,
                expected="an identity and a quality, a number, for every pair or no such column",
            )
    folder = path.parent.absolute()
    columns = {name: [row[name] for _, row in rows] for name in (rows[0][1] if rows else PAIR_COLUMNS)}
    return PairList(
        first=[Path(os.path.normpath(folder / name)) for name in columns["first"]],
        second=[Path(os.path.normpath(folder / name)) for name in columns["second"]],
        same=np.array(columns["same"]) == "1",
        identity=columns.get("identity"),
        quality=np.array(columns["quality"], dtype=np.float64) if "quality" in columns else None,
    )


def _rows(file: Path, what: str, required: Sequence[str], optional: Sequence[str]) -> list[tuple[int, dict[str, str]]]:
    """Line number and stripped cells of the wanted columns."""
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream, skipinitialspace=True)
            header = [name.strip() for name in reader.fieldnames or ()]
            reader.fieldnames = header
            missing = [name for name in required if name not in header]
            wanted = [name for name in (*required, *optional) if name in header]
            rows = [(reader.line_num, {name: (row[name] or "").strip() for name in wanted}) for row in reader]
    except OSError as error:
        raise DataError(what, value=str(file), expected="an existing CSV file", remedy=f"{error.strerror}.") from error
    if missing:
        raise DataError(f"{what} {file}: header line", value=missing, expected=f"columns {','.join(required)}")
    return rows


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False
