"""Reading MLR sets: those of :mod:`qsd_plugin.data.mlr`, and the authors' own folders, which look the same.

``{train,query,gallery}/<person>/<person>_c<camera>_<number>.jpg``; camera 0 is the degraded domain. ``val``, where
there is one, is a copy of ``train`` and not read.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
from pathlib import Path

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.items import ImageItem, ImageSplits, existing_folder
from qsd_plugin.data.mlr import MANIFEST_FILE, META_FILE
from qsd_plugin.data.reid_folders import read_folder

#: The degraded domain's camera, as the names of files have it.
DEGRADED = "0"

_CAMERA = re.compile(r"_c\d+")
_FOLDERS = ("train", "query", "gallery")
_NAMES = "<person>/<person>_c<camera>_<number>.jpg, such as 00001/00001_c0_0000.jpg"


def read_mlr(folder: str | Path) -> ImageSplits:
    """Images of an MLR set or of CAVIAR.

    Raises:
        DataError: It is no such folder, has images of one domain only, or lacks images that its manifest lists.
    """
    root = existing_folder(folder, "MLR set")
    missing = [name for name in _FOLDERS if not (root / name).is_dir()]
    if missing:
        raise DataError(
            f"MLR set {root}",
            value=f"no folder {missing[0]}",
            expected=f"{', '.join(_FOLDERS)} with {_NAMES}",
            remedy="tools/build_data.py mlr SOURCE FOLDER makes one of Market-1501, CUHK03, VIPeR or CAVIAR.",
        )
    splits = read_folder(root)
    if not splits.has_cameras:  # then none of the items names one
        split, item = next((split, item) for split, item in splits if not _CAMERA.search(Path(item.path).name))
        raise DataError(f"MLR set {root}: {split} image without a camera", value=item.path, expected=_NAMES)
    _check_domains(root, splits)
    rates = read_rates(root)
    listed = {str(root / path) for path in rates}
    found = {item.path for _, item in splits}
    if rates and listed != found:
        raise DataError(
            f"MLR set {root} is not the one of its {MANIFEST_FILE}",
            value=f"{len(listed - found)} images missing, {len(found - listed)} that it does not list",
            expected=f"its {len(listed)} images",
            remedy="Make it again, or remove the manifest; then results by rate are missing.",
        )
    return splits


def read_rates(folder: Path) -> dict[str, int]:
    """The factor by which each image was shrunk, by its path below ``folder``: 1 for clean ones, 0 where not known.

    Empty without a manifest.

    Raises:
        DataError: The manifest is damaged.
    """
    file, meta = Path(folder) / MANIFEST_FILE, Path(folder) / META_FILE
    if not meta.is_file():
        return {}
    try:
        digest = json.loads(meta.read_text(encoding="utf-8"))["manifest_sha256"]
        content = file.read_bytes()
        rates = {row["path"]: int(row["rate"]) for row in csv.DictReader(content.decode().splitlines())}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"Manifest of {folder}",
            value=f"{type(error).__name__}: {error}",
            expected=f"{MANIFEST_FILE} and {META_FILE} as they were written",
        ) from error
    if hashlib.sha256(content).hexdigest() != digest:
        raise DataError(
            f"Manifest {file}",
            value="other content",
            expected=f"SHA-256 {digest[:12]}... of {META_FILE}",
            remedy="Make the set again.",
        )
    return rates


def _check_domains(root: Path, splits: ImageSplits) -> None:
    def degraded(item: ImageItem) -> bool:
        return item.camera == DEGRADED

    count = sum(map(degraded, splits.train))
    wrong = {
        "no degraded training images (camera c0)": not count,
        "no clean training images (cameras c1, c2, ...)": count == len(splits.train),
        "queries that are not degraded (not of camera c0)": not all(map(degraded, splits.query)),
        "degraded gallery images (camera c0)": any(map(degraded, splits.gallery)),
        "no queries": not splits.query,
        "no gallery images": not splits.gallery,
    }
    problems = [text for text, present in wrong.items() if present]
    if problems:
        raise DataError(
            f"MLR set {root}",
            value="; ".join(problems),
            expected="images of camera c0 and of others to train on, queries of c0 and a gallery of the others",
        )
