"""Synthetic faces on disk: ``<part>/<identity>/<index>.jpg``, the truth and the pairs beside them, built once.

The difficulty of the default set (``SyntheticFaces()``, :mod:`.face_traits` and :mod:`.face_conditions`) was frozen
before any method of this plugin was measured on it. Whoever changes a picture raises :data:`VERSION` and runs again
what was measured.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from qsd_plugin.core.progress import progress
from qsd_plugin.data.face_lists import PAIR_COLUMNS
from qsd_plugin.data.synthetic.cache import (
    META_FILE,
    TRUTH_FILE,
    build_once,
    complete_folder,
    fingerprint,
    in_processes,
)
from qsd_plugin.data.synthetic.damage import DEGRADATIONS, total_severity
from qsd_plugin.data.synthetic.face_protocols import verification
from qsd_plugin.data.synthetic.faces import FaceSample, SyntheticFaces, render_face

#: Raised with every change that alters a picture, so that no cache is taken for what it is not.
VERSION = 1
JPEG_QUALITY = 95

#: The verification pairs, as tools/build_data.py pairs2bin reads them.
PAIRS_FILE = "pairs.csv"

#: Numbers of :class:`~.face_conditions.Conditions` that are kept.
CONDITIONS = (
    "yaw",
    "pitch",
    "light_azimuth",
    "light_elevation",
    "ambient",
    "exposure",
    "smile",
    "mouth",
    "brows",
    "lids",
)
#: Names that are kept.
WORN = ("hairstyle", "beard", "glasses")

_MARKS = tuple(f"{name}_{axis}" for name in ("eye1", "eye2", "nose", "mouth1", "mouth2") for axis in "xy")


@dataclass(frozen=True, eq=False)
class FaceTruth:
    """What is known of every picture of a set, in the order of ``paths``.

    Attributes:
        paths: POSIX paths below the set's folder, sorted.
        identity: [N] int64.
        severity: [N] float64 in [0, 1], all degradations together; 0 for an undegraded picture.
        by_degradation: Severity of each degradation, [N] float64; 0 where it was not applied.
        conditions: Each of :data:`CONDITIONS`, [N] float64; units as in :class:`~.face_conditions.Conditions`.
        worn: Each of :data:`WORN`, [N].
        landmarks: [N, 5, 2] x and y in pixels, in the order of :data:`qsd_plugin.data.align.TEMPLATE_112`.
    """

    paths: list[str]
    identity: npt.NDArray[np.int64]
    severity: npt.NDArray[np.float64]
    by_degradation: dict[str, npt.NDArray[np.float64]]
    conditions: dict[str, npt.NDArray[np.float64]]
    worn: dict[str, npt.NDArray[np.str_]]
    landmarks: npt.NDArray[np.float64]


def build_faces(root: str | Path, spec: SyntheticFaces, *, workers: int = 2) -> Path:
    """Make a set below ``root``, or find it there.

    An interrupted build leaves nothing, and two processes that build the same set both get it.

    Args:
        root: Cache folder; created if missing.
        spec: What to make.
        workers: Processes; 1 stays in this one. More than one are spawned, which imports the main script again: a
            script that calls this must do so under ``if __name__ == "__main__":``.

    Returns:
        The set's folder, named after the version and a hash of ``spec``; it has ``train``, ``test`` and
        ``distractors``, ``truth.csv``, ``pairs.csv`` and ``meta.json``.

    Raises:
        DataError: ``root`` cannot be written, or workers cannot be started.
    """
    folder = Path(root) / f"synthetic_faces_v{VERSION}_{fingerprint(spec)}"
    return build_once(folder, lambda building: _write(building, spec, workers))


def load_face_truth(folder: str | Path) -> FaceTruth:
    """Read what :func:`build_faces` stored about the pictures in ``folder``.

    Raises:
        DataError: No complete synthetic set there.
    """
    with (complete_folder(folder) / TRUTH_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))

    def numbers(name: str) -> npt.NDArray[np.float64]:
        return np.array([float(row[name]) for row in rows])

    return FaceTruth(
        paths=[row["path"] for row in rows],
        identity=np.array([int(row["identity"]) for row in rows], dtype=np.int64),
        severity=numbers("severity"),
        by_degradation={name: numbers(name) for name in DEGRADATIONS},
        conditions={name: numbers(name) for name in CONDITIONS},
        worn={name: np.array([row[name] for row in rows]) for name in WORN},
        landmarks=np.stack([numbers(name) for name in _MARKS], axis=1).reshape(-1, 5, 2),
    )


def _write(folder: Path, spec: SyntheticFaces, workers: int) -> None:
    samples = spec.samples()
    for part in sorted({(folder / sample.path).parent for sample in samples}):
        part.mkdir(parents=True)
    made = in_processes(functools.partial(_write_pictures, folder, spec), samples, workers)
    _write_table(
        folder / TRUTH_FILE,
        ["path", "identity", "severity", *DEGRADATIONS, *CONDITIONS, *WORN, *_MARKS],
        list(progress(made, "Synthetic faces", total=len(samples))),
    )
    pairs = verification(spec)
    named = [(pairs.paths[first], pairs.paths[second]) for first, second in pairs.pairs.tolist()]
    listed = [[*names, int(same)] for names, same in zip(named, pairs.issame.tolist(), strict=True)]
    _write_table(folder / PAIRS_FILE, PAIR_COLUMNS, listed)
    meta = {"version": VERSION, "parameters": asdict(spec), "images": len(samples)}
    (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


def _write_table(file: Path, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    with file.open("w", newline="") as stream:
        table = csv.writer(stream, lineterminator="\n")
        table.writerow(header)
        table.writerows(rows)


def _write_pictures(folder: Path, spec: SyntheticFaces, samples: list[FaceSample]) -> list[list[object]]:
    """Write pictures and return their rows of the table."""
    rows: list[list[object]] = []
    for sample in samples:
        made = render_face(spec, sample)
        PILImage.fromarray(made.image).save(folder / sample.path, quality=JPEG_QUALITY)
        severities = [made.severities.get(name, 0.0) for name in DEGRADATIONS]
        conditions = [round(getattr(made.conditions, name), 6) for name in CONDITIONS]
        worn = [getattr(made.conditions, name) for name in WORN]
        marks = made.landmarks.round(3).ravel().tolist()
        known = [sample.path, sample.identity, total_severity(made.severities), *severities]
        rows.append([*known, *conditions, *worn, *marks])
    return rows
