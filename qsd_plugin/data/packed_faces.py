"""Evaluation sets packed once: a record file of aligned crops and a manifest that says what each of them is.

``<stem>.rec`` and ``<stem>.idx`` hold the images in the manifest's order, keys from 1 on; key 0 is a pure blue image,
which tells a file of swapped colour channels from a sound one. ``<stem>.manifest.npz`` is a :class:`Manifest`. Written
by :mod:`.face_packing`.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.stored_arrays import StoredArrays
from qsd_plugin.data.face_images import decode_face
from qsd_plugin.data.face_sets import Ijb, TinyFace
from qsd_plugin.data.recordio import RecordReader
from qsd_plugin.data.scface import SCface

#: Sets that can be packed.
KINDS = ("tinyface", "scface", "ijbb", "ijbc")
#: Roles of images. Of IJB, every image belongs to a template instead.
PROBE, GALLERY, DISTRACTORS, TEMPLATE = "probe", "gallery", "distractor", "template"
#: What a number is where it means nothing, as the template of a TinyFace image.
UNKNOWN = -1

BLUE = (0, 0, 255)
_BLUE_TOLERANCE = 32  # levels; the worst JPEG moves them by 11
#: Of the manifest.
FORMAT = 1


@dataclass(frozen=True)
class Manifest(StoredArrays):
    """What the N images of a packed set are.

    Args:
        names: Paths relative to the set's folder, POSIX, [N], sorted within each role.
        role: One of ``probe``, ``gallery``, ``distractor`` and, of IJB, ``template``, [N].
        label: Identity, [N]; -100 for distractors, -1 where only pairs are known (IJB).
        template: [N]; -1 where there are none.
        medium: Within the template, [N]; -1 where there are none.
        distance: SCface's: 1 (4.2 m), 2 (2.6 m), 3 (1.0 m) of probes, [N]; -1 elsewhere.
        detector_score: [N]; NaN where it is not known.
        pairs: Templates compared, [P, 2]; P is 0 but for IJB.
        genuine: Whether a pair shows one person, [P].
        meta: JSON text: ``format``, ``kind``, ``size`` in pixels and ``record_bytes``.
    """

    what: ClassVar[str] = "Manifest"

    names: NDArray[np.str_]
    role: NDArray[np.str_]
    label: NDArray[np.int64]
    template: NDArray[np.int64]
    medium: NDArray[np.int64]
    distance: NDArray[np.int64]
    detector_score: NDArray[np.float64]
    pairs: NDArray[np.int64]
    genuine: NDArray[np.bool_]
    meta: NDArray[np.str_]

    def about(self) -> dict[str, Any]:
        """``meta`` as a dictionary."""
        return dict(json.loads(str(self.meta)))

    def rows(self, role: str) -> NDArray[np.int64]:
        """Images of a role."""
        return np.flatnonzero(self.role == role)


def is_packed(path: str | os.PathLike[str]) -> bool:
    """Whether a path names a record file and not a folder."""
    return Path(path).suffix == ".rec"


def manifest_file(record: Path) -> Path:
    """The manifest beside a record file."""
    return record.with_suffix(".manifest.npz")


def read_manifest(path: str | os.PathLike[str], *kinds: str) -> tuple[Path, Manifest]:
    """The absolute path of a packed set and its manifest, after the colour test.

    Args:
        path: The ``.rec`` file.
        kinds: Of :data:`KINDS`; it must be one of these.

    Raises:
        DataError: A file is missing, they do not belong together, the set is another one, or colours are swapped.
    """
    record = Path(path).expanduser().absolute()
    file = manifest_file(record)
    if not file.is_file():
        raise DataError(
            "Manifest of a packed evaluation set",
            value=str(file),
            expected="a file beside the record, written with it",
            remedy="Pack the set again: tools/build_data.py pack-eval.",
        )
    manifest = Manifest.load(file)
    about = manifest.about()
    if about.get("format") != FORMAT:
        raise DataError(f"Manifest {file}", value=about, expected=f"format {FORMAT}", remedy="Pack the set again.")
    if about["kind"] not in kinds:
        raise DataError(f"Packed evaluation set {record}", value=about["kind"], expected=" or ".join(kinds))
    with RecordReader(record) as reader:
        if (reader.size, len(reader)) != (about["record_bytes"], len(manifest.names) + 1):
            raise DataError(
                f"Packed evaluation set {record}",
                value=f"{len(reader)} records, {reader.size} bytes",
                expected=f"{len(manifest.names) + 1} records, {about['record_bytes']} bytes, as its manifest says",
                remedy="Record and manifest belong to different sets, or the record is cut off: pack the set again.",
            )
        check_blue(reader.read(0).content, name=str(record))
    return record, manifest


def packed_tinyface(path: str | os.PathLike[str]) -> TinyFace:
    """TinyFace from a packed record; paths are ``<file>.rec#<key>``. Errors as for :func:`read_manifest`."""
    record, manifest = read_manifest(path, "tinyface")
    order = np.concatenate([manifest.rows(role) for role in (PROBE, GALLERY, DISTRACTORS)])
    return TinyFace(
        paths=_paths(record, order),
        identities=manifest.label[order],
        num_probe=len(manifest.rows(PROBE)),
        num_mated=len(manifest.rows(GALLERY)),
    )


def packed_scface(path: str | os.PathLike[str]) -> SCface:
    """SCface from a packed record. Errors as for :func:`read_manifest`."""
    record, manifest = read_manifest(path, "scface")
    return SCface(_paths(record, np.arange(len(manifest.names))), manifest.names.tolist())


def packed_ijb(path: str | os.PathLike[str], *kinds: str) -> Ijb:
    """IJB-B or IJB-C from a packed record, aligned. Errors as for :func:`read_manifest`."""
    record, manifest = read_manifest(path, *(kinds or ("ijbb", "ijbc")))
    return Ijb(
        paths=_paths(record, np.arange(len(manifest.names))),
        points=None,
        detector_score=manifest.detector_score,
        templates=manifest.template,
        medias=manifest.medium,
        pairs=manifest.pairs,
        genuine=manifest.genuine,
    )


def blue_image(size: int) -> Image.Image:
    """The colour test's image."""
    return Image.new("RGB", (size, size), BLUE)


def check_blue(content: bytes, *, name: str) -> None:
    """Refuse an encoded image that does not come out pure blue.

    Raises:
        DataError: It is red, which is blue with swapped channels, or something else.
    """
    pixels = decode_face(content, name=f"Colour test of {name}") if content else np.zeros((1, 1, 3), np.uint8)
    if (np.abs(pixels.astype(np.int64) - BLUE) <= _BLUE_TOLERANCE).all():
        return
    mean = [round(float(value)) for value in pixels.reshape(-1, 3).mean(axis=0)]
    swapped = (np.abs(pixels.astype(np.int64) - BLUE[::-1]) <= _BLUE_TOLERANCE).all()
    raise DataError(
        f"Colour test of {name}",
        value="blue, green, red" if swapped else f"mean colour {mean}",
        expected="its record 0 to come out pure blue, channels in the order red, green, blue",
        remedy="Whatever wrote it swapped the channels; pack the set with tools/build_data.py pack-eval."
        if swapped
        else "It was not written by tools/build_data.py pack-eval.",
    )


def _paths(record: Path, rows: NDArray[np.int64]) -> list[Path]:
    return [Path(f"{record}#{row + 1}") for row in rows.tolist()]
