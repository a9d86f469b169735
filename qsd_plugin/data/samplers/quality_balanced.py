"""Batches in which all qualities of the training set occur equally often, whatever the labels' distribution."""

from __future__ import annotations

import itertools
from collections.abc import Hashable, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.samplers.base import checked_sets, take
from qsd_plugin.data.samplers.quality import QualitySampler

#: How bins are laid out.
EDGES = ("quantile", "width")

Counts = NDArray[np.int64]


class QualityBalancedSampler(QualitySampler):
    """Identity sampler whose batches hold the bins of the quality range as evenly as their identities allow.

    The labels of each data set are divided into bins by :func:`quality_bins`. The identities of a batch are drawn as by
    every sampler of the family; then K images of each are chosen such that the numbers of images per bin differ as
    little as these identities' images allow (:func:`balanced_counts`; the squares of the numbers have the least sum),
    and at random within a bin. With several data sets this holds for each set's share of the batch.

    Which images are chosen depends on the identities beside them in the batch, so on the batch of the rank.

    An identity with fewer than K labelled images fills up with unlabelled ones; where these do not suffice either, it
    repeats labelled ones, none more often than ``ceil(K / n)``. Otherwise unlabelled images are not drawn.

    Args:
        identities: Identity of every image.
        scores: Quality of every image, [N], higher is better, NaN where unlabelled.
        batch_size: Images per batch and rank, P x K.
        num_instances: K.
        seed: Equal on all ranks, >= 0.
        num_bins: Bins per data set, >= 2.
        edges: ``quantile``: bins of equal numbers of training images, so a batch is spread like the training set, only
            without the accidents of chance. ``width``: intervals of equal length from the lowest to the highest label,
            so rare qualities come as often as frequent ones.
        sets: Index of every image's data set, from 0; all of one set by default.
        rank: This rank.
        world_size: Number of ranks.

    Raises:
        ConfigError: K does not divide ``batch_size``, too few bins, or unknown ``edges``.
        DataError: Fewer identities than a step takes, scores or sets that do not belong to the images, or no label.
    """

    def __init__(
        self,
        identities: Sequence[Hashable],
        scores: ArrayLike | torch.Tensor,
        batch_size: int,
        num_instances: int,
        *,
        seed: int,
        num_bins: int = 8,
        edges: str = "quantile",
        sets: Sequence[int] | None = None,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self._num_bins, self._edges, self._sets = num_bins, edges, sets  # needed before the constructor ends
        super().__init__(identities, scores, batch_size, num_instances, seed=seed, rank=rank, world_size=world_size)

    def _prepare(self, scores: NDArray[np.float64]) -> None:
        owners = checked_sets(self._sets, len(scores))
        bins = np.full(len(scores), -1, dtype=np.int64)
        for which in np.unique(owners):
            own = owners == which
            found = quality_bins(scores[own], self._num_bins, self._edges)
            bins[own] = np.where(found < 0, -1, found + which * self._num_bins)
        if (bins < 0).all():
            raise self._without_labels(f"no label for any of {len(bins)} images", "labels")
        #: Images of each identity by bin, and those without a label under -1.
        self._binned: list[dict[int, list[int]]] = []
        #: How many labelled images a group of each identity holds, and how often each bin could serve it.
        self._wanted = np.zeros(len(self._images), dtype=np.int64)
        self._available = np.zeros((len(self._images), int(bins.max()) + 1), dtype=np.int64)
        for number, images in enumerate(self._images):
            binned: dict[int, list[int]] = {-1: []}
            for image in images:
                binned.setdefault(int(bins[image]), []).append(image)
            self._binned.append(binned)
            labelled = len(images) - len(binned[-1])
            if not labelled:
                continue
            wanted = max(min(labelled, self.num_instances), self.num_instances - len(binned[-1]))
            repeats = -(-wanted // labelled)
            self._wanted[number] = wanted
            for place, members in binned.items():
                if place >= 0:
                    self._available[number, place] = repeats * len(members)

    def _draw(self, step: int, numbers: Sequence[int]) -> list[int]:
        available, wanted = self._available[numbers], self._wanted[numbers]
        # A new order of the bins for every batch, so that none always gets the odd image.
        order = numpy_stream(self.seed, "bins", step, self._rank).permutation(available.shape[1])
        counts = np.empty_like(available)
        counts[:, order] = balanced_counts(available[:, order], wanted)
        indices: list[int] = []
        for row, number in enumerate(numbers):
            generator, binned = self._stream(step, number), self._binned[number]
            for place in np.flatnonzero(counts[row]).tolist():
                indices += take(generator, binned[place], int(counts[row, place]))
            indices += take(generator, binned[-1], self.num_instances - int(wanted[row]))
        return indices


def quality_bins(scores: ArrayLike, num_bins: int, edges: str) -> Counts:
    """The bin of each score of one data set.

    Args:
        scores: Quality per image, [N], NaN where unlabelled.
        num_bins: Number of bins, >= 2.
        edges: ``quantile`` or ``width``, see :class:`QualityBalancedSampler`. Equal scores share a bin, so with many of
            them bins may differ in size or be empty.

    Returns:
        Int64 [N]: 0 for the lowest scores to ``num_bins - 1``; -1 where unlabelled.

    Raises:
        ConfigError: Too few bins, or unknown ``edges``.
    """
    if num_bins < 2:
        raise ConfigError("Number of quality bins (QUALITY.BALANCE.BINS)", value=num_bins, expected="at least 2")
    if edges not in EDGES:
        raise ConfigError(
            "Edges of quality bins (QUALITY.BALANCE.EDGES)", value=edges, remedy=did_you_mean(edges, EDGES)
        )
    values = np.asarray(scores, dtype=np.float64)
    known = ~np.isnan(values)
    bins = np.full(len(values), -1, dtype=np.int64)
    if known.any():
        labels, inner = np.sort(values[known]), np.arange(1, num_bins)
        if edges == "quantile":
            borders = labels[inner * len(labels) // num_bins]
        else:
            borders = labels[0] + inner / num_bins * (labels[-1] - labels[0])
        bins[known] = np.searchsorted(borders, values[known], side="right")
    return bins


def balanced_counts(available: Counts, wanted: Counts) -> Counts:
    """How many images of each bin to take from each identity so that the bins come out as evenly as possible.

    Every identity first takes from the emptiest bins it has images in; then images move from fuller bins to emptier
    ones along chains of identities until no chain is left. The cost is convex in each bin's total, so what no chain
    improves is the optimum, not only a good solution.

    Args:
        available: Images of identity p in bin b, [P, Q].
        wanted: Images to take of each identity, [P], at most the sum of its row.

    Returns:
        Numbers to take, [P, Q], with row sums ``wanted``, nowhere above ``available``, and the least possible sum of
        squared column sums.
    """
    counts = np.zeros_like(available)
    totals = counts.sum(axis=0)
    for row, number in enumerate(wanted):
        for _ in range(number):
            free = np.flatnonzero(counts[row] < available[row])
            emptiest = free[np.argmin(totals[free])]
            counts[row, emptiest] += 1
            totals[emptiest] += 1
    while chain := _improving_chain(available, counts):
        for source, target in itertools.pairwise(chain):
            row = np.flatnonzero((counts[:, source] > 0) & (counts[:, target] < available[:, target]))[0]
            counts[row, source] -= 1
            counts[row, target] += 1
    return counts


def _improving_chain(available: Counts, counts: Counts) -> list[int]:
    """Bins along which one image can move to a bin with at least two images fewer; empty if there is no such chain."""
    totals = counts.sum(axis=0)
    movable = (counts > 0).T.astype(np.int64) @ (counts < available) > 0
    for start in np.argsort(-totals, kind="stable").tolist():
        before: dict[int, int] = {start: start}
        frontier = [start]
        for place in frontier:  # grows while it is walked through
            if totals[place] <= totals[start] - 2:
                chain = [place]
                while chain[-1] != start:
                    chain.append(before[chain[-1]])
                return chain[::-1]
            for target in np.flatnonzero(movable[place]).tolist():
                if target not in before:
                    before[target] = place
                    frontier.append(target)
    return []
