"""Lists of person images: a CSV file with the columns ``path,pid,camid`` and, if it brings its own split, ``split``."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Sequence, Set
from pathlib import Path

from qsd_plugin.core.errors import DataError, did_you_mean
from qsd_plugin.core.files import write_atomically
from qsd_plugin.data.identity_split import COLUMNS, stored_split
from qsd_plugin.data.items import (
    SPLITS,
    ImageItem,
    ImageSplits,
    check_listed,
    listed_root,
    make_splits,
)
from qsd_plugin.data.reid_folders import read_folder

_REQUIRED = COLUMNS[:3]


def read_list(
    file: str | os.PathLike[str],
    *,
    test_fraction: float = 0.5,
    split_seed: int = 0,
    split_folders: Sequence[Path] | None = None,
) -> ImageSplits:
    """Read a data set from a CSV file.

    Args:
        file: The file: a header line, then one image per line. ``path`` is absolute or relative to the file's folder,
            ``pid`` any name, ``camid`` any name or empty, ``split`` one of train, query, gallery.
        test_fraction: Share of the identities to hold out for testing where there is no column ``split``.
        split_seed: Decides which identities that are.
        split_folders: Where that split is stored, in order of preference; default: the file's folder.

    Raises:
        DataError: The file is missing or misformed, or lists files that do not exist.
    """
    path = Path(file).expanduser()
    if not path.is_file():
        raise DataError("Image list", value=str(file), expected="an existing CSV file", remedy="Check the path.")
    folder = path.parent.absolute()
    rows = _rows(path)
    parts: dict[str, list[ImageItem]] = {split: [] for split in SPLITS}
    for line, row in rows:
        image = os.path.normpath(folder / row["path"])
        parts[_split_of(path, line, row)].append(ImageItem(image, row["pid"], row["camid"] or None))
    items = [item for part in parts.values() for item in part]
    paths = [item.path for item in items]
    check_listed(path, paths)
    root = listed_root(folder, paths)
    if "split" in rows[0][1]:
        return make_splits(parts["train"], parts["query"], parts["gallery"], root=root)
    return stored_split(
        make_splits(items, (), (), root=root).train,
        root=root,
        folders=(folder,) if split_folders is None else split_folders,
        stem=f"{path.stem}_split",
        test_fraction=test_fraction,
        seed=split_seed,
    )


def write_list(folder: str | os.PathLike[str], file: str | os.PathLike[str]) -> ImageSplits:
    """List all images of a data-set folder in a CSV file without its split, so that it can be split by identity anew.

    Who is nobody in particular is left out: Market-1501's junk (identity -1) and the distractors of its gallery (0000).

    Args:
        folder: In one of the layouts of :mod:`qsd_plugin.data.reid_folders`.
        file: The CSV file to write: paths are relative to its folder where they lie below it, absolute otherwise.

    Returns:
        The listed images, all of them as ``train``.

    Raises:
        DataError: The folder cannot be read or the file cannot be written.
    """
    target = Path(file).expanduser().absolute()
    splits = read_folder(folder, split_folders=())
    searched = {item.identity for item in splits.query}
    items = [item for split, item in splits if not _is_distractor(split, item, searched)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(_REQUIRED)
    for item in sorted(items):
        path = Path(item.path).absolute()
        shown = path.relative_to(target.parent) if path.is_relative_to(target.parent) else path
        writer.writerow([shown.as_posix(), item.identity, item.camera or ""])
    write_atomically(target, text.getvalue().encode())
    return make_splits(items, (), (), root=splits.root)


def _is_distractor(split: str, item: ImageItem, searched: Set[str]) -> bool:
    # Market-1501's number 0 is everybody who is not searched for, and no person. Its junk is not even read.
    return split == "gallery" and item.identity.strip("0") == "" and item.identity not in searched


def _rows(file: Path) -> list[tuple[int, dict[str, str]]]:
    with file.open(newline="", encoding="utf-8-sig") as stream:
        reader = csv.DictReader(stream, skipinitialspace=True)
        header = [name.strip() for name in reader.fieldnames or ()]
        reader.fieldnames = header
        missing = [name for name in _REQUIRED if name not in header]
        if missing:
            raise DataError(
                f"Image list {file}: header line",
                value=",".join(header),
                expected=f"the columns {','.join(_REQUIRED)} and optionally split",
                remedy=f"Add {', '.join(missing)} to the first line.",
            )
        rows = []
        for row in reader:
            cells = {name: (row[name] or "").strip() for name in COLUMNS if name in header}
            if not cells["path"] or not cells["pid"]:
                raise DataError(f"Image list {file}, line {reader.line_num}", value=cells, expected="a path and a pid")
            rows.append((reader.line_num, cells))
    if not rows:
        raise DataError("Image list without images", value=str(file), expected="one image per line after the header")
    return rows


def _split_of(file: Path, line: int, row: dict[str, str]) -> str:
    split = row.get("split", "train")
    if split not in SPLITS:
        raise DataError(
            f"Image list {file}, line {line}: split",
            value=split,
            expected=", ".join(SPLITS),
            remedy=did_you_mean(split, SPLITS),
        )
    return split
