"""Folders of person images: Market-1501's layout, one folder per identity, or no split at all.

Understood below the data-set folder:

* ``train/<id>/*.jpg``, ``query/<id>/*.jpg``, ``gallery/<id>/*.jpg`` (``gallery`` may be called ``test``);
* the same folders, or Market's ``bounding_box_train``, ``query``, ``bounding_box_test``, with images named
  ``<id>_c<camera>...`` directly in them;
* ``<id>/*.jpg`` and nothing else: identities for testing are held out and the split is stored.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.identity_split import draw_queries, stored_split
from qsd_plugin.data.items import IMAGE_SUFFIXES, ImageItem, ImageSplits, existing_folder, image_files, make_splits

#: Names that the folder of each split may have.
FOLDER_NAMES = {
    "train": ("bounding_box_train", "train"),
    "query": ("query",),
    "gallery": ("bounding_box_test", "gallery", "test"),
}
#: Market-1501's mark of a box that is to be ignored.
JUNK_IDENTITY = "-1"

_IDENTITY = re.compile(r"(-?\d+)_")
_CAMERA = re.compile(r"_c(\d+)")


def read_folder(
    folder: str | os.PathLike[str],
    *,
    test_fraction: float = 0.5,
    split_seed: int = 0,
    split_folders: Sequence[Path] | None = None,
) -> ImageSplits:
    """Read a data set from its folder, whichever of the layouts above it has.

    Args:
        folder: The data-set folder.
        test_fraction: Share of the identities to hold out for testing where there is no query folder.
        split_seed: Decides which identities that are, or which test images become queries.
        split_folders: Where the split is stored, in order of preference; default: ``folder``.

    Raises:
        DataError: No such folder, no images in it, or file names without an identity.
    """
    root = existing_folder(folder, "Data-set folder")
    parts = {split: _part_folder(root, split) for split in FOLDER_NAMES}
    read = {split: read_part(part) for split, part in parts.items() if part is not None}
    if "query" in read and "gallery" not in read:
        raise DataError(
            f"Data-set folder {root} has queries and nothing to search in",
            value=str(parts["query"]),
            expected=f"a folder {' or '.join(FOLDER_NAMES['gallery'])} beside it",
        )
    if "query" in read:
        return _checked(make_splits(read.get("train", ()), read["query"], read["gallery"], root=root))
    if "gallery" in read:
        query, gallery = draw_queries(read["gallery"], seed=split_seed)
        note = f"{root}: no query folder. {len(query)} of the test images are queries (seed {split_seed})."
        return _checked(make_splits(read.get("train", ()), query, gallery, root=root, notes=(note,)))
    items = read["train"] if "train" in read else read_part(root)
    if not items:
        raise _no_images(root)
    return stored_split(
        make_splits(items, (), (), root=root).train,
        root=root,
        folders=(root,) if split_folders is None else split_folders,
        stem="qsd_split",
        test_fraction=test_fraction,
        seed=split_seed,
    )


def read_part(folder: Path) -> list[ImageItem]:
    """The images of one split: the identity is the folder's name or, directly in ``folder``, the file name's beginning.

    Market-1501's junk (identity -1) is left out.

    Raises:
        DataError: A file name without an identity.
    """
    items = []
    for file in image_files(folder):
        inner = file.relative_to(folder).parts
        identity = inner[0] if len(inner) > 1 else _identity_of(file)
        if identity != JUNK_IDENTITY:
            camera = _CAMERA.search(file.name)
            items.append(ImageItem(str(file), identity, str(int(camera[1])) if camera else None))
    return items


def _part_folder(root: Path, split: str) -> Path | None:
    found = [root / name for name in FOLDER_NAMES[split] if (root / name).is_dir()]
    if len(found) > 1:
        raise DataError(
            f"Data-set folder {root} has more than one {split} folder",
            value=[folder.name for folder in found],
            expected="one",
            remedy="Rename or remove the others.",
        )
    return found[0] if found else None


def _identity_of(file: Path) -> str:
    match = _IDENTITY.match(file.name)
    if match is None:
        raise DataError(
            "Image without an identity",
            value=str(file),
            expected="a Market-1501 name such as 0002_c1s1_000451_03.jpg, or a folder per identity",
            remedy="Move the images into folders named after the identities, or list them in a CSV file (ReIDList).",
        )
    return match[1]


def _checked(splits: ImageSplits) -> ImageSplits:
    if not any(True for _ in splits):
        raise _no_images(splits.root)
    return splits


def _no_images(root: Path) -> DataError:
    return DataError(
        "Data-set folder without images",
        value=str(root),
        expected=f"files ending in {', '.join(sorted(IMAGE_SUFFIXES))} below train/, query/, gallery/ or <id>/",
        remedy="Check that the folder is the right one and its archive is unpacked.",
    )
