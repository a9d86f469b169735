"""ROC of given scores, and true acceptance at small false acceptance rates by two rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.evaluation.arrays import Array, Labels, Matrix, to_numpy

RULES = ("nearest", "exact")


@dataclass(frozen=True)
class Roc:
    """Corners of a ROC, from the strictest threshold on; DET is ``far`` against ``1 - tar``.

    Attributes:
        threshold: [K], descending; pairs that score at least this are accepted. The first one, infinity, accepts none.
        far: [K], share of the impostor pairs accepted.
        tar: [K], share of the genuine pairs accepted.
        num_genuine: Genuine pairs.
        num_impostor: Impostor pairs.
    """

    threshold: Array
    far: Array
    tar: Array
    num_genuine: int
    num_impostor: int


def roc(scores: Matrix, genuine: Labels) -> Roc:
    """The ROC of scores [P], higher meaning more alike; ``genuine`` [P] says which pairs show one person.

    Only points are kept at which the steps change, the ones that scikit-learn's ``roc_curve`` keeps by default, so
    15 million impostor pairs and 20,000 genuine ones make a curve of at most some 40,000 points unless impostors tie.

    Raises:
        DataError: Shapes that do not fit, NaN, or one kind of pairs only.
    """
    impostors, genuines = split_scores(scores, genuine)
    impostors.sort()
    genuines.sort()
    values = np.unique(np.concatenate((impostors, genuines)))[::-1]
    counts = np.stack([len(kind) - np.searchsorted(kind, values) for kind in (impostors, genuines)])
    steps = np.diff(counts)
    kept = np.ones(len(values), dtype=bool)
    kept[1:-1] = (steps[:, 1:] != steps[:, :-1]).any(0)
    far, tar = counts[:, kept] / np.array([[len(impostors)], [len(genuines)]])
    return Roc(
        threshold=np.concatenate(([np.inf], values[kept])),
        far=np.concatenate(([0.0], far)),
        tar=np.concatenate(([0.0], tar)),
        num_genuine=len(genuines),
        num_impostor=len(impostors),
    )


def nearest_tar(curve: Roc, far_targets: Sequence[float]) -> tuple[Array, Array]:
    """True acceptance at the curve's point whose false acceptance is nearest to each target.

    The rule of published IJB numbers. Of equally near points the one with more acceptances counts. The point may lie
    above the target and is the curve's first where all others are further off: the rule flatters where pairs are few.

    Returns:
        True acceptance [F] and the false acceptance [F] at that point.
    """
    flipped = curve.far[::-1]
    found = len(flipped) - 1 - np.array([np.abs(flipped - target).argmin() for target in far_targets], dtype=np.int64)
    return curve.tar[found], curve.far[found]


def exact_tar(scores: Matrix, genuine: Labels, far_targets: Sequence[float]) -> tuple[Array, Array]:
    """The highest true acceptance at a false acceptance of at most each target, over all thresholds.

    Returns:
        True acceptance [F] and the false acceptance [F] at that threshold.
    """
    impostors, genuines = split_scores(scores, genuine)
    # The nudge keeps a product such as 0.01 * 300 at 3 when rounding leaves it just below.
    allowed = np.floor(np.array(far_targets) * len(impostors) * (1 + 1e-12)).astype(np.int64)
    # Accepted is what scores above the first impostor that must not be.
    places = len(impostors) - 1 - allowed
    inside = places >= 0
    barrier = np.full(len(places), -np.inf)
    if inside.any():
        barrier[inside] = np.partition(impostors, places[inside])[places[inside]]
    tar = np.array([np.count_nonzero(genuines > bound) for bound in barrier]) / len(genuines)
    far = np.array([np.count_nonzero(impostors > bound) for bound in barrier]) / len(impostors)
    return tar, far


def check_rule(rule: str, far_targets: Sequence[float]) -> None:
    """Raise a :class:`ConfigError` for an unknown rule or a rate outside [0, 1]."""
    if rule not in RULES:
        raise ConfigError("Rule for true acceptance at a rate", value=rule, remedy=did_you_mean(rule, RULES))
    for target in far_targets:
        if not 0 <= target <= 1:
            raise ConfigError("Wanted false acceptance rate", value=target, expected="0 to 1")


def split_scores(scores: Matrix, genuine: Labels) -> tuple[Array, Array]:
    """Copies of the impostor and of the genuine pairs' scores.

    Raises:
        DataError: Shapes that do not fit, NaN, or one kind of pairs only.
    """
    values, labels = to_numpy(scores), to_numpy(genuine)
    if values.ndim != 1 or labels.shape != values.shape:
        raise DataError("Shapes of scores and genuine", value=(values.shape, labels.shape), expected="[P] and [P]")
    if labels.dtype != bool and not np.isin(labels, (0, 1)).all():
        raise DataError("Values of genuine", value=np.unique(labels)[:5].tolist(), expected="booleans, or 0 and 1")
    invalid = np.flatnonzero(np.isnan(values))
    if len(invalid):
        raise DataError(f"{len(invalid)} scores are NaN, the first one of pair {invalid[0]}", expected="numbers")
    mask = labels.astype(bool)
    sides = values[~mask], values[mask]
    for side, kind in zip(sides, ("impostor", "genuine"), strict=True):
        if not len(side):
            raise DataError(f"No {kind} pairs among {len(values)}", expected="both kinds for a ROC")
    return sides
