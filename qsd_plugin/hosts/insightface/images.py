"""The host's training sets as the plugin reads them: paths, classes and pixels by index.

Shapes: N images of the training set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.data.face_images import decode_face
from qsd_plugin.data.recordio import RecordReader


class Images(Protocol):
    """A training set of the host, as the plugin reads it."""

    name: str
    root: Path

    def path(self, index: int) -> str:
        """What quality labels find an image by."""

    def labels(self) -> NDArray[np.int64]:
        """The class of every image, [N]."""

    def sample(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """An image, RGB, uint8 [H, W, 3], and its class."""

    def identities(self) -> int | None:
        """Number of identities, where it is known without reading all images."""


class RecordImages:
    """Images of the host's ``MXFaceDataset``, read by the plugin's own reader."""

    def __init__(self, dataset: Any) -> None:
        self.root = Path(dataset.root_dir)
        self.name = str(self.root / "train.rec")
        self._keys = np.asarray(dataset.imgidx)
        self._reader = RecordReader(self.name)

    def path(self, index: int) -> str:
        """``<root>/train.rec#<key>``."""
        return f"{self.name}#{int(self._keys[index])}"

    def labels(self) -> NDArray[np.int64]:
        """From the headers of all records."""
        return self._reader.labels(self._keys).astype(np.int64)

    def sample(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Decoded."""
        record = self._reader.read(int(self._keys[index]))
        return decode_face(record.content, name=self.path(index)), int(record.label[0])

    def identities(self) -> int | None:
        """From the header record; ``None`` without one."""
        if not self._reader.has_header:
            return None
        first, behind = self._reader.read(0).label
        return int(behind) - int(first)


class FolderImages:
    """Images of torchvision's ``ImageFolder``."""

    def __init__(self, dataset: Any) -> None:
        self.root = Path(dataset.root)
        self.name = str(self.root)
        self._dataset = dataset

    def path(self, index: int) -> str:
        """The file's path."""
        return str(self._dataset.samples[index][0])

    def labels(self) -> NDArray[np.int64]:
        """Place of each folder in the alphabet."""
        return np.array([label for _, label in self._dataset.samples], dtype=np.int64)

    def sample(self, index: int) -> tuple[NDArray[np.uint8], int]:
        """Decoded by the host's loader."""
        path, label = self._dataset.samples[index]
        return np.asarray(self._dataset.loader(path)), int(label)

    def identities(self) -> int | None:
        """Number of folders."""
        return len(self._dataset.classes)
