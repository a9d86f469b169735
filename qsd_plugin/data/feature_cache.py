"""A teacher's embeddings of every training image and its mirror image, kept in a folder.

::

    features.npy     [N, 2, D] float16 or float32, C order: row = image, [row, 0] as it is, [row, 1] mirrored
    keys.json        the N image keys (:mod:`qsd_plugin.quality.keys`), in the order of the rows
    cache.json       shape, digest of the keys, what the embeddings depend on; there if, and only if, all is complete

While the cache is being made there is ``building.json`` instead of ``cache.json``, and ``done.npy`` says which rows are
there (:mod:`qsd_plugin.data.feature_cache_writer`).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import DataError

FEATURES, KEYS, HEADER, BUILDING, DONE = "features.npy", "keys.json", "cache.json", "building.json", "done.npy"
DTYPES = ("float16", "float32")
#: Changes when the files mean something else.
FORMAT = 1

_SHOWN = 3
_REMAKE = "Make it again, or name the cache that belongs to this run."


class FeatureCache:
    """A finished cache, read from any process: a pickled reader opens the file anew, a forked one shares the mapping.

    Args:
        folder: Where the cache lies.
        dim: Embedding size D that is needed; ``None`` takes any.

    Raises:
        DataError: There is no finished cache, its files do not fit together, or it has another embedding size.
    """

    def __init__(self, folder: str | os.PathLike[str], *, dim: int | None = None) -> None:
        self.folder = Path(folder)
        self.header = _read_header(self.folder)
        self.count: int = self.header["count"]
        self.dim: int = self.header["dim"]
        self.dtype: str = self.header["dtype"]
        self._state: tuple[int, int] | None = None
        self._row_of_key: dict[str, int] | None = None
        self._features: NDArray[Any] | None = self._open()
        if dim is not None and dim != self.dim:
            raise DataError(
                f"Teacher features in {self.folder}: embedding size", value=self.dim, expected=str(dim), remedy=_REMAKE
            )

    def __len__(self) -> int:
        """Number of images."""
        return self.count

    @property
    def identity(self) -> dict[str, str]:
        """What the embeddings depend on, by name: teacher, preprocessing, decoder, images."""
        return dict(self.header["identity"])

    def require(self, expected: Mapping[str, str]) -> None:
        """Refuse a cache that was made with something else.

        Args:
            expected: Some of the entries of :attr:`identity`.

        Raises:
            DataError: One differs or is not there; names all of them.
        """
        found = self.identity
        different = [name for name, value in expected.items() if found.get(name) != value]
        if different:
            raise DataError(
                f"Teacher features in {self.folder} were made with another {' and another '.join(different)}",
                value=", ".join(str(found.get(name)) for name in different),
                expected=", ".join(expected[name] for name in different),
                remedy=_REMAKE,
            )

    def rows(self, keys: Sequence[str]) -> NDArray[np.int64]:
        """The row of each image key, [B]; a dictionary access each, after the first call has read the keys.

        Raises:
            DataError: An image is not in the cache, or ``keys.json`` is another cache's.
        """
        if self._row_of_key is None:
            stored = self._read_keys()
            if stored == list(keys):  # the usual case needs no dictionary of millions of images
                return np.arange(len(stored))
            self._row_of_key = {key: row for row, key in enumerate(stored)}
        missing = [key for key in keys if key not in self._row_of_key]
        if missing:
            raise DataError(
                f"Teacher features in {self.folder}: {len(missing)} of {len(keys)} images are not in it",
                value=", ".join(missing[:_SHOWN]),
                expected="an entry for every training image",
                remedy=_REMAKE,
            )
        return np.array([self._row_of_key[key] for key in keys], dtype=np.int64)

    def read(self, row: int, *, mirrored: bool) -> NDArray[Any]:
        """The teacher's embedding of one image, [D], not normalised, as stored; the caller's own copy.

        Raises:
            DataError: The image was left out when the cache was made, the row is damaged, or the file has changed.
        """
        if self._features is None:
            self._features = self._open()
        feature: NDArray[Any] = self._features[row, int(mirrored)].copy()
        if not np.isfinite(feature).all():
            raise DataError(
                f"Teacher features in {self.folder}: row {row} has entries that are not finite",
                expected="an image that could be decoded when the cache was made",
                remedy="Repair the image and make the cache again.",
            )
        return feature

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_features": None, "_row_of_key": None}

    def _open(self) -> NDArray[Any]:
        path = self.folder / FEATURES
        try:
            stat = path.stat()
            features = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise DataError(
                f"Teacher features: {path} cannot be read",
                value=str(error),
                expected=self._shape_text(),
                remedy="The file is missing, cut off or of another kind. Copy it again, or make the cache again.",
            ) from error
        if features.shape != (self.count, 2, self.dim) or features.dtype != self.dtype:
            raise DataError(
                f"Teacher features: {path} does not fit {HEADER}",
                value=f"{list(features.shape)} {features.dtype}",
                expected=self._shape_text(),
                remedy="The two files are of different caches. Copy them again, or make the cache again.",
            )
        state = stat.st_size, stat.st_mtime_ns
        if self._state not in (None, state):
            raise DataError(f"Teacher features: {path} has changed since it was opened", remedy="Start again.")
        self._state = state
        plain: NDArray[Any] = features.view(np.ndarray)  # indexing np.memmap itself takes several times as long
        return plain

    def _shape_text(self) -> str:
        return f"[{self.count}, 2, {self.dim}] {self.dtype}"

    def _read_keys(self) -> list[str]:
        path = self.folder / KEYS
        try:
            keys = json.loads(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(
                f"Teacher features: {path} cannot be read", value=str(error), expected="a list of image keys"
            ) from error
        if digest(keys) != self.header["keys"]:
            raise DataError(
                f"Teacher features: {path} does not fit {HEADER}",
                value=f"{len(keys)} keys",
                expected=f"the {self.count} that the cache was made of",
                remedy="The two files are of different caches. Copy them again, or make the cache again.",
            )
        return list(keys)


def digest(keys: Iterable[str]) -> str:
    """SHA-256 of image keys in their order, in hexadecimal."""
    total = hashlib.sha256()
    for key in keys:
        total.update(f"{len(key)}:{key}".encode())
    return total.hexdigest()


def make_header(keys: Sequence[str], dim: int, dtype: str, identity: Mapping[str, str]) -> dict[str, Any]:
    """The contents of ``building.json``, and of ``cache.json`` but for what is known at the end only."""
    shape = {"count": len(keys), "dim": dim, "dtype": dtype}
    return {"format": FORMAT, **shape, "keys": digest(keys), "identity": dict(identity)}


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object, ``None`` if there is no such file.

    Raises:
        DataError: It holds something else.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"Teacher features: {path} cannot be read", value=str(error), expected="JSON") from error
    if not isinstance(content, dict):
        raise DataError(f"Teacher features: {path}", value=type(content).__name__, expected="a JSON object")
    return content


def _read_header(folder: Path) -> dict[str, Any]:
    header = read_json(folder / HEADER)
    if header is None:
        cut_off = (folder / BUILDING).exists()
        raise DataError(
            "Teacher features",
            value=str(folder),
            expected=f"a folder with a finished cache ({HEADER})",
            remedy="It was cut off while it was being made: start that again, it goes on." if cut_off else "Make it.",
        )
    types = {"format": int, "count": int, "dim": int, "dtype": str, "keys": str, "identity": dict}
    wrong = [name for name, kind in types.items() if not isinstance(header.get(name), kind)]
    if wrong or header["format"] != FORMAT or header["dtype"] not in DTYPES:
        raise DataError(
            f"Teacher features: {folder / HEADER}",
            value=f"format {header.get('format')}, missing or wrong: {', '.join(wrong) or 'nothing'}",
            expected=f"format {FORMAT} with {', '.join(types)}",
            remedy="It was made by another version. Make the cache again.",
        )
    return header
