"""Error-versus-discard curves: how fast errors vanish when the pairs of lowest quality are put aside.

Grother and Tabassi, TPAMI 2007, "Performance of biometric quality measures"; Schlett et al., arXiv 2303.13294,
"Considerations on the evaluation of biometric quality assessment algorithms", for the starting error, the stepwise
curve and the partial area.

Shapes: P pairs of images, K points.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.evaluation.arrays import Array, Labels, Matrix, to_numpy
from qsd_plugin.evaluation.curves import split_scores

ERRORS = ("fnmr", "fmr")
RULES = ("fixed", "subset")


@dataclass(frozen=True)
class Curve:
    """Error rate of the pairs that remain; between two points the curve stays at the left one's value.

    Attributes:
        discard: Share of the pairs put aside [K], ascending from 0, at most ``max_discard``.
        error: Error rate [K] of the others.
        pauc: Area under the curve from 0 to ``max_discard``; the lower, the better the quality predicts errors. A
            quality that says nothing gives about ``error[0] * max_discard``.
        pauc_best: The area if the wrong pairs were put aside first, the lowest that the fixed threshold allows.
        threshold: Similarity from which on a pair counts as the same person [K]; constant with ``fixed``.
        max_discard: Right end of the curve.
        num_pairs: Pairs of the kind that ``error`` is about.
        protocol: What was done, for a caption.
    """

    discard: Array
    error: Array
    pauc: float
    pauc_best: float
    threshold: Array
    max_discard: float
    num_pairs: int
    protocol: str


def error_discard_curve(
    similarity: Matrix,
    genuine: Labels,
    quality_a: Matrix,
    quality_b: Matrix,
    *,
    start_error: float,
    error: str = "fnmr",
    threshold: str = "fixed",
    max_discard: float = 0.3,
) -> Curve:
    """The curve of one quality measure on one set of pairs.

    The quality of a pair is the lower of its images'. Pairs of equal quality are put aside together, so the curve has a
    point per distinct quality. The share put aside counts pairs of the kind that the error is about.

    Args:
        similarity: [P], higher means more alike.
        genuine: Whether a pair shows one person [P]; bool, or 0 and 1.
        quality_a: Quality of the first image [P], higher is better.
        quality_b: Quality of the second image [P].
        start_error: Error rate with all pairs, between 0 and 1: the threshold has the highest error rate not above it.
        error: ``fnmr``: share of genuine pairs rejected. ``fmr``: share of impostor pairs accepted.
        threshold: ``fixed``: one threshold, as a system in operation has. ``subset``: for every remaining subset the
            threshold is set anew, so that the other error's rate stays at most what it is with all pairs; the curve may
            then begin below ``start_error``, and time grows with the number of points times the number of pairs.
        max_discard: Right end of the curve, between 0 and 1.

    Raises:
        ConfigError: Unknown kind of error or threshold, or a number out of its range.
        DataError: Shapes that do not fit, NaN, one kind of pairs only, or too few of them for ``start_error``.
    """
    _check_options(start_error, error, threshold, max_discard)
    quality = _pair_quality(quality_a, quality_b)
    impostor, mated = split_scores(similarity, genuine)
    mask = to_numpy(genuine).astype(bool)
    if quality.shape != mask.shape:
        raise DataError("Shape of the qualities", value=quality.shape, expected=f"{mask.shape}, one per pair")
    # With signs turned, impostors accepted are genuine pairs rejected: below is one case, "wrong = too low".
    if error == "fnmr":
        own, own_quality, other, other_quality, sign = mated, quality[mask], impostor, quality[~mask], 1
    else:
        own, own_quality, other, other_quality, sign = -impostor, quality[~mask], -mated, quality[mask], -1
    bound = _bound_at(own, start_error)

    order = np.argsort(own_quality, kind="stable")
    own, own_quality = own[order], own_quality[order]
    total = len(own)
    first = np.flatnonzero(np.concatenate(([True], own_quality[1:] != own_quality[:-1])))
    first = first[first / total <= max_discard]
    bounds = np.full(len(first), bound)
    if threshold == "subset":
        bounds = _subset_bounds(other, other_quality, own_quality[first], bound)
        wrong = np.array([np.count_nonzero(own[start:] < limit) for start, limit in zip(first, bounds, strict=True)])
    else:
        wrong = (own < bound)[::-1].cumsum()[::-1][first]
    discard, rate = first / total, wrong / (total - first)
    best = np.arange(int(max_discard * total) + 1)
    at_best = np.maximum(wrong[0] - best, 0) / np.maximum(total - best, 1)
    return Curve(
        discard=discard,
        error=rate,
        pauc=_area(discard, rate, max_discard),
        pauc_best=_area(best / total, at_best, max_discard),
        # An impostor is accepted from just above the bound on.
        threshold=bounds if sign > 0 else np.nextafter(-bounds, np.inf),
        max_discard=max_discard,
        num_pairs=total,
        protocol=f"{error.upper()}, {threshold} threshold from {error.upper()} {rate[0]:.4g}, pair quality = minimum",
    )


def _bound_at(own: Array, start_error: float) -> float:
    """The bound below which at most this share of ``own`` lies."""
    wrong = int(np.floor(start_error * len(own) * (1 + 1e-12)))
    if not wrong:
        raise DataError(
            f"Starting error {start_error} of {len(own)} pairs is less than one pair",
            expected="at least one error to begin with",
            remedy=f"Raise start_error to {1 / len(own):.2g} or more, or compare more pairs.",
        )
    return float(np.partition(own, wrong)[wrong])


def _subset_bounds(other: Array, other_quality: Array, kept_from: Array, bound: float) -> Array:
    """For each quality that pairs are kept from, the lowest bound that no larger share of ``other`` reaches."""
    order = np.argsort(other_quality, kind="stable")
    other, other_quality = other[order], other_quality[order]
    share = np.count_nonzero(other >= bound) / len(other)
    bounds = []
    for start in np.searchsorted(other_quality, kept_from).tolist():
        remaining = other[start:]
        if not len(remaining):
            raise DataError(
                "No pairs of the other kind are left to set the threshold on",
                expected="genuine and impostor pairs of similar quality",
                remedy="Lower max_discard, or use threshold='fixed'.",
            )
        place = len(remaining) - 1 - int(np.floor(share * len(remaining) * (1 + 1e-12)))
        bounds.append(np.nextafter(np.partition(remaining, place)[place], np.inf) if place >= 0 else -np.inf)
    return np.array(bounds)


def _area(discard: Array, error: Array, end: float) -> float:
    """Area under the step function from 0 to ``end``."""
    return float((np.diff(np.append(discard, end)) * error).sum())


def _pair_quality(quality_a: Matrix, quality_b: Matrix) -> Array:
    first, second = to_numpy(quality_a), to_numpy(quality_b)
    if first.ndim != 1 or first.shape != second.shape:
        raise DataError("Shapes of quality_a and quality_b", value=(first.shape, second.shape), expected="[P] and [P]")
    quality: Array = np.minimum(first, second)
    missing = int(np.isnan(quality).sum())
    if missing:
        raise DataError(f"{missing} pairs have an image without a quality (NaN)", expected="a number for every image")
    return quality


def _check_options(start_error: float, error: str, threshold: str, max_discard: float) -> None:
    for name, value, known in (("error", error, ERRORS), ("threshold", threshold, RULES)):
        if value not in known:
            raise ConfigError(f"Error-versus-discard {name}", value=value, remedy=did_you_mean(value, known))
    for name, number in (("start_error", start_error), ("max_discard", max_discard)):
        if not 0 < number < 1:
            raise ConfigError(f"Error-versus-discard {name}", value=number, expected="between 0 and 1")
