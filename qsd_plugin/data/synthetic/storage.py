"""Synthetic sets on disk: Market-1501's folders and names, the truth beside them, built once into a cache."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.progress import progress
from qsd_plugin.data.synthetic.pedestrians import (
    DEGRADATIONS,
    GALLERY,
    QUERY,
    TRAIN,
    Sample,
    SyntheticPedestrians,
    render,
    total_severity,
)

#: Raised with every change that alters a picture, so that no cache is taken for what it is not.
VERSION = 1
JPEG_QUALITY = 95

TRUTH_FILE = "truth.csv"
#: Written last: a folder that has it is complete.
META_FILE = "meta.json"

_CHUNK = 32  # pictures a worker makes before it reports


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

    The set is written to a temporary folder that is renamed when complete. An interrupted build therefore leaves
    nothing that could be taken for a set, and of two processes that build the same one, one wins and both get it.

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
    folder = Path(root) / f"synthetic_pedestrians_v{VERSION}_{_fingerprint(spec)}"
    if (folder / META_FILE).is_file():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    except OSError as error:
        raise DataError(
            "Cache folder for synthetic data",
            value=str(root),
            expected="a folder that can be created and written",
            remedy=f"Choose another one ({error.strerror}).",
        ) from error
    try:
        _write(building, spec, workers)
        building.chmod(0o755)  # mkdtemp's 0o700 would lock colleagues out of a shared cache
        _publish(building, folder)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return folder


def load_truth(folder: str | Path) -> Truth:
    """Read what :func:`build` stored about the pictures in ``folder``.

    Raises:
        DataError: No complete synthetic set there.
    """
    folder = Path(folder)
    if not (folder / META_FILE).is_file() or not (folder / TRUTH_FILE).is_file():
        raise DataError(
            "Synthetic set",
            value=str(folder),
            expected=f"a folder with {TRUTH_FILE} and {META_FILE}",
            remedy="Pass the folder that build() returned.",
        )
    with (folder / TRUTH_FILE).open(newline="") as file:
        rows = list(csv.DictReader(file))
    return Truth(
        paths=[row["path"] for row in rows],
        identity=np.array([int(row["identity"]) for row in rows], dtype=np.int64),
        camera=np.array([int(row["camera"]) for row in rows], dtype=np.int64),
        severity=np.array([float(row["severity"]) for row in rows]),
        by_degradation={name: np.array([float(row[name]) for row in rows]) for name in DEGRADATIONS},
    )


def _fingerprint(spec: SyntheticPedestrians) -> str:
    return hashlib.sha256(json.dumps(asdict(spec), sort_keys=True).encode()).hexdigest()[:8]


def _write(folder: Path, spec: SyntheticPedestrians, workers: int) -> None:
    samples = spec.samples()
    for name in (TRAIN, QUERY, GALLERY):
        (folder / name).mkdir()
    made = progress(_made(folder, spec, samples, workers), "Synthetic pedestrians", total=len(samples))
    with (folder / TRUTH_FILE).open("w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(["path", "identity", "camera", "severity", *DEGRADATIONS])
        for sample, severities in zip(samples, made, strict=True):
            every = [severities.get(name, 0.0) for name in DEGRADATIONS]
            table.writerow([sample.path, sample.identity, sample.camera, total_severity(severities), *every])
    meta = {"version": VERSION, "parameters": asdict(spec), "images": len(samples)}
    (folder / META_FILE).write_text(json.dumps(meta, indent=2) + "\n")


def _made(folder: Path, spec: SyntheticPedestrians, samples: list[Sample], workers: int) -> Iterator[dict[str, float]]:
    """Write the pictures and yield their severities, in the order of ``samples``."""
    chunks = [samples[start : start + _CHUNK] for start in range(0, len(samples), _CHUNK)]
    if workers <= 1:
        for chunk in chunks:
            yield from _write_pictures(folder, spec, chunk)
        return
    # Spawned, not forked: the parent may hold threads, as every process that has run torch does.
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        try:
            futures = [pool.submit(_write_pictures, folder, spec, chunk) for chunk in chunks]
            for future in futures:
                yield from future.result()
        except BrokenProcessPool as error:
            raise DataError(
                "Worker processes for synthetic data",
                value=workers,
                expected="processes that can import the main script again",
                remedy='Call build() under `if __name__ == "__main__":`, or pass workers=1.',
            ) from error
        finally:
            pool.shutdown(cancel_futures=True)


def _write_pictures(folder: Path, spec: SyntheticPedestrians, samples: list[Sample]) -> list[dict[str, float]]:
    severities = []
    for sample in samples:
        picture, suffered = render(spec, sample)
        PILImage.fromarray(picture).save(folder / sample.path, quality=JPEG_QUALITY)
        severities.append(suffered)
    return severities


def _publish(building: Path, folder: Path) -> None:
    """Rename the complete set into place unless another process was first; a folder without a marker is replaced."""
    while True:
        try:
            building.rename(folder)  # fails where a folder with files in it stands
            return
        except OSError:
            if (folder / META_FILE).is_file():
                return
            if not folder.is_dir():
                raise
        # Moved aside first: renaming is atomic, deleting is not.
        stale = building.with_name(f"{building.name}.stale")
        with suppress(FileNotFoundError):
            folder.rename(stale)
            shutil.rmtree(stale)
