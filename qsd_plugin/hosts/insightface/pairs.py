"""Data sets that give methods more than an image and its class: pairs, their quality, and labels that are checked.

Only what an index of the host's data set gives is new.

Shapes: N images of the training set. A pair is [2, 3, H, W], its target [label, quality 1, valid 1, quality 2,
valid 2] as float64, which holds every class number exactly.
"""

from __future__ import annotations

import logging
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from qsd_plugin.core.errors import DataError, LabelError, QSDPluginError
from qsd_plugin.core.streams import numpy_stream, seeded_globals
from qsd_plugin.degradations.views import view_pair
from qsd_plugin.hosts.insightface.images import Images
from qsd_plugin.hosts.insightface.options import Options
from qsd_plugin.quality.labels import QualityLabels

#: Paths that are looked up at once.
_CHUNK = 100_000


class CheckedDataset(Dataset[tuple[Tensor, Tensor]]):
    """The host's data set with classes that are compared with ``config.num_classes``.

    Without this a class beyond it trains nothing, with a loss of 69, and no word. What the host's transform draws
    follows from (seed, epoch, index), so that a resumed run goes on as if it had not stopped.

    Args:
        dataset: The host's.
        images: The same images as the plugin reads them.
        num_classes: C of the config.
        seed: ``config.seed``.

    Raises:
        DataError: The data set has more identities; on access, a class that is not 0 to C - 1.
    """

    #: To be set to the loader's, whose epoch the draws follow.
    sampler: Any = None

    def __init__(self, dataset: Any, images: Images, num_classes: int, seed: int) -> None:
        self.dataset, self.images, self.num_classes, self.seed = dataset, images, num_classes, seed
        known = images.identities()
        if known is not None and known > num_classes:
            raise _too_many_classes(images.name, f"{known} identities", num_classes)
        if known is not None and known < num_classes:
            logging.warning("config.num_classes is %d, %s has %d identities", num_classes, images.name, known)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        with seeded_globals(self.seed, "arcface image", self.epoch, int(index)):
            image, label = self.dataset[index]
        return image, torch.as_tensor(self.check(int(label), index))

    @property
    def epoch(self) -> int:
        """Of the sampler, which the trainer sets before its loader starts workers."""
        return int(getattr(self.sampler, "epoch", 0))

    def check(self, label: int, index: int) -> int:
        """The class itself, if there is a row for it."""
        if not 0 <= label < self.num_classes:
            raise _too_many_classes(self.images.path(index), f"class {label}", self.num_classes)
        return label


class PairDataset(CheckedDataset):
    """Pairs of images, see the module; everything random follows from (seed, epoch, index).

    Args:
        dataset: The host's.
        images: The same images as the plugin reads them.
        num_classes: C of the config.
        seed: ``config.seed``.
        options: What to pair with, and the labels.
    """

    def __init__(self, dataset: Any, images: Images, num_classes: int, seed: int, options: Options) -> None:
        super().__init__(dataset, images, num_classes, seed)
        self._options = options
        if options.paired == "identity":
            self._labels  # noqa: B018 - read once, before workers are forked
            self._quality  # noqa: B018

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        index, epoch = int(index), self.epoch
        if self._options.paired == "identity":
            return self._of_identity(index, epoch)
        view = self._options.qgface
        pixels, label = self.images.sample(index)
        degraded, clean, _ = view_pair(
            pixels,
            numpy_stream(self.seed, "arcface views", epoch, index),
            crop_probability=view.crop_probability,
            photometric_probability=view.photometric_probability,
            rotation_probability=view.rotation_probability,
        )
        return torch.stack([_tensor(clean), _tensor(degraded)]), torch.as_tensor(self.check(label, index))

    def _of_identity(self, index: int, epoch: int) -> tuple[Tensor, Tensor]:
        partner = self.partner(index, epoch)
        with seeded_globals(self.seed, "arcface pair", epoch, index):
            pair = [self.dataset[place][0] for place in (index, partner)]
        quality, valid = self._quality
        # Alone, an image is its own partner and teaches nothing.
        known = [valid[index], valid[partner] and partner != index]
        target = [float(self._labels[index]), quality[index], known[0], quality[partner], known[1]]
        return torch.stack(pair), torch.tensor(target, dtype=torch.float64)

    def partner(self, index: int, epoch: int) -> int:
        """Another image of the same identity, drawn evenly; ``index`` itself where there is none."""
        order, rank, start, count = self._groups
        label = self._labels[index]
        others = int(count[label]) - 1
        if others == 0:
            return index
        own = int(rank[index])
        drawn = int(numpy_stream(self.seed, "arcface partner", epoch, index).integers(others))
        return int(order[start[label] + drawn + (drawn >= own)])

    @cached_property
    def _labels(self) -> NDArray[np.int64]:
        labels = self.images.labels()
        wrong = labels[(labels < 0) | (labels >= self.num_classes)]
        if len(wrong):
            raise _too_many_classes(self.images.name, f"classes up to {int(labels.max())}", self.num_classes)
        return labels

    @cached_property
    def _groups(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
        """Images sorted by class; each image's place in its class; each class's first place and number of images."""
        labels = self._labels
        order = np.argsort(labels, kind="stable")
        count = np.bincount(labels, minlength=self.num_classes)
        start = np.concatenate([[0], np.cumsum(count)[:-1]])
        rank = np.empty(len(labels), dtype=np.int64)
        rank[order] = np.arange(len(labels)) - start[labels[order]]
        return order, rank, start, count

    @cached_property
    def _quality(self) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        qsd = self._options.qsd
        if qsd.quality == "norm":
            return np.zeros(len(self), np.float32), np.ones(len(self), bool)
        labels = QualityLabels.load(qsd.labels).rescaled(qsd.label_scale).controlled(qsd.control, seed=self.seed)
        found = []
        for begin in range(0, len(self), _CHUNK):
            paths = [self.images.path(index) for index in range(begin, min(begin + _CHUNK, len(self)))]
            found.append(labels.lookup(paths, root=self.images.root))
        quality, valid = (torch.cat(parts).numpy() for parts in zip(*found, strict=True))
        if valid.mean() < qsd.min_coverage:
            missing = self.images.path(int(np.argmin(valid)))
            raise LabelError(
                f"config.qsd_plugin qsd labels: {qsd.labels} covers {int(valid.sum())} of {len(self)} images",
                expected=f"at least {qsd.min_coverage:.1%} (min_coverage). Without a label: {missing}. Keys in the "
                f"file: {', '.join(labels.keys[:2])}",
                remedy="Use the labels of this data set, or make new ones with tools/quality_labels.py.",
            )
        return quality, valid


def _tensor(image: NDArray[np.uint8]) -> Tensor:
    """As the host's transform ends: [3, H, W], -1 to 1."""
    return (torch.from_numpy(image.transpose(2, 0, 1).copy()).float() / 255 - 0.5) / 0.5


def _too_many_classes(what: str, found: str, num_classes: int) -> QSDPluginError:
    return DataError(
        f"config.num_classes: {num_classes}, and {what} has {found}",
        expected=f"classes 0 to {num_classes - 1} in the data",
        remedy="Set config.num_classes to the number of identities of the training set.",
    )
