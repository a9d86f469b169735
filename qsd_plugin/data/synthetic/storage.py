"""Synthetic pedestrians on disk: Market-1501's folders and names, the truth beside them, built once into a cache."""

from __future__ import annotations

import csv
import functools
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from qsd_plugin.core.progress import progress
from qsd_plugin.data.synthetic.cache import (
    META_FILE,
    TRUTH_FILE,
    build_once,
    complete_folder,
    fingerprint,
    in_processes,
)
from qsd_plugin.data.synthetic.damage import DEGRADATIONS, total_severity
from qsd_plugin.data.synthetic.pedestrians import GALLERY, QUERY, TRAIN, Sample, SyntheticPedestrians, render

#: Raised with every change that alters a picture, so that no cache is taken for what it is not.
VERSION = 1
JPEG_QUALITY = 95


@dataclass(frozen=True)
class Truth:
    """What is known of every picture of a set, in the order of ``paths``.

    Attributes:
        paths: POSIX paths below the set's folder, sorted.
        identity: [N] int64.
        camera: [N] int64, counted from 1.
        severity: [N] float64 in [0, 1], all degradations together; 0 for an undegraded picture.
        by_degradation: Severity of each degradation, [N] float64; 0 where it was not applied.
    """

    paths: list[str]
    identity: npt.NDArray[np.int64]
    camera: npt.NDArray[np.int64]
    severity: npt.NDArray[np.float64]
    by_degradation: dict[str, npt.NDArray[np.float64]]


def build(root: str | Path, spec: SyntheticPedestrians, *, workers: int = 2) -> Path:
    """Make a set below ``root``, or find it there.

    An interrupted build leaves nothing, and two processes that build the same set both get it.

    Args:
        root: Cache folder; created if missing.
        spec: What to make.
        workers: Processes; 1 stays in this one. More than one are spawned, which imports the main script again: a
            script that calls this must do so under ``if __name__ == "__main__":``.

    Returns:
        The set's folder, named after the version and a hash of ``spec``; it has ``bounding_box_train``, ``query`` and
        ``bounding_box_test`` in Market-1501's layout, ``truth.csv`` and ``meta.json``.

    Raises:
        DataError: ``root`` cannot be written, or workers cannot be started.
    """
    folder = Path(root) / f"synthetic_pedestrians_v{VERSION}_{fingerprint(spec)}"
    return build_once(folder, lambda building: _write(building, spec, workers))


def load_truth(folder: str | Path) -> Truth:
    """Read what :func:`build` stored about the pictures in ``folder``.

    Raises:
        DataError: No complete synthetic set there.
    """
    folder = complete_folder(folder)
    with (folder / TRUTH_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Truth(
        paths=[row["path"] for row in rows],
        identity=np.array([int(row["identity"]) for row in rows], dtype=np.int64),
        camera=np.array([int(row["camera"]) for row in rows], dtype=np.int64),
        severity=np.array([float(row["severity"]) for row in rows]),
        by_degradation={name: np.array([float(row[name]) for row in rows]) for name in DEGRADATIONS},
    )


def _write(folder: Path, spec: SyntheticPedestrians, workers: int) -> None:
    samples = spec.samples()
    for name in (TRAIN, QUERY, GALLERY):
        (folder / name).mkdir()
    make = functools.partial(_write_pictures, folder, spec)
    made = progress(in_processes(make, samples, workers), "Synthetic pedestrians", total=len(samples))
    with (folder / TRUTH_FILE).open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "identity", "camera", "severity", *DEGRADATIONS])
        for sample, severities in zip(samples, made, strict=True):
            every = [severities.get(name, 0.0) for name in DEGRADATIONS]
            table.writerow([sample.path, sample.identity, sample.camera, total_severity(severities), *every])
    meta = {"version": VERSION, "parameters": asdict(spec), "images": len(samples)}
    (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


def _write_pictures(folder: Path, spec: SyntheticPedestrians, samples: list[Sample]) -> list[dict[str, float]]:
    severities = []
    for sample in samples:
        picture, suffered = render(spec, sample)
        PILImage.fromarray(picture).save(folder / sample.path, quality=JPEG_QUALITY)
        severities.append(suffered)
    return severities
