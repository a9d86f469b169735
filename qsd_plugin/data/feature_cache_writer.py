"""Making a :class:`~qsd_plugin.data.feature_cache.FeatureCache`, by one process or several, with interruptions."""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.files import check_writable, write_atomically
from qsd_plugin.data.feature_cache import (
    BUILDING,
    DONE,
    DTYPES,
    FEATURES,
    HEADER,
    KEYS,
    make_header,
    read_json,
)

#: Largest relative rounding error of an embedding, in Euclidean length; float16's own is at most 2^-11.
ROUNDING = 1e-3

_MISSING, _WRITTEN, _LEFT_OUT = range(3)


class FeatureCacheWriter:
    """Fills a cache row by row. What an earlier attempt wrote is kept if it is of the same images and identity.

    A row counts as done only after its embeddings are on the disk, and ``cache.json`` comes last of all, so whatever is
    killed, nothing half written is taken for complete. Several processes of one machine may write different rows of the
    same folder once one of them has created it; one of them calls :meth:`finish`.

    Args:
        folder: Created when missing. A cache of something else in it is thrown away.
        keys: Image keys, N different ones.
        dim: Embedding size D.
        identity: What the embeddings depend on, by name.
        dtype: ``float16`` or ``float32``.

    Raises:
        ConfigError: Unknown dtype or impossible size.
        DataError: Keys that are not different, or a folder that cannot be written or has too little room.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        keys: Sequence[str],
        dim: int,
        *,
        identity: Mapping[str, str],
        dtype: str = "float16",
    ) -> None:
        if dtype not in DTYPES:
            raise ConfigError("Teacher features: dtype", value=dtype, expected=" or ".join(DTYPES))
        if not keys or dim < 1:
            raise ConfigError("Teacher features: shape [N, 2, D]", value=(len(keys), 2, dim), expected="N, D >= 1")
        if len(set(keys)) < len(keys):
            repeated = Counter(keys).most_common(1)[0][0]
            raise DataError(
                "Teacher features: two images have the same key", value=repeated, expected="a key for each image"
            )
        self.folder = Path(folder)
        check_writable(self.folder)
        self._keys = keys
        self._dtype = dtype
        self._header = make_header(keys, dim, dtype, identity)
        self.finished = _without_ending(read_json(self.folder / HEADER)) == self._header
        if self.finished:
            _remove(self.folder, BUILDING, DONE)
            return
        if read_json(self.folder / BUILDING) != self._header:
            self._create()
        self._features = np.lib.format.open_memmap(self.folder / FEATURES, mode="r+")
        self._done = np.lib.format.open_memmap(self.folder / DONE, mode="r+")

    @property
    def pending(self) -> NDArray[np.int64]:
        """Rows that are still to be written, ascending."""
        return np.arange(0) if self.finished else np.flatnonzero(self._done == _MISSING)

    @property
    def left_out(self) -> NDArray[np.int64]:
        """Rows of images without embeddings so far, ascending; none once the cache is finished."""
        return np.arange(0) if self.finished else np.flatnonzero(self._done == _LEFT_OUT)

    def write(self, rows: NDArray[np.int64], features: NDArray[np.float32]) -> None:
        """Store embeddings.

        Args:
            rows: [B].
            features: [B, 2, D], of the images as they are and mirrored.

        Raises:
            DataError: Another shape, embeddings that are not finite, or that float16 cannot hold.
        """
        wanted = (len(rows), 2, self._header["dim"])
        if features.shape != wanted:
            raise DataError("Teacher features to store", value=features.shape, expected=f"the shape {wanted}")
        finite: NDArray[np.bool_] = np.all(np.isfinite(features), axis=(1, 2))
        self._check(rows, finite, "are not finite", "The teacher is broken.")
        with np.errstate(over="ignore"):  # infinite then, and refused
            stored = features.astype(self._dtype)
        exact = features.astype(np.float64)
        error = np.linalg.norm(stored - exact, axis=2)
        holds: NDArray[np.bool_] = np.all(error <= ROUNDING * np.linalg.norm(exact, axis=2), axis=1)
        self._check(
            rows, holds, f"lose too much in {self._dtype}", "They are too large or too small for it: use float32."
        )
        self._features[rows] = stored
        self._features.flush()
        self._done[rows] = _WRITTEN

    def leave_out(self, rows: NDArray[np.int64]) -> None:
        """Give images without embeddings (damaged ones) NaN, which no reader takes for an embedding."""
        self._features[rows] = np.nan
        self._features.flush()
        self._done[rows] = _LEFT_OUT

    def finish(self) -> None:
        """Declare the cache complete.

        Raises:
            DataError: Rows are missing.
        """
        if self.finished:
            return
        pending = self.pending
        if len(pending):
            raise DataError(
                f"Teacher features in {self.folder}: {len(pending)} of {len(self._keys)} images have none yet",
                value=self._keys[int(pending[0])],
                expected="all images",
                remedy="Start the same again: it goes on where it was cut off.",
            )
        left_out = [self._keys[row] for row in self.left_out.tolist()]
        ending = {"left_out": left_out, "written": time.strftime("%Y-%m-%dT%H:%M:%S")}
        write_atomically(self.folder / HEADER, json.dumps({**self._header, **ending}, indent=1).encode())
        self.finished = True
        _remove(self.folder, BUILDING, DONE)

    def _create(self) -> None:
        # The old cache stops being one before any of its files changes; the new one begins when all of them are there.
        _remove(self.folder, HEADER, BUILDING, DONE)
        write_atomically(self.folder / KEYS, json.dumps(list(self._keys)).encode())
        shape = (len(self._keys), 2, self._header["dim"])
        np.lib.format.open_memmap(self.folder / FEATURES, mode="w+", dtype=np.dtype(self._dtype), shape=shape)
        _reserve(self.folder / FEATURES)
        np.lib.format.open_memmap(self.folder / DONE, mode="w+", dtype=np.uint8, shape=shape[:1])
        write_atomically(self.folder / BUILDING, json.dumps(self._header, indent=1).encode())

    def _check(self, rows: NDArray[np.int64], good: NDArray[np.bool_], fault: str, remedy: str) -> None:
        if not good.all():
            raise DataError(
                f"Teacher features of {int((~good).sum())} images {fault}",
                value=self._keys[int(rows[np.flatnonzero(~good)[0]])],
                remedy=remedy,
            )


def _reserve(path: Path) -> None:
    """Take the file's space now: a full disk found later, through a mapping, would kill the process."""
    if not hasattr(os, "posix_fallocate"):
        return
    size = path.stat().st_size
    with path.open("r+b") as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            path.unlink()
            raise DataError(
                "Cannot write",
                value=str(path),
                expected=f"room for {size / 2**20:.0f} MiB",
                remedy=f"The system says: {error.strerror}. Teacher features take twice D numbers per image.",
            ) from error


def _without_ending(header: dict[str, Any] | None) -> dict[str, Any] | None:
    return header and {name: value for name, value in header.items() if name not in ("left_out", "written")}


def _remove(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).unlink(missing_ok=True)
