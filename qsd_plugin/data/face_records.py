"""Face data sets from folders to records and back: identities, classes, and what a folder has to look like."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.files import new_folder
from qsd_plugin.core.progress import progress
from qsd_plugin.data.face_images import storable, suffix
from qsd_plugin.data.items import existing_folder, image_files
from qsd_plugin.data.recordio import EXACT_LABELS, RecordReader, RecordWriter

_SHOWN = 5


@dataclass(frozen=True)
class WrittenRecords:
    """What :func:`folder_to_records` did.

    Args:
        images: Number of images.
        identities: Names of the folders; the place in the list is the class.
        skipped: Images left out, each with the reason.
    """

    images: int
    identities: list[str]
    skipped: dict[str, str]


def face_folder(folder: str | os.PathLike[str]) -> dict[str, list[Path]]:
    """The images of each identity, sorted: ``<folder>/<identity>/.../*.jpg``.

    Raises:
        DataError: No such folder, no images, or images that lie in no identity's folder.
    """
    root = existing_folder(folder, "Folder of faces")
    identities: defaultdict[str, list[Path]] = defaultdict(list)
    for file in image_files(root):
        inner = file.relative_to(root).parts
        if len(inner) == 1:
            raise DataError(
                "Face without an identity",
                value=str(file),
                expected=f"{root}/<identity>/{file.name}",
                remedy="Move the images into folders named after the identities.",
            )
        identities[inner[0]].append(file)
    if not identities:
        raise DataError(
            "Folder of faces without images", value=str(root), expected="<identity>/*.jpg", remedy="Check the path."
        )
    return dict(sorted(identities.items()))


def classes(labels: NDArray[np.float32], *, name: str) -> NDArray[np.int64]:
    """Record labels as class numbers, [N].

    Raises:
        DataError: A label is no whole number that float32 holds exactly.
    """
    wrong = ~((labels >= 0) & (labels <= EXACT_LABELS) & (labels == np.floor(labels)))
    if wrong.any():
        raise DataError(
            f"{name}: {int(wrong.sum())} of {len(labels)} labels are no classes",
            value=float(labels[wrong][0]),
            expected=f"whole numbers from 0 to {EXACT_LABELS}",
            remedy="The file is no face data set, or is damaged: tools/build_data.py check FILE.",
        )
    return labels.astype(np.int64)


def folder_to_records(
    folder: str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    size: int = 112,
    header: bool = True,
    listing: bool = False,
    convert: bool = False,
    skip_damaged: bool = False,
) -> WrittenRecords:
    """Write a folder of aligned crops as ``.rec``, ``.idx`` and ``property``. Images go in as they are.

    Args:
        folder: As for :func:`face_folder`; classes are numbered in the order of the folders' names.
        path: The ``.rec`` file.
        size: Height and width that every crop must have, in pixels.
        header: Whether to write arcface_torch's layout with header and ranges; default: yes.
        listing: Whether to write ``.lst`` as well, which tells which folder a class was.
        convert: See :func:`~qsd_plugin.data.face_images.storable`.
        skip_damaged: Whether to leave out unusable images, and identities without any other; default: refuse them.

    Raises:
        DataError: The folder cannot be read, or holds images that are no such crops; nothing is written then.
    """
    root = Path(folder).expanduser()
    found = face_folder(root)
    problems: dict[str, str] = {}
    usable: dict[str, list[Path]] = defaultdict(list)
    every = [(name, file) for name, files in found.items() for file in files]
    for name, file in progress(every, "Checking images"):
        reason = _why_not(file, size, convert)
        if reason:
            problems[str(file.relative_to(root))] = reason
        else:
            usable[name].append(file)
    if (problems and not skip_damaged) or not usable:
        raise _refused(root, problems, len(every))
    with RecordWriter(path, image_size=(size, size), listing=listing) as writer:
        starts = np.cumsum([1, *map(len, usable.values())]).tolist()
        if header:
            writer.append(b"", (starts[-1], starts[-1] + len(usable)))
        every = [(name, file) for name, files in usable.items() for file in files]
        number = {name: place for place, name in enumerate(usable)}
        for name, file in progress(every, "Writing records"):
            content = _content(file)
            if convert:
                content = storable(content, name=str(file), size=size, convert=True)
            writer.append(content, number[name], name=file.relative_to(root).as_posix())
        if header:
            for first, end in pairwise(starts):
                writer.append(b"", (first, end))
    return WrittenRecords(len(every), list(usable), problems)


def records_to_folder(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> tuple[int, int]:
    """Write every image of a record file to ``<folder>/<class>/<key>.jpg`` as it is; all of them or none.

    Returns:
        Numbers of images and of classes.

    Raises:
        DataError: The folder exists and is not empty, or a record is damaged.
    """
    with RecordReader(path) as reader, new_folder(Path(folder).expanduser()) as partial:
        keys = reader.image_keys
        numbers = classes(reader.image_labels, name=str(path))
        digits = len(str(int(numbers.max(initial=0)))), len(str(int(keys.max(initial=0))))
        pairs = list(zip(keys.tolist(), numbers.tolist(), strict=True))
        for key, number in progress(pairs, "Writing images"):
            content = reader.read(key).content
            file = partial / f"{number:0{digits[0]}d}" / f"{key:0{digits[1]}d}{suffix(content)}"
            file.parent.mkdir(exist_ok=True)
            file.write_bytes(content)
    return len(keys), len(np.unique(numbers))


def _why_not(file: Path, size: int, convert: bool) -> str:
    """Why an image cannot be stored; empty when it can."""
    try:
        storable(_content(file), name=str(file), size=size, convert=convert)
    except DataError as error:
        return str(error)
    return ""


def _content(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise DataError("Image", value=str(file), expected="a readable file", remedy=f"{error.strerror}.") from error


def _refused(root: Path, problems: dict[str, str], total: int) -> DataError:
    listed: Sequence[str] = [f"\n  {reason}" for reason in list(problems.values())[:_SHOWN]]
    rest = f"\n  and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
    return DataError(
        f"Folder {root}: {len(problems)} of {total} images cannot be stored",
        remedy=f"Repair or remove them, or pass --skip-damaged:{''.join(listed)}{rest}",
    )
