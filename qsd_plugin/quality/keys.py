"""Image keys, and how the paths of a host find them.

An image's **key** is its POSIX path relative to the data-set folder, prefixed by the data-set's name:
``Market1501/bounding_box_train/0002_c1s1_000451_03.jpg``. Images inside a RecordIO file have paths such as
``/data/faces/train.rec#17``; their key is the file's stem with the key of its index, ``train#17``.
"""

from __future__ import annotations

import os
import posixpath
import re
from collections.abc import Sequence
from pathlib import PurePath

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import LabelError

PathLike = str | os.PathLike[str]

_RECORD_PATH = re.compile(r"(.+\.rec)#(\d+)", re.DOTALL)


class KeyIndex:
    """Rows of a table of images, found by the paths a host uses.

    Answers are remembered per path, so a look-up in the training loop is a dictionary access.

    Args:
        keys: Image keys, N different ones.
        dataset: The data-set's name that keys may carry in front.
    """

    def __init__(self, keys: Sequence[str], *, dataset: str | None = None) -> None:
        self._dataset = dataset
        self._row_of_key = {key: row for row, key in enumerate(keys)}
        by_basename = {posixpath.basename(key): row for row, key in enumerate(keys)}
        self._row_of_basename = by_basename if len(by_basename) == len(keys) else {}
        self._memory: dict[tuple[str | None, bool], dict[str, int]] = {}

    def rows(
        self, paths: Sequence[PathLike], *, root: PathLike | None = None, basenames: bool = True
    ) -> NDArray[np.int64]:
        """The row of each path, [B]; -1 where there is none.

        A path matches, in this order, the key it equals (as given, tidied up, or made absolute); the key built from its
        place below ``root`` with or without the data-set's name in front; and, if no two keys share a basename, the key
        with its basename. An image in a record file matches its key under either of the latter two rules.

        Args:
            paths: Image paths, B of them.
            root: The data-set folder on this machine.
            basenames: Whether the last rule applies. Switch it off where images of other data sets are looked up too.
        """
        found = self._memory.setdefault((None if root is None else os.fspath(root), basenames), {})
        names = [os.fspath(path) for path in paths]
        for name in names:
            if name not in found:
                found[name] = self._find(name, root, basenames)
        return np.fromiter(map(found.__getitem__, names), dtype=np.int64, count=len(names))

    def _find(self, path: str, root: PathLike | None, basenames: bool) -> int:
        posix = PurePath(path).as_posix()
        candidates = [path, posixpath.normpath(posix), PurePath(os.path.abspath(path)).as_posix()]
        below = None if root is None else _below(path, root)
        if below is not None:
            candidates += [below] if self._dataset is None else [f"{self._dataset}/{below}", below]
        record = split_record_path(path)
        if record is not None and (below is not None or basenames):
            candidates.append(record_key(*record))
        for candidate in candidates:
            if candidate in self._row_of_key:
                return self._row_of_key[candidate]
        return self._row_of_basename.get(posixpath.basename(posix), -1) if basenames else -1


def label_key(path: PathLike, *, root: PathLike, dataset: str) -> str:
    """The key of an image: its path below the data-set folder, behind the data-set's name.

    An image in a record file has the key of :func:`record_key` instead.

    Args:
        path: Image path, absolute or relative to the working directory.
        root: The data-set folder, e.g. ``datasets/Market-1501-v15.09.15``.
        dataset: The data-set's registered name, e.g. ``Market1501``.

    Raises:
        LabelError: The image does not lie below ``root``.
    """
    below = _below(os.fspath(path), root)
    if below is None:
        raise LabelError(
            "Image outside its data-set folder",
            value=os.fspath(path),
            expected=f"a path below {os.fspath(root)}",
            remedy="Pass the folder the data set was read from as root.",
        )
    record = split_record_path(path)
    return f"{dataset}/{below}" if record is None else record_key(*record)


def split_record_path(path: PathLike) -> tuple[str, int] | None:
    """File and index key of an image in a record file, ``("/data/train.rec", 17)``; ``None`` for any other path."""
    match = _RECORD_PATH.fullmatch(os.fspath(path))
    return None if match is None else (match[1], int(match[2]))


def record_key(file: PathLike, key: int) -> str:
    """The key of an image in a record file: ``train#17`` for the index key 17 of ``/data/train.rec``."""
    return f"{PurePath(file).stem}#{key}"


def _below(path: str, root: PathLike) -> str | None:
    """``path`` relative to ``root`` with forward slashes, ``None`` if it lies elsewhere; links are not followed."""
    base, full = os.path.abspath(root), os.path.abspath(path)
    if not full.startswith(os.path.join(base, "")):
        return None
    return PurePath(os.path.relpath(full, base)).as_posix()
