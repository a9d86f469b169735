"""What a face test set consists of: images to embed and what becomes of their embeddings."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.images import read_rgb
from qsd_plugin.data.synthetic import load_face_truth
from qsd_plugin.evaluation.arrays import Array
from qsd_plugin.report.per_query import GROUPS, quality_groups
from qsd_plugin.report.per_trial import PerTrial

#: Test sets without :attr:`Score.trials`: pairs of templates are not independent trials of one image or two.
WITHOUT_TRIALS = frozenset({"IJB", "IJBB", "IJBC"})


@dataclass(frozen=True)
class Score:
    """What a protocol makes of the embeddings.

    Args:
        numbers: Percentages for the host's table; ``metric`` is the one that picks the best checkpoint.
        details: Results by name, kept as JSON.
        curves: (FAR, TAR) by name, drawn as DET.
        trials: The same, trial by trial; ``None`` where the protocol has no such results.
    """

    numbers: Mapping[str, float]
    details: Mapping[str, Any]
    curves: Mapping[str, tuple[Array, Array]] = field(default_factory=dict)
    trials: PerTrial | None = None


#: From embeddings of the first images of pairs or the probes, and of the second ones or the gallery: both [N, D], rows
#: as the test set's images. Of each, only the rows of its side are read.
Compare = Callable[[torch.Tensor, torch.Tensor], Score]


@dataclass(frozen=True)
class Sides:
    """What a test set compares with what, for evaluations in which both sides are of different quality.

    Args:
        compare: The protocol.
        first: Rows of the first images of pairs, or of the probes; ascending.
    """

    compare: Compare
    first: NDArray[np.int64]


@dataclass(frozen=True)
class FaceTest:
    """One test set.

    Args:
        names: Of the images, N of them; for messages.
        read: Gives the image of an index, RGB; an object that loader processes can be sent.
        score: From the raw embeddings [N, D] of the images, in their order.
        trial_images: Rows of the images of each trial, [V, 1 or 2]; ``None`` where there are no trials.
        quality_name: What the quality of trials is, in words; empty where it is not known.
        sides: ``None`` where images have no side (templates).
    """

    names: Sequence[str]
    read: Callable[[int], Image.Image]
    score: Callable[[torch.Tensor], Score]
    trial_images: NDArray[np.int64] | None = None
    quality_name: str = ""
    sides: Sides | None = None

    @classmethod
    def of_sides(
        cls,
        names: Sequence[str],
        read: Callable[[int], Image.Image],
        sides: Sides,
        trial_images: NDArray[np.int64] | None,
        quality_name: str = "",
    ) -> FaceTest:
        """A test set that scores one set of embeddings as it compares two: with itself."""
        return cls(names, read, lambda one: sides.compare(one, one), trial_images, quality_name, sides)

    def trials(self, features: torch.Tensor) -> PerTrial:
        """What became of each trial, for comparisons of models; from the raw embeddings [N, D].

        Raises:
            ConfigError: The protocol has no such results.
        """
        found = self.score(features).trials
        if found is None:
            raise ConfigError("Face test set without results per trial", expected="one of pairs, or of probes")
        return found


@dataclass(frozen=True)
class EncodedImages:
    """Images as they lie in a ``.bin`` file."""

    names: Sequence[str]
    encoded: Sequence[bytes]

    def __call__(self, index: int) -> Image.Image:
        return read_rgb(self.names[index], io.BytesIO(self.encoded[index]))


@dataclass(frozen=True)
class ImageFiles:
    """Aligned crops in files."""

    paths: Sequence[str]

    def __call__(self, index: int) -> Image.Image:
        return read_rgb(self.paths[index])


@dataclass(frozen=True)
class AlignedFiles:
    """Files that are aligned to 112x112 by their landmarks [N, 5, 2]."""

    paths: Sequence[str]
    points: Array

    def __call__(self, index: int) -> Image.Image:
        from qsd_plugin.data.align import norm_crop

        return Image.fromarray(norm_crop(np.asarray(read_rgb(self.paths[index])), self.points[index]))


#: Quality of the built-in faces.
SEVERITY = "true severity of degradation"


def severity_of(folder: Path, names: Sequence[str]) -> Array:
    """True severity of degradation of built-in faces in ``folder``, [N]."""
    truth = load_face_truth(folder)
    known = dict(zip(truth.paths, truth.severity.tolist(), strict=True))
    return np.array([known[name] for name in names])


def thirds(values: Array, quality: Array) -> dict[str, float]:
    """Mean of ``values`` [V] in each third by ``quality`` [V], in percent for values from 0 to 1."""
    groups = quality_groups(quality).items()
    return {name: 100 * float(np.mean(values[rows])) for name, rows in groups if name != GROUPS[0]}
