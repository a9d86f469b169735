"""What is in a folder or list of person images, and what is wrong with it, before a run finds out."""

from __future__ import annotations

import hashlib
import io
import os
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.progress import progress
from qsd_plugin.data.images import read_rgb
from qsd_plugin.data.items import SPLITS, ImageItem, ImageSplits, single_image_identities
from qsd_plugin.data.reid_folders import read_folder
from qsd_plugin.data.reid_lists import read_list

#: Lower bounds of the classes of the height histogram, in pixels.
HEIGHT_CLASSES = (0, 32, 64, 128, 256)
_SHOWN = 5


@dataclass(frozen=True)
class SplitSummary:
    """One split: counts, the identities with a single image, and the sizes of its readable images in pixels."""

    images: int
    identities: int
    cameras: int
    single_image_identities: list[str]
    heights: dict[str, int]
    common_sizes: dict[str, int]


@dataclass(frozen=True)
class FolderReport:
    """The result of :func:`check_data`.

    File names are relative to the data-set folder.

    Attributes:
        source: The folder or list that was checked.
        splits: What train, query and gallery hold.
        unreadable: Files that cannot be decoded, each with the reason.
        shared_identities: Identities in the training set and among the queries or the gallery as well.
        identical_files: Groups of files with equal content in more than one split.
        unmatched_queries: Queries without a gallery image of their identity (from another camera, where known).
        notes: What the reader of the layout has to say.
    """

    source: str
    splits: dict[str, SplitSummary]
    unreadable: dict[str, str]
    shared_identities: list[str]
    identical_files: list[list[str]]
    unmatched_queries: list[str]
    notes: list[str]

    @property
    def problems(self) -> list[str]:
        """What must be repaired before results mean anything, one sentence each."""
        found = [
            (self.unreadable, "files cannot be decoded"),
            (self.shared_identities, "identities are trained on and tested on"),
            ([" = ".join(group) for group in self.identical_files], "images lie in more than one split"),
        ]
        return [f"{len(what)} {sentence}: {_some(list(what))}" for what, sentence in found if what]

    @property
    def remarks(self) -> list[str]:
        """What is worth knowing and harms no result."""
        single = self.splits["train"].single_image_identities
        found = [
            (single, "training identities have one image only; samplers repeat it"),
            (self.unmatched_queries, "queries have nothing to find in the gallery and do not count"),
        ]
        return [*self.notes, *(f"{len(what)} {sentence}: {_some(what)}" for what, sentence in found if what)]

    def as_dict(self) -> dict[str, Any]:
        """Everything, in JSON types."""
        return {**asdict(self), "problems": self.problems, "remarks": self.remarks}

    def table(self) -> str:
        """Everything that fits a terminal."""
        lines = [f"{self.source}", f"{'split':8} {'identities':>10} {'images':>8} {'cameras':>8}  heights in pixels"]
        for name, split in self.splits.items():
            heights = ", ".join(f"{label}: {count}" for label, count in split.heights.items() if count)
            cameras = str(split.cameras) if split.cameras else "-"
            lines.append(f"{name:8} {split.identities:10} {split.images:8} {cameras:>8}  {heights}")
            if split.common_sizes:
                sizes = ", ".join(f"{size}: {count}" for size, count in split.common_sizes.items())
                lines.append(f"{'':8} most frequent sizes {sizes}")
        lines += [f"note: {remark}" for remark in self.remarks]
        lines += [f"PROBLEM: {problem}" for problem in self.problems] or ["no problems found"]
        return "\n".join(lines)


def check_data(source: str | os.PathLike[str], *, test_fraction: float = 0.5, split_seed: int = 0) -> FolderReport:
    """Read every image of a data set and look for what would spoil a run.

    Args:
        source: A folder as for :func:`~qsd_plugin.data.reid_folders.read_folder`, or a CSV file as for
            :func:`~qsd_plugin.data.reid_lists.read_list`. Nothing is written there.
        test_fraction: For data without queries: the split that would be made is the one checked.
        split_seed: Likewise.

    Raises:
        DataError: There is nothing to check.
    """
    read = read_list if Path(source).is_file() else read_folder
    options: dict[str, Any] = {"test_fraction": test_fraction, "split_seed": split_seed, "split_folders": ()}
    splits = read(source, **options)
    unreadable: dict[str, str] = {}
    sizes: defaultdict[str, Counter[tuple[int, int]]] = defaultdict(Counter)
    contents: defaultdict[bytes, list[tuple[str, str]]] = defaultdict(list)
    for split, item in progress(list(splits), "Reading images"):
        name = os.path.relpath(item.path, splits.root)
        digest, size, reason = _examine(item.path)
        if digest:
            contents[digest].append((split, name))
        if size:
            sizes[split][size] += 1
        else:
            unreadable[name] = reason
    identical = [
        sorted(name for _, name in group) for group in contents.values() if len({split for split, _ in group}) > 1
    ]
    return FolderReport(
        source=str(source),
        splits={split: _summary(getattr(splits, split), sizes[split]) for split in SPLITS},
        unreadable=unreadable,
        shared_identities=_shared_identities(splits),
        identical_files=sorted(identical),
        unmatched_queries=_unmatched_queries(splits),
        notes=list(splits.notes),
    )


def _examine(path: str) -> tuple[bytes, tuple[int, int] | None, str]:
    """Digest of a file's content, its size in pixels, and why there is none."""
    digest = b""
    try:
        content = Path(path).read_bytes()
        digest = hashlib.blake2b(content, digest_size=16).digest()
        return digest, read_rgb(path, io.BytesIO(content)).size, ""
    except OSError as error:
        return digest, None, str(error)
    except DataError as error:
        return digest, None, error.remedy


def _summary(items: tuple[ImageItem, ...], sizes: Counter[tuple[int, int]]) -> SplitSummary:
    heights = dict.fromkeys(HEIGHT_CLASSES, 0)
    for (_, height), count in sizes.items():
        heights[max(bound for bound in HEIGHT_CLASSES if bound <= height)] += count
    ends = [*(f"-{bound - 1}" for bound in HEIGHT_CLASSES[1:]), "+"]
    return SplitSummary(
        images=len(items),
        identities=len({item.identity for item in items}),
        cameras=len({item.camera for item in items} - {None}),
        single_image_identities=single_image_identities(item.identity for item in items),
        heights={f"{bound}{end}": heights[bound] for bound, end in zip(HEIGHT_CLASSES, ends, strict=True)},
        common_sizes={f"{width}x{height}": count for (width, height), count in sizes.most_common(3)},
    )


def _shared_identities(splits: ImageSplits) -> list[str]:
    trained = {item.identity for item in splits.train}
    return sorted(trained & {item.identity for item in (*splits.query, *splits.gallery)})


def _unmatched_queries(splits: ImageSplits) -> list[str]:
    cameras: defaultdict[str, set[str | None]] = defaultdict(set)
    for item in splits.gallery:
        cameras[item.identity].add(item.camera)
    return [
        os.path.relpath(item.path, splits.root)
        for item in splits.query
        if not cameras[item.identity] - ({item.camera} if item.camera is not None else set())
    ]


def _some(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
