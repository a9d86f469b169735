"""What lies where in the test sets of faces that come as folders: TinyFace, IJB-B and IJB-C.

Images are expected to be aligned crops, except IJB's, whose landmarks lie beside them.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.items import image_files
from qsd_plugin.data.scface import check_unique

_TINYFACE_PARTS = ("Probe", "Gallery_Match", "Gallery_Distractor")
#: Identity of everybody who is no probe's identity.
DISTRACTOR = -100


@dataclass(frozen=True)
class TinyFace:
    """TinyFace's test set (Cheng et al., ACCV 2018, "Low-resolution face recognition").

    Attributes:
        paths: Probes, then the mated gallery, then distractors.
        identities: Of each image; -100 for distractors.
        num_probe: How many are probes.
        num_mated: How many are the mated gallery.
    """

    paths: list[Path]
    identities: NDArray[np.int64]
    num_probe: int
    num_mated: int


@dataclass(frozen=True)
class Ijb:
    """Lists of IJB-B or IJB-C for 1:1 verification, as InsightFace packs them.

    Attributes:
        paths: Loose crops [N].
        points: Landmarks [N, 5, 2] in pixels: left eye, right eye, nose, left and right mouth corner (image side).
            ``None``: the crops are aligned.
        detector_score: [N].
        templates: Template of each image [N].
        medias: Medium of each image [N].
        pairs: Templates compared [P, 2].
        genuine: Whether a pair shows one person [P].
    """

    paths: list[Path]
    points: NDArray[np.float64] | None
    detector_score: NDArray[np.float64]
    templates: NDArray[np.int64]
    medias: NDArray[np.int64]
    pairs: NDArray[np.int64]
    genuine: NDArray[np.bool_]


def read_tinyface(folder: str | os.PathLike[str]) -> TinyFace:
    """Read ``Probe``, ``Gallery_Match`` and ``Gallery_Distractor`` below ``folder`` or its ``Testing_Set``.

    A file's identity is the number before the first ``_`` of its name.

    Raises:
        DataError: A folder is missing or empty, a name begins with no number, or two images of one of the three folders
            have one stem.
    """
    root = tinyface_root(folder)
    parts = []
    for name in _TINYFACE_PARTS:
        found = image_files(root / name)
        if not found:
            raise DataError(
                "TinyFace",
                value=str(root / name),
                expected=f"images in each of the folders {', '.join(_TINYFACE_PARTS)}",
            )
        check_unique([(f"{name}/{path.stem}", path) for path in found], "TinyFace")
        parts.append(found)
    probe, mated, distractors = parts
    identities = [_leading_number(path) for path in (*probe, *mated)] + [DISTRACTOR] * len(distractors)
    return TinyFace([*probe, *mated, *distractors], np.array(identities), len(probe), len(mated))


def tinyface_root(folder: str | os.PathLike[str]) -> Path:
    """The folder that holds ``Probe`` and the galleries: ``folder`` or its ``Testing_Set``."""
    root = Path(folder).expanduser()
    return root / "Testing_Set" if (root / "Testing_Set").is_dir() else root


def read_ijb(folder: str | os.PathLike[str], kind: str = "ijb[bc]") -> Ijb:
    """Read ``loose_crop/`` and ``meta/{ijbb,ijbc}_*.txt`` in ``folder``; ``kind``: of one of both only.

    The lists are ``_name_5pts_score`` (name, ten coordinates, detector score), ``_face_tid_mid`` (name, template,
    medium) and ``_template_pair_label`` (template, template, 1 or 0), space separated.

    Raises:
        DataError: A list is missing, misformed, or names other images than the others.
    """
    root = Path(folder).expanduser()
    names, values = _table(_list_file(root, kind, "name_5pts_score"), 11, np.float64)
    owned, owners = _table(_list_file(root, kind, "face_tid_mid"), 2, np.int64)
    if names != owned:
        raise DataError(
            f"Lists of {root}", value="name_5pts_score and face_tid_mid differ", expected="the same images in one order"
        )
    file = _list_file(root, kind, "template_pair_label")
    try:
        compared = np.loadtxt(file, dtype=np.int64, ndmin=2)
    except ValueError as error:
        raise DataError(f"List {file}", value=str(error), expected="integers") from error
    if compared.shape[1] != 3 or not np.isin(compared[:, 2], (0, 1)).all():
        raise DataError(f"List {file}", value=compared[:1].tolist(), expected="two templates and 1 or 0 per line")
    return Ijb(
        paths=[root / "loose_crop" / name for name in names],
        points=values[:, :10].reshape(-1, 5, 2),
        detector_score=values[:, 10],
        templates=owners[:, 0],
        medias=owners[:, 1],
        pairs=compared[:, :2],
        genuine=compared[:, 2] == 1,
    )


def _leading_number(path: Path) -> int:
    found = re.match(r"(\d+)_", path.name, re.ASCII)
    if not found:
        raise DataError("Name of a TinyFace image", value=str(path), expected="a number and _, such as 17_3.jpg")
    return int(found[1])


def _list_file(root: Path, kind: str, name: str) -> Path:
    found = sorted((root / "meta").glob(f"{kind}_{name}.txt"))
    if len(found) != 1:
        kinds = " or ".join(f"{each}_{name}.txt" for each in ("ijbb", "ijbc") if kind in (each, "ijb[bc]"))
        raise DataError(
            "IJB list",
            value=[path.name for path in found],
            expected=f"one file {kinds} in {root / 'meta'}",
        )
    return found[0]


def _table(file: Path, columns: int, kind: type[np.float64] | type[np.int64]) -> tuple[list[str], NDArray[Any]]:
    """First column, and the numbers [N, columns] behind it."""
    names, numbers = [], []
    for count, line in enumerate(file.read_text().splitlines(), 1):
        name, *values = line.split() or ["", ""]
        try:
            numbers.append(np.array(values, dtype=np.str_).astype(kind))
        except ValueError:
            numbers.append(np.empty(0))
        if len(numbers[-1]) != columns:
            raise DataError(f"List {file}, line {count}", value=line, expected=f"a name and {columns} numbers")
        names.append(name)
    return names, np.array(numbers).reshape(-1, columns)
