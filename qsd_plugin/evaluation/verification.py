"""Ten-fold face verification on a list of pairs: LFW, CFP-FP, AgeDB-30 and the other ``.bin`` sets.

The protocol of the field (LFW's restricted view; InsightFace's ``verification.py``): a pair counts as the same person
where its squared distance is strictly below a threshold; the threshold is chosen on nine contiguous folds and
applied to the tenth.

Shapes: P pairs, D embedding dimension, F folds, T thresholds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.evaluation.arrays import Array, Labels, Matrix, to_numpy

#: Thresholds on the squared distance for accuracy, and the finer ones for a wanted false acceptance rate.
THRESHOLDS = np.arange(0, 4, 0.01)
FINE_THRESHOLDS = np.arange(0, 4, 0.001)

_LARGEST = 4 + 1e-6  # squared distance of opposite unit vectors, and rounding


@dataclass(frozen=True)
class OperatingPoint:
    """True acceptance at a wanted false acceptance rate; all rates are fractions.

    Attributes:
        far_target: The wanted rate. On the other folds the threshold for it is interpolated between two of
            :data:`FINE_THRESHOLDS`; it is 0, which accepts nothing, where even the largest one accepts fewer impostors.
        val: Mean over folds of the share of genuine pairs accepted (VAL, or TAR).
        val_std: Population standard deviation of it.
        far: Mean over folds of the share of impostor pairs accepted.
        fold_val: [F].
        fold_far: [F].
        fold_threshold: [F].
    """

    far_target: float
    val: float
    val_std: float
    far: float
    fold_val: Array
    fold_far: Array
    fold_threshold: Array


@dataclass(frozen=True)
class VerificationResult:
    """Outcome of the protocol; all rates are fractions.

    Attributes:
        accuracy: Mean of ``fold_accuracy``.
        accuracy_std: Population standard deviation of it.
        fold_accuracy: [F].
        fold_threshold: Squared distance [F], the first of :data:`THRESHOLDS` with the highest accuracy on the other
            folds.
        thresholds: [T] :data:`THRESHOLDS`, for the two curves.
        tpr: [T], mean over folds of the share of genuine pairs accepted.
        fpr: [T], mean over folds of the share of impostor pairs accepted.
        at_far: One operating point per wanted false acceptance rate.
        num_genuine: Genuine pairs.
        num_impostor: Impostor pairs.
    """

    accuracy: float
    accuracy_std: float
    fold_accuracy: Array
    fold_threshold: Array
    thresholds: Array
    tpr: Array
    fpr: Array
    at_far: tuple[OperatingPoint, ...]
    num_genuine: int
    num_impostor: int


def verify_pairs(
    embeddings: Matrix, issame: Labels, *, folds: int = 10, far_targets: Sequence[float] = (1e-3,)
) -> VerificationResult:
    """Run the protocol on embeddings.

    Args:
        embeddings: [2P, D]; rows 2i and 2i + 1 are pair i. Normalised here, in float64; a row of zeros stays zero. With
            mirrored images pass :func:`sum_with_flip`.
        issame: [P], whether a pair shows one person; bool, or 0 and 1.
        folds: F, contiguous; the first ``P % F`` hold one pair more.
        far_targets: Wanted false acceptance rates, each in (0, 1].

    Raises:
        DataError: Shapes that do not fit, NaN, or a fold without genuine or without impostor pairs.
        ConfigError: Less than two folds, or a rate outside (0, 1].
    """
    values = to_numpy(embeddings)
    if values.ndim != 2 or len(values) % 2:
        raise DataError(
            "Shape of pair embeddings",
            value=values.shape,
            expected="[2P, D], the two images of a pair one after another",
        )
    labels = _labels(issame, len(values) // 2)
    unit = normalised(values)
    difference = unit[0::2] - unit[1::2]
    return verify_distances(np.square(difference).sum(1), labels, folds=folds, far_targets=far_targets)


def verify_distances(
    distances: Matrix, issame: Labels, *, folds: int = 10, far_targets: Sequence[float] = (1e-3,)
) -> VerificationResult:
    """Like :func:`verify_pairs` for given squared Euclidean distances [P] between unit vectors, 0 to 4."""
    if folds < 2:
        raise ConfigError("Number of verification folds", value=folds, expected="2 or more")
    for target in far_targets:
        if not 0 < target <= 1:
            raise ConfigError("Wanted false acceptance rate", value=target, expected="above 0, at most 1")
    values = to_numpy(distances)
    if values.ndim != 1:
        raise DataError("Shape of pair distances", value=values.shape, expected="[P]")
    _check_distances(values)
    labels = _labels(issame, len(values))
    fold = _fold_of_pairs(labels, folds)
    sizes = _count(fold, labels, folds)  # [2, F]

    accepted = _accepted(values, labels, fold, folds, THRESHOLDS)  # [2, F, T]
    correct = accepted[1] + sizes[0][:, None] - accepted[0]
    best = (correct.sum(0) - correct).argmax(1)
    pairs = sizes.sum(0)
    fold_accuracy = correct[np.arange(folds), best] / pairs
    rates = accepted / sizes[:, :, None]

    fine = _accepted(values, labels, fold, folds, FINE_THRESHOLDS)[0]
    training_far = (fine.sum(0) - fine) / (sizes[0].sum() - sizes[0])[:, None]
    points = []
    for target in far_targets:
        thresholds = np.array([threshold_at(far, FINE_THRESHOLDS, target) for far in training_far])
        passed = values < thresholds[fold]
        fold_far, fold_val = _count(fold[passed], labels[passed], folds) / sizes
        points.append(
            OperatingPoint(
                far_target=target,
                val=float(fold_val.mean()),
                val_std=float(fold_val.std()),
                far=float(fold_far.mean()),
                fold_val=fold_val,
                fold_far=fold_far,
                fold_threshold=thresholds,
            )
        )
    return VerificationResult(
        accuracy=float(fold_accuracy.mean()),
        accuracy_std=float(fold_accuracy.std()),
        fold_accuracy=fold_accuracy,
        fold_threshold=THRESHOLDS[best],
        thresholds=THRESHOLDS.copy(),
        tpr=rates[1].mean(0),
        fpr=rates[0].mean(0),
        at_far=tuple(points),
        num_genuine=int(sizes[1].sum()),
        num_impostor=int(sizes[0].sum()),
    )


def correct_pairs(distances: Matrix, issame: Labels, result: VerificationResult) -> Array:
    """Which pairs the protocol decided rightly, bool [P], for accuracies of parts of them.

    Args:
        distances: Those that ``result`` was made from, [P].
        issame: [P], the same.
        result: Of :func:`verify_distances`.
    """
    labels = _labels(issame, len(to_numpy(distances)))
    fold = _fold_of_pairs(labels, len(result.fold_threshold))
    correct: Array = (to_numpy(distances) < result.fold_threshold[fold]) == labels
    return correct


def threshold_at(far: Array, thresholds: Array, target: float) -> float:
    """The threshold at which a false acceptance rate is reached, interpolated linearly.

    Many thresholds share one rate. The line starts at the last point whose rate is not above the target, as SciPy's
    ``interp1d`` did up to version 1.8, which published numbers come from.

    Args:
        far: False acceptance rates [T], not decreasing.
        thresholds: [T].
        target: The wanted rate.

    Returns:
        0 where the target is above every rate.
    """
    if far[-1] < target:
        return 0.0
    last = int(np.searchsorted(far, target, side="right")) - 1
    if last == len(far) - 1 or far[last] == target:
        return float(thresholds[last])
    slope = (thresholds[last + 1] - thresholds[last]) / (far[last + 1] - far[last])
    return float(slope * (target - far[last]) + thresholds[last])


def sum_with_flip(embeddings: Matrix, flipped: Matrix) -> Array:
    """Sum [N, D] in float64 of the raw embeddings of images and of their mirror images, as the protocol is run."""
    plain, mirrored = to_numpy(embeddings), to_numpy(flipped)
    if plain.shape != mirrored.shape:
        raise DataError("Shape of the mirror images' embeddings", value=mirrored.shape, expected=str(plain.shape))
    total: Array = plain.astype(np.float64) + mirrored
    return total


def mean_norm(*embeddings: Matrix) -> float:
    """Mean length of raw embeddings [N, D] (InsightFace's XNorm, over plain and mirrored ones)."""
    return float(np.concatenate([_norms(to_numpy(part).astype(np.float64)) for part in embeddings]).mean())


def normalised(embeddings: Array) -> Array:
    """Rows [N, D] of length 1 in float64; a row of zeros stays zero."""
    rows = embeddings.astype(np.float64)
    norms = _norms(rows)
    norms[norms == 0] = 1
    rows /= norms[:, None]
    return rows


def _norms(rows: Array) -> Array:
    norms: Array = np.sqrt(np.einsum("ij,ij->i", rows, rows))
    return norms


def _accepted(distances: Array, labels: Array, fold: Array, folds: int, thresholds: Array) -> Array:
    """Number of pairs strictly below each threshold: [impostor or genuine, F, T]."""
    first = np.searchsorted(thresholds, distances, side="right")  # the first threshold that accepts the pair
    bins = len(thresholds) + 1
    counts = np.bincount((labels * folds + fold) * bins + first, minlength=2 * folds * bins)
    cumulated: Array = counts.reshape(2, folds, bins)[:, :, :-1].cumsum(2)
    return cumulated


def _count(fold: Array, labels: Array, folds: int) -> Array:
    return np.bincount(labels * folds + fold, minlength=2 * folds).reshape(2, folds)


def _labels(issame: Labels, pairs: int) -> Array:
    labels = to_numpy(issame)
    if labels.shape != (pairs,):
        raise DataError("Shape of issame", value=labels.shape, expected=f"({pairs},), one per pair")
    if labels.dtype != bool and not np.isin(labels, (0, 1)).all():
        raise DataError("Values of issame", value=np.unique(labels)[:5].tolist(), expected="booleans, or 0 and 1")
    return labels.astype(np.int64)


def _check_distances(distances: Array) -> None:
    invalid = np.flatnonzero(~((distances >= 0) & (distances <= _LARGEST)))
    if len(invalid):
        shown = ", ".join(f"{pair}: {distances[pair]:.4g}" for pair in invalid[:5])
        raise DataError(
            f"Distances of {len(invalid)} pairs (pair {shown}{', ...' if len(invalid) > 5 else ''})",
            expected="squared Euclidean distances of unit vectors, 0 to 4",
            remedy="NaN comes from embeddings with NaN: check the images and the network.",
        )


def _fold_of_pairs(labels: Array, folds: int) -> Array:
    """The fold [P] of each pair, contiguous."""
    pairs = len(labels)
    if pairs < folds:
        raise DataError("Number of verification pairs", value=pairs, expected=f"at least {folds}, one per fold")
    fold = np.repeat(np.arange(folds), pairs // folds + (np.arange(folds) < pairs % folds))
    lacking = np.flatnonzero((_count(fold, labels, folds) == 0).any(0))
    if len(lacking):
        which = ", ".join(map(str, lacking + 1))
        raise DataError(
            f"Verification fold {which} of {folds} has only genuine or only impostor pairs",
            expected="both kinds in each of the contiguous folds",
            remedy="Interleave the two kinds in the list of pairs, or take fewer folds.",
        )
    return fold
