"""Are these labels fit to train with? Coverage, saturation, spread, and what to say when they are not.

Shapes: N training images.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import LabelError
from qsd_plugin.quality.keys import PathLike
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.quality.scaling import TOP

PERCENTILES = (5, 25, 50, 75, 95)
#: A label this close to an end of its scale counts as saturated, as a share of the scale.
END = 0.01
#: Shares and ranges from which on a warning is given.
MAX_AT_ENDS = 0.1
MIN_RANGE = 5.0
MIN_RAW_RANGE = 0.05


@dataclass(frozen=True)
class LabelCheck:
    """What is known about the labels of one training set; ``None`` where the file does not tell.

    Attributes:
        images: Training images.
        covered: How many of them have a label.
        percentiles: Labels at 5, 25, 50, 75 and 95 %; empty without labels.
        at_bottom: Share of the labels within 1 % of the scale's lower end, 0 to 1.
        at_top: The same for the upper end.
        spread: Median spread of a label over the rounds, in units of the label.
        raw_range: The measure before scaling at 5 and 95 %.
        pairs: Same-identity pairs of labelled images.
        clear_pairs: Share of the pairs whose label gap exceeds their spread, the root of the sum of squares of both.
        identities: Identities with two labelled images or more.
        constant_identities: How many of those have equal labels only, so that none of their pairs has a direction.
        warnings: Sentences for the user.
    """

    images: int
    covered: int
    percentiles: dict[int, float]
    at_bottom: float
    at_top: float
    spread: float | None
    raw_range: tuple[float, float] | None
    pairs: int
    clear_pairs: float | None
    identities: int
    constant_identities: int
    warnings: list[str] = field(default_factory=list)


def check_labels(
    labels: QualityLabels,
    paths: Sequence[PathLike],
    identities: ArrayLike,
    *,
    root: PathLike | None = None,
    basenames: bool = True,
) -> LabelCheck:
    """Compare labels with the training images they are for.

    Args:
        labels: Labels of the training set.
        paths: Its images, [N].
        identities: Who they show, [N], integers or strings.
        root: The data-set folder, for the look-up.
        basenames: Whether a basename may identify an image.
    """
    found, valid = labels.lookup(paths, root=root, basenames=basenames)
    known = valid.numpy()
    score = found.double().numpy()[known]
    spread = labels.lookup_spread(paths, root=root, basenames=basenames).double().numpy()[known]
    shown = np.asarray(identities)[known]
    groups = list(_groups(shown))
    pairs, clear = _clear_pairs(score, spread, shown)
    bottom, top = _ends(labels, score)
    margin = END * (top - bottom)
    raw = labels.raw[np.isfinite(labels.raw)]
    return LabelCheck(
        images=len(known),
        covered=int(known.sum()),
        percentiles={at: float(np.percentile(score, at)) for at in PERCENTILES} if len(score) else {},
        at_bottom=float(np.mean(score <= bottom + margin)) if len(score) else 0.0,
        at_top=float(np.mean(score >= top - margin)) if len(score) else 0.0,
        spread=float(np.nanmedian(spread)) if np.isfinite(spread).any() else None,
        raw_range=_inner_range(raw) if len(raw) else None,
        pairs=pairs,
        clear_pairs=clear,
        identities=len(groups),
        constant_identities=sum(float(np.ptp(score[rows])) == 0.0 for rows in groups),
        warnings=label_warnings(labels),
    )


def label_warnings(labels: QualityLabels) -> list[str]:
    """What a user should know before training with these labels; one sentence or two each, none if all is well."""
    score = labels.score[np.isfinite(labels.score)]
    if not len(score):
        return ["No image has a label."]
    if np.ptp(score) == 0:
        return [f"All {len(score)} labels are {score[0]:g}: no pair of images has a better and a worse one."]
    warnings = []
    if labels.meta.get("scale") != "none" and np.ptp(score) < MIN_RANGE:
        warnings.append(
            f"The labels span {score.min():.3g} to {score.max():.3g} of a scale from 0 to {TOP:g}: are they on another "
            "one, such as 0 to 1? QUALITY.SCALE minmax stretches labels whose header names no scale."
        )
    bottom, top = _ends(labels, score)
    margin = END * (top - bottom)
    at_ends = float(np.mean((score <= bottom + margin) | (score >= top - margin)))
    if at_ends > MAX_AT_ENDS:
        warnings.append(
            f"{at_ends:.0%} of the labels lie within {END:.0%} of the scale's ends (saturated): pairs among them have "
            "no gap. QUALITY.SCALE rank spreads them; an earlier checkpoint or --folds may separate them."
        )
    raw = labels.raw[np.isfinite(labels.raw)]
    if labels.meta.get("method") == "SDD-FIQA" and len(raw):
        low, high = _inner_range(raw)
        if high - low < MIN_RAW_RANGE:
            warnings.append(
                f"The raw W1 of 90 % of the images lies between {low:.3f} and {high:.3f}: the network separates its "
                "own training images so well (over-fitted) that the labels are mostly noise. Label with --folds "
                "(QUALITY.FOLDS), or with an earlier checkpoint."
            )
    return warnings


def require_usable(labels: QualityLabels) -> None:
    """Refuse labels that no training can use.

    Raises:
        LabelError: They are off the scale from 0 to 100, or all equal, so that no image is put before another.
    """
    score = labels.score[np.isfinite(labels.score)]
    wrong = score[(score < 0) | (score > TOP)]
    if len(wrong):
        raise LabelError(
            f"Quality {labels.origin}: {len(wrong)} of {len(score)} labels out of range, e.g. {wrong[0]:g}",
            expected=f"labels from 0 to {TOP:g}",
            remedy="Set QUALITY.SCALE minmax or rank.",
        )
    if len(score) and np.ptp(score) == 0:
        raise LabelError(
            f"Quality {labels.origin}: all {len(score)} labels are equal",
            value=float(score[0]),
            expected="labels that differ, or no pair of images has a teacher",
            remedy="Make them again (--stage labels, or tools/quality_labels.py) and look at their report.",
        )


def same_identity_pairs(identities: ArrayLike) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """All pairs of images of one identity, as row numbers (first, second), one identity at a time."""
    for rows in _groups(np.asarray(identities)):
        first, second = np.triu_indices(len(rows), k=1)
        yield rows[first], rows[second]


def _clear_pairs(
    score: NDArray[np.float64], spread: NDArray[np.float64], identities: NDArray[Any]
) -> tuple[int, float | None]:
    """Number of same-identity pairs, and the share of those of known spread whose gap exceeds it."""
    pairs = measured = clear = 0
    for first, second in same_identity_pairs(identities):
        noise = np.hypot(spread[first], spread[second])
        pairs += len(first)
        measured += int(np.isfinite(noise).sum())
        clear += int((np.abs(score[first] - score[second]) > noise).sum())
    return pairs, clear / measured if measured else None


def _groups(identities: NDArray[Any]) -> Iterator[NDArray[np.int64]]:
    """Rows of each identity that has two or more."""
    order = np.argsort(identities, kind="stable")
    _, starts = np.unique(identities[order], return_index=True)
    for rows in np.split(order, starts[1:]):
        if len(rows) > 1:
            yield rows


def _ends(labels: QualityLabels, score: NDArray[np.float64]) -> tuple[float, float]:
    """The ends of the labels' scale; those of the labels themselves where they are unscaled."""
    if labels.meta.get("scale") == "none" and len(score):
        return float(score.min()), float(score.max())
    return 0.0, TOP


def _inner_range(values: NDArray[np.float64]) -> tuple[float, float]:
    low, high = np.percentile(values, [5, 95])
    return float(low), float(high)
