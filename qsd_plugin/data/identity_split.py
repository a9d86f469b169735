"""Held-out identities for data without a query folder: drawn from a seed, written to a file, the same ever after."""

from __future__ import annotations

import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.items import SPLITS, ImageItem, ImageSplits, make_splits

COLUMNS = ("path", "pid", "camid", "split")


def draw_split(items: Iterable[ImageItem], *, test_fraction: float, seed: int, root: Path) -> ImageSplits:
    """Hold out whole identities for testing and choose the queries among their images.

    Only identities that can be found again are held out: those with two images or, where cameras are known, with
    images of two cameras.

    Args:
        items: All images.
        test_fraction: Share of the identities to hold out, between 0 and 1.
        seed: Decides which; >= 0.
        root: The data-set folder.

    Raises:
        ConfigError: ``test_fraction`` out of range.
        DataError: Too few identities to split.
    """
    by_identity = _by_identity(items)
    testable = [name for name, images in by_identity.items() if _can_be_found(images)]
    drawn = draw_held_out(testable, total=len(by_identity), test_fraction=test_fraction, seed=seed)
    if not drawn or len(drawn) == len(by_identity):
        raise DataError(
            f"{root}: no test set can be split off",
            value=f"{len(by_identity)} identities, {len(testable)} of them seen twice (by two cameras where known)",
            expected="two identities or more, one of them seen twice",
            remedy="Add identities, or provide query and gallery folders.",
        )
    held_out = set(drawn)
    train = [item for name, images in by_identity.items() if name not in held_out for item in images]
    query, gallery = draw_queries((item for name in held_out for item in by_identity[name]), seed=seed)
    return make_splits(train, query, gallery, root=root)


def draw_held_out(testable: Sequence[str], *, total: int, test_fraction: float, seed: int) -> list[str]:
    """Who is held out for testing: a share of all identities, drawn from those that can be tested.

    Args:
        testable: Identities to draw from, in an order that is the same every time.
        total: Number of all identities.
        test_fraction: Share of ``total`` to hold out, between 0 and 1; at least one identity.
        seed: Decides which; >= 0.

    Raises:
        ConfigError: ``test_fraction`` out of range.
    """
    if not 0.0 < test_fraction < 1.0:
        raise ConfigError("Share of identities held out for testing", value=test_fraction, expected="0 < share < 1")
    count = min(max(1, round(test_fraction * total)), len(testable))
    order = numpy_stream(seed, "held-out identities").permutation(len(testable))
    return [testable[place] for place in order[:count]]


def draw_queries(items: Iterable[ImageItem], *, seed: int) -> tuple[list[ImageItem], list[ImageItem]]:
    """Divide test images into queries and gallery so that every query can be found.

    Where cameras are known, an identity gets one query from each camera as far as a gallery image of another camera
    remains for every one of them; else a quarter of its images, at least one and not all. An identity that cannot be
    found again is gallery only.
    """
    query: list[ImageItem] = []
    gallery: list[ImageItem] = []
    for name, images in _by_identity(items).items():
        chosen: list[ImageItem] = []
        if _can_be_found(images):
            order = numpy_stream(seed, "queries", name).permutation(len(images))
            shuffled = [images[place] for place in order]
            with_cameras = all(image.camera is not None for image in images)
            chosen = _one_per_camera(shuffled) if with_cameras else shuffled[: max(1, len(images) // 4)]
        query += chosen
        gallery += [image for image in images if image not in chosen]
    return query, gallery


def stored_split(
    items: Sequence[ImageItem],
    *,
    root: Path,
    folders: Sequence[Path],
    stem: str,
    test_fraction: float,
    seed: int,
) -> ImageSplits:
    """The split of an earlier run, or a new one that is stored for later runs.

    Args:
        items: All images, below ``root``.
        root: The data-set folder; the file holds paths relative to it.
        folders: Where the file may lie; a new one goes to the first of them that can be written. Empty: not stored.
        stem: File name without ``_seed<seed>_test<percent>.csv``.
        test_fraction: As for :func:`draw_split`.
        seed: As for :func:`draw_split`.

    Raises:
        DataError: The stored split names other images than there are now, or the split cannot be drawn.
    """
    name = f"{stem}_seed{seed}_test{100 * test_fraction:g}.csv"
    stored = next((folder / name for folder in folders if (folder / name).is_file()), None)
    if stored is not None:
        splits = _load(stored, items, root)
    else:
        splits = draw_split(items, test_fraction=test_fraction, seed=seed, root=root)
        stored = _store([folder / name for folder in folders], splits)
    held_out = len({item.identity for item in splits.query})
    trained = len({item.identity for item in splits.train})
    where = f"stored in {stored}" if stored else "not stored"
    note = f"{root}: no query folder. {held_out} identities are held out for testing, {trained} trained on ({where})."
    return replace(splits, notes=(*splits.notes, note))


def _by_identity(items: Iterable[ImageItem]) -> dict[str, list[ImageItem]]:
    groups: defaultdict[str, list[ImageItem]] = defaultdict(list)
    for item in sorted(items):
        groups[item.identity].append(item)
    return dict(sorted(groups.items()))


def _can_be_found(images: Sequence[ImageItem]) -> bool:
    cameras = {image.camera for image in images}
    return len(images) > 1 if None in cameras else len(cameras) > 1


def _one_per_camera(shuffled: Sequence[ImageItem]) -> list[ImageItem]:
    chosen: list[ImageItem] = []
    for image in shuffled:
        if image.camera in {query.camera for query in chosen}:
            continue
        queries = [*chosen, image]
        left = {rest.camera for rest in shuffled if rest not in queries}
        if all(left - {query.camera} for query in queries):
            chosen = queries
    return chosen


def _store(places: Iterable[Path], splits: ImageSplits) -> Path | None:
    for place in places:
        try:
            write_atomically(place, _table(splits))
        except DataError:  # a data folder is often read-only
            continue
        return place
    return None


def _table(splits: ImageSplits) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for split, item in splits:
        path = Path(item.path).relative_to(splits.root).as_posix()
        writer.writerow([path, item.identity, item.camera or "", split])
    return text.getvalue().encode()


def _load(file: Path, items: Sequence[ImageItem], root: Path) -> ImageSplits:
    with file.open(newline="", encoding="utf-8") as stream:
        split_of = {row["path"]: row["split"] for row in csv.DictReader(stream)}
    parts: dict[str, list[ImageItem]] = {split: [] for split in SPLITS}
    unknown = []
    for item in items:
        split = split_of.pop(Path(item.path).relative_to(root).as_posix(), None)
        if split in parts:
            parts[split].append(item)
        else:
            unknown.append(item.path)
    if unknown or split_of:
        raise DataError(
            f"Stored split {file} is of other images",
            value=f"{len(unknown)} images without a place in it and {len(split_of)} entries without an image, "
            f"for example {(unknown or list(split_of))[0]}",
            expected="the images it was made for",
            remedy="Delete the file to split anew; results are then not comparable with earlier ones.",
        )
    return make_splits(parts["train"], parts["query"], parts["gallery"], root=root)
