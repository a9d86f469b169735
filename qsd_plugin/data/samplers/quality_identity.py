"""Groups of K images in which every identity shows good and bad ones, so that QSD always finds a gap in a batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.samplers.base import take
from qsd_plugin.data.samplers.quality import QualitySampler


class QualityIdentitySampler(QualitySampler):
    """Identity sampler that draws half of each group of K from an identity's better images and half from the others.

    An identity's labelled images are cut in two by :func:`median_cuts`, so every image of the upper part has a higher
    label than every image of the lower one, and each group holds at least one of both. Where two cuts are equally near
    the middle, as with an odd number of images, and for the odd image of an odd K, a coin decides anew for each group.

    - A part with fewer images than its share gives all of them, and the other part gives more.
    - An identity with fewer than K labelled images fills up with unlabelled ones. Where these do not suffice either,
      each part repeats its images for its half, every image once before any comes again.
    - Otherwise unlabelled images are not drawn.
    - An identity without two different labels has nothing to cut; its groups are drawn from all of its images.

    Groups list the upper part first. Only orders within an identity count, so labels of several data sets can be mixed.

    Args:
        identities: Identity of every image.
        scores: Quality of every image, [N], higher is better, NaN where unlabelled.
        batch_size: Images per batch and rank, P x K.
        num_instances: K, >= 2.
        seed: Equal on all ranks, >= 0.
        rank: This rank.
        world_size: Number of ranks.

    Attributes:
        without_gap: Number of identities without two different labels.

    Raises:
        ConfigError: K is 1, or does not divide ``batch_size``.
        DataError: Fewer identities than a step takes, scores that do not belong to the images, or no identity at all
            with two different labels.
    """

    def _prepare(self, scores: NDArray[np.float64]) -> None:
        if self.num_instances < 2:
            raise ConfigError(
                "Images per identity for QualityIdentitySampler",
                value=self.num_instances,
                expected="at least 2, one from each part of an identity's labels",
                remedy="Raise DATALOADER.NUM_INSTANCE.",
            )
        self._labelled: list[list[int]] = []
        self._unlabelled: list[list[int]] = []
        self._cuts: list[list[int]] = []
        for images in self._images:
            known = sorted((image for image in images if not np.isnan(scores[image])), key=lambda image: scores[image])
            self._labelled.append(known)
            self._unlabelled.append([image for image in images if np.isnan(scores[image])])
            self._cuts.append(median_cuts(scores[known]))
        self.without_gap = sum(not cuts for cuts in self._cuts)
        if self.without_gap == len(self._images):
            raise self._without_labels(
                f"no identity with two different labels among {self.without_gap}",
                "labels that differ within identities",
            )

    def _draw(self, step: int, numbers: Sequence[int]) -> list[int]:
        return [image for number in numbers for image in self._group(self._stream(step, number), number)]

    def _group(self, generator: np.random.Generator, number: int) -> list[int]:
        labelled, unlabelled, cuts = self._labelled[number], self._unlabelled[number], self._cuts[number]
        if not cuts:
            return take(generator, self._images[number], self.num_instances)
        filling = take(generator, unlabelled, min(len(unlabelled), max(self.num_instances - len(labelled), 0)))
        wanted = self.num_instances - len(filling)
        cut = cuts[generator.integers(len(cuts))]
        lower, upper = labelled[:cut], labelled[cut:]
        above = (wanted + int(generator.integers(2))) // 2
        if wanted <= len(labelled):
            above = min(max(above, wanted - len(lower)), len(upper))
        return take(generator, upper, above) + take(generator, lower, wanted - above) + filling


def median_cuts(ascending: ArrayLike) -> list[int]:
    """How many of an identity's sorted labels may form its lower part.

    A cut lies between two different labels, so that equal ones stay together; of all such places those nearest to the
    middle are returned: one, two if equally near, none if all labels are equal.

    Args:
        ascending: Labels, sorted, without NaN, [n].
    """
    labels = np.asarray(ascending)
    cuts = np.flatnonzero(labels[1:] > labels[:-1]) + 1
    distances = np.abs(2 * cuts - len(labels))
    nearest: list[int] = cuts[distances == distances.min(initial=len(labels))].tolist()
    return nearest
