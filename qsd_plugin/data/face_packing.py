"""Packs TinyFace, SCface, IJB-B and IJB-C as released into a record file and a manifest (:mod:`.packed_faces`).

Crops that are aligned go in as they are. Others are aligned by their landmarks with
:func:`~qsd_plugin.data.align.similarity` and stored without loss, so that results do not depend on packing. Everything
is read and written as RGB. Files come in the order of their sorted relative paths, IJB's in that of its lists.
"""

from __future__ import annotations

import io
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.core.progress import progress
from qsd_plugin.data.align import crop_by
from qsd_plugin.data.face_images import storable
from qsd_plugin.data.face_sets import read_ijb, read_tinyface, tinyface_root
from qsd_plugin.data.images import read_rgb
from qsd_plugin.data.items import existing_folder
from qsd_plugin.data.packed_faces import (
    DISTRACTORS,
    FORMAT,
    GALLERY,
    KINDS,
    PROBE,
    TEMPLATE,
    UNKNOWN,
    Manifest,
    blue_image,
    check_blue,
    manifest_file,
)
from qsd_plugin.data.recordio import RecordReader, RecordWriter
from qsd_plugin.data.scface import check_unique, read_scface, scface_split


@dataclass(frozen=True)
class _Listed:
    """What goes into a record: images, landmarks where they are to be aligned, and the manifest's columns."""

    paths: Sequence[Path]
    names: Sequence[str]
    role: NDArray[np.str_]
    label: NDArray[np.int64]
    points: NDArray[np.float64] | None = None
    distance: NDArray[np.int64] | None = None
    template: NDArray[np.int64] | None = None
    medium: NDArray[np.int64] | None = None
    detector_score: NDArray[np.float64] | None = None
    pairs: NDArray[np.int64] | None = None
    genuine: NDArray[np.bool_] | None = None


def pack_eval(
    kind: str,
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    size: int = 112,
    landmarks: str | os.PathLike[str] | None = None,
    quality: int = 0,
    convert: bool = False,
) -> Manifest:
    """Write ``<stem>.rec``, ``.idx`` and ``.manifest.npz``; all of them or none.

    Args:
        kind: One of :data:`~qsd_plugin.data.packed_faces.KINDS`. Layouts: TinyFace's ``Probe``, ``Gallery_Match`` and
            ``Gallery_Distractor`` of aligned crops; SCface's images by their names in any folders; IJB's ``loose_crop``
            and ``meta`` as InsightFace distributes them.
        folder: Of the set.
        path: The ``.rec`` file.
        size: Side of the crops, in pixels. Crops that are aligned already must have it.
        landmarks: SCface only: list of landmarks, see :func:`~qsd_plugin.data.scface.read_scface`.
        quality: JPEG quality of crops that are aligned here, 1 to 100; 0: PNG, without loss, about 22 KB per crop.
        convert: Whether aligned crops that are grey, have alpha or are turned are stored as RGB PNG; default: refuse.

    Returns:
        The manifest.

    Raises:
        ConfigError: Unknown kind, or an option that it does not have.
        DataError: The folder lacks something, an image is damaged or occurs twice, the disk cannot be written, or the
            colour test fails.
    """
    target = Path(path).expanduser().absolute()
    if target.suffix != ".rec":
        raise DataError("Record file to write", value=str(path), expected="a name that ends in .rec")
    listed = _listed(kind, existing_folder(folder, f"Folder of {kind}"), landmarks)
    if not 0 <= quality <= 100:
        raise ConfigError("JPEG quality", value=quality, expected="1 to 100, or 0 for PNG")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        building = tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.")
    except OSError as error:
        raise DataError("Cannot write", value=str(target), expected="a writable folder", remedy=f"{error}.") from error
    with building as partial:
        staged = Path(partial, target.name)
        _write_record(staged, listed, size=size, quality=quality, convert=convert)
        with RecordReader(staged) as reader:
            check_blue(reader.read(0).content, name=str(target))
            about = {"format": FORMAT, "kind": kind, "size": size, "record_bytes": reader.size}
        manifest = _manifest(listed, json.dumps(about))
        manifest.save(manifest_file(staged))
        # The manifest goes first and comes last: none ever lies beside another set's record.
        manifest_file(target).unlink(missing_ok=True)
        for ending in (".rec", ".idx", ".manifest.npz"):
            os.replace(staged.with_suffix(ending), target.with_suffix(ending))
    return manifest


def encoded(image: Image.Image, quality: int) -> bytes:
    """A crop as PNG (``quality`` 0) or as JPEG of that quality, chroma at full resolution."""
    stream = io.BytesIO()
    if quality:
        image.save(stream, "JPEG", quality=quality, subsampling=0)
    else:
        image.save(stream, "PNG")
    return stream.getvalue()


def _listed(kind: str, root: Path, landmarks: str | os.PathLike[str] | None) -> _Listed:
    if kind not in KINDS:
        raise ConfigError("Evaluation set", value=kind, remedy=did_you_mean(kind, KINDS))
    if kind != "scface" and landmarks is not None:
        raise ConfigError("List of landmarks", value=str(landmarks), expected=f"none with {kind}", remedy="Leave it.")
    if kind == "tinyface":
        return _tinyface(root)
    return _scface(root, landmarks) if kind == "scface" else _ijb(root, kind)


def _tinyface(root: Path) -> _Listed:
    data = read_tinyface(root)
    counts = (data.num_probe, data.num_mated, len(data.paths) - data.num_probe - data.num_mated)
    role = np.repeat([PROBE, GALLERY, DISTRACTORS], counts)
    names = [path.relative_to(tinyface_root(root)).as_posix() for path in data.paths]
    return _Listed(data.paths, names, role, data.identities)


def _scface(root: Path, landmarks: str | os.PathLike[str] | None) -> _Listed:
    data = read_scface(root, landmarks)
    split = scface_split(data.names)
    role, label = np.full(len(data.names), PROBE, dtype="<U10"), np.empty(len(data.names), dtype=np.int64)
    distance = np.full(len(data.names), UNKNOWN)
    role[split.gallery] = GALLERY
    label[split.gallery], label[split.probe] = split.gallery_ids, split.probe_ids
    distance[split.probe] = split.distance
    return _Listed(data.paths, data.names, role, label, data.points, distance)


def _ijb(root: Path, kind: str) -> _Listed:
    data = read_ijb(root, kind)
    check_unique([(path.name, path) for path in data.paths], kind)
    return _Listed(
        paths=data.paths,
        names=[path.relative_to(root).as_posix() for path in data.paths],
        role=np.full(len(data.paths), TEMPLATE),
        label=np.full(len(data.paths), UNKNOWN),
        points=data.points,
        template=data.templates,
        medium=data.medias,
        detector_score=data.detector_score,
        pairs=data.pairs,
        genuine=data.genuine,
    )


def _write_record(file: Path, listed: _Listed, *, size: int, quality: int, convert: bool) -> None:
    content = _aligned(listed, size, quality) if listed.points is not None else _as_it_is(listed, size, convert)
    with RecordWriter(file, image_size=None) as writer:
        writer.append(encoded(blue_image(size), quality), UNKNOWN)
        for row in progress(range(len(listed.paths)), "Packing images"):
            writer.append(content(row), float(listed.label[row]), name=listed.names[row])


def _as_it_is(listed: _Listed, size: int, convert: bool) -> Callable[[int], bytes]:
    def content(row: int) -> bytes:
        file = listed.paths[row]
        try:
            found = file.read_bytes()
        except OSError as error:
            raise DataError("Image", value=str(file), expected="a readable file", remedy=f"{error}.") from error
        return storable(found, name=str(file), size=size, convert=convert)

    return content


def _aligned(listed: _Listed, size: int, quality: int) -> Callable[[int], bytes]:
    points = listed.points
    assert points is not None

    def content(row: int) -> bytes:
        crop = crop_by(np.asarray(read_rgb(listed.paths[row])), points[row], size)
        return encoded(Image.fromarray(crop), quality)

    return content


def _manifest(listed: _Listed, meta: str) -> Manifest:
    count = len(listed.paths)

    def numbers(column: NDArray[np.int64] | None) -> NDArray[np.int64]:
        return np.full(count, UNKNOWN) if column is None else column

    return Manifest(
        names=np.array(listed.names),
        role=listed.role,
        label=listed.label,
        template=numbers(listed.template),
        medium=numbers(listed.medium),
        distance=numbers(listed.distance),
        detector_score=np.full(count, np.nan) if listed.detector_score is None else listed.detector_score,
        pairs=np.empty((0, 2), np.int64) if listed.pairs is None else listed.pairs,
        genuine=np.empty(0, np.bool_) if listed.genuine is None else listed.genuine,
        meta=np.array(meta),
    )
