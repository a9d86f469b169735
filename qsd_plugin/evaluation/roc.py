"""True positive rates at small false positive rates over all query-gallery pairs, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array, Labels, Matrix
from qsd_plugin.evaluation.distances import row_blocks
from qsd_plugin.evaluation.ground_truth import GroundTruth

#: False positive rates that fast-reid reports.
TARGETS = (1e-4, 1e-3, 1e-2)


class RocCounter:
    """Takes distances block by block, in any order, and gives operating points at the end.

    A pair of the same identity is genuine, any other an impostor; pairs of one identity and one camera do not count.
    A threshold accepts pairs strictly nearer than itself. For a wanted false positive rate f of M impostor pairs, the
    best admissible threshold is the distance of impostor number ``floor(f M) + 1``, counted from the nearest, so only
    that many impostor distances are kept, beside the genuine ones.

    Args:
        truth: Which gallery images count for which query.
        targets: False positive rates, each in [0, 1].

    Raises:
        ConfigError: A rate outside [0, 1].
    """

    def __init__(self, truth: GroundTruth, targets: Sequence[float] = TARGETS) -> None:
        for target in targets:
            if not 0 <= target <= 1:
                raise ConfigError("False positive rate", value=target, expected="0 to 1")
        self._truth = truth
        self._targets = tuple(targets)
        matched = sum(len(truth.matches(query)[0]) for query in range(truth.num_query))
        self._num_impostor = truth.num_query * truth.num_gallery - matched
        self._keep = self._allowed(max(targets)) + 1
        self._genuine: list[Array] = []
        self._impostor: list[Array] = []
        self._pending = 0
        self._bound = np.inf

    def add(self, start: int, distances: Array) -> None:
        """Take the ``distances`` [B, G] of the queries ``start, start + 1, ...``."""
        for query, row in enumerate(distances, start):
            matches, is_positive = self._truth.matches(query)
            self._genuine.append(row[matches[is_positive]])
            near = row <= self._bound
            near[matches] = False
            self._impostor.append(row[near])
            self._pending += len(self._impostor[-1])
            if self._pending > self._keep + max(self._keep, len(row)):
                self._nearest_impostors()

    def result(self) -> dict[float, float]:
        """The highest true positive rate at a false positive rate of at most each target.

        Raises:
            DataError: There are no genuine pairs, or no impostor pairs.
        """
        genuine = np.sort(np.concatenate(self._genuine)) if self._genuine else np.empty(0)
        for kind, count in (("genuine", len(genuine)), ("impostor", self._num_impostor)):
            if not count:
                raise DataError(
                    f"No {kind} pairs between {self._truth.num_query} queries and {self._truth.num_gallery} gallery "
                    "images",
                    expected="both kinds for a ROC",
                )
        impostor = np.sort(self._nearest_impostors())
        rates = {}
        for target in self._targets:
            allowed = self._allowed(target)
            accepted = np.searchsorted(genuine, impostor[allowed]) if allowed < len(impostor) else len(genuine)
            rates[target] = float(accepted / len(genuine))
        return rates

    def _allowed(self, target: float) -> int:
        """Largest number of impostor pairs that may be accepted."""
        # The nudge keeps a product such as 0.01 * 300 at 3 when rounding leaves it just below.
        return int(np.floor(target * self._num_impostor * (1 + 1e-12)))

    def _nearest_impostors(self) -> Array:
        nearest = np.concatenate(self._impostor) if self._impostor else np.empty(0)
        if len(nearest) > self._keep:
            nearest = np.partition(nearest, self._keep - 1)[: self._keep]
            self._bound = nearest[-1]
        self._impostor, self._pending = [nearest], len(nearest)
        return nearest


def tpr_at_fpr(
    distances: Matrix,
    query_ids: Labels,
    gallery_ids: Labels,
    query_cams: Labels | None = None,
    gallery_cams: Labels | None = None,
    *,
    targets: Sequence[float] = TARGETS,
) -> dict[float, float]:
    """True positive rates of given distances [Q, G]; see :class:`RocCounter`."""
    truth = GroundTruth(query_ids, gallery_ids, query_cams, gallery_cams)
    truth.check_shape(tuple(distances.shape), "distances")
    counter = RocCounter(truth, targets)
    for start, block in row_blocks(distances):
        counter.add(start, block)
    return counter.result()
