"""The image-list contract: what every reader of a data set returns and every host adapter takes.

Identities and cameras are names (strings) within their data set; whoever needs numbers makes them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qsd_plugin.core.errors import DataError

#: What counts as an image file, in lower case.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp"})

SPLITS = ("train", "query", "gallery")

_SHOWN = 3


@dataclass(frozen=True, order=True)
class ImageItem:
    """One image of a person.

    Args:
        path: Where it can be opened; items sort by it.
        identity: Who it shows.
        camera: Which camera took it; ``None`` where that is not known.
    """

    path: str
    identity: str
    camera: str | None = None


@dataclass(frozen=True)
class ImageSplits:
    """A data set: images to train on, to search with and to search in, each sorted by path.

    Args:
        train: Training images.
        query: Test images that are searched for.
        gallery: Test images that are searched in.
        root: The data-set folder; keys of quality labels are relative to it.
        notes: Sentences the user should read once, for the log.
    """

    train: tuple[ImageItem, ...]
    query: tuple[ImageItem, ...]
    gallery: tuple[ImageItem, ...]
    root: Path
    notes: tuple[str, ...] = ()

    @property
    def has_cameras(self) -> bool:
        """Whether every image has a camera. Where not, none has one: half a filter would be none."""
        return all(item.camera is not None for _, item in self)

    def __iter__(self) -> Iterator[tuple[str, ImageItem]]:
        """Every image with the name of its split."""
        for split in SPLITS:
            for item in getattr(self, split):
                yield split, item


def make_splits(
    train: Iterable[ImageItem],
    query: Iterable[ImageItem],
    gallery: Iterable[ImageItem],
    *,
    root: Path,
    notes: Sequence[str] = (),
) -> ImageSplits:
    """Sorted splits whose cameras are known for all images or for none, the latter with a note."""
    parts = [sorted(part) for part in (train, query, gallery)]
    known = [item.camera is not None for part in parts for item in part]
    if not all(known):
        some = f" ({sum(known)} of {len(known)} images name one)" if any(known) else ""
        note = (
            f"{root}: no camera information{some}. Every image counts as a camera of its own, so no gallery image is "
            "ignored for coming from the query's camera."
        )
        notes = (*notes, note)
        parts = [[replace(item, camera=None) for item in part] for part in parts]
    trained, queries, searched = (tuple(part) for part in parts)
    return ImageSplits(trained, queries, searched, root=root, notes=tuple(notes))


def image_files(folder: Path) -> list[Path]:
    """All image files below ``folder``, sorted, without hidden ones (such as ``._x.jpg`` of macOS archives)."""
    found = []
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        found += [
            Path(parent, name)
            for name in names
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES
        ]
    return sorted(found)


def existing_folder(path: str | os.PathLike[str], what: str) -> Path:
    """``path`` as a folder that exists.

    Raises:
        DataError: It does not, or is something else.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise DataError(
            what,
            value=str(path),
            expected="an existing folder",
            remedy=f"Relative paths start at {Path.cwd()}." if not folder.is_absolute() else "Check the path.",
        )
    return folder


def check_listed(list_file: Path, paths: Sequence[str], *, what: str = "Image list") -> None:
    """Refuse a list of files that do not exist or that are listed more than once.

    Raises:
        DataError: There are such files.
    """
    missing = [path for path in paths if not os.path.isfile(path)]
    if missing:
        raise DataError(
            f"{what} {list_file}: {len(missing)} of {len(paths)} files do not exist",
            value=missing[:_SHOWN],
            expected=f"absolute paths, or paths relative to {list_file.parent.absolute()}",
        )
    repeated = [path for path, count in Counter(paths).items() if count > 1]
    if repeated:
        raise DataError(
            f"{what} {list_file}: {len(repeated)} files are listed more than once",
            value=repeated[:_SHOWN],
            expected="every file once",
        )


def listed_root(folder: Path, paths: Iterable[str]) -> Path:
    """What names of listed images are relative to: the list's folder or, with images outside, their common one."""
    shared = Path(os.path.commonpath([os.path.dirname(path) for path in paths]))
    return folder if shared.is_relative_to(folder) else shared


def single_image_identities(identities: Iterable[str]) -> list[str]:
    """The identities that occur once, sorted."""
    return sorted(identity for identity, count in Counter(identities).items() if count == 1)
