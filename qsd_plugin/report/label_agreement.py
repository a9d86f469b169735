"""How far labellings of the same images agree: with each other, and with the truth where it is known.

Shapes: N images.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import spearmanr

from qsd_plugin.quality.checks import same_identity_pairs

#: Severity gap from which on the better image of a pair is called obvious; severities run from 0 to 1.
CLEAR_GAP = 0.3


@dataclass(frozen=True)
class Direction:
    """How often two labellings choose the same image of a same-identity pair as the better one.

    Attributes:
        agreement: Share of the pairs, 0 to 1; one that the first labelling ties counts half, so that 0.5 is chance.
            NaN without pairs.
        pairs: Pairs in which the reference prefers one image.
        ties: How many of them the first labelling does not decide.
    """

    agreement: float
    pairs: int
    ties: int


@dataclass(frozen=True)
class TruthAgreement:
    """How well labels tell what happened to the images.

    Attributes:
        correlation: Spearman's rank correlation of label and true quality (minus severity) over all images, -1 to 1.
        by_degradation: The same over the images that went through one degradation, with its severity alone.
        images: How many images each of those is measured on.
        direction: On same-identity pairs with any severity gap.
        clear_direction: On those with a severity gap of at least :data:`CLEAR_GAP`.
    """

    correlation: float
    by_degradation: dict[str, float]
    images: dict[str, int]
    direction: Direction
    clear_direction: Direction


def rank_correlation(first: ArrayLike, second: ArrayLike) -> float:
    """Spearman's rank correlation over the images that both know.

    Args:
        first: Scores, [N], NaN where unknown.
        second: The same for other scores.

    Returns:
        -1 to 1; NaN where fewer than two images are known to both, or where one side is constant.
    """
    a, b = np.asarray(first, np.float64), np.asarray(second, np.float64)
    known = np.isfinite(a) & np.isfinite(b)
    a, b = a[known], b[known]
    if len(a) < 2 or np.ptp(a) == 0 or np.ptp(b) == 0:
        return float("nan")
    return float(spearmanr(a, b).statistic)


def direction_agreement(
    scores: ArrayLike, reference: ArrayLike, identities: ArrayLike, *, min_gap: float = 0.0
) -> Direction:
    """On how many same-identity pairs ``scores`` and ``reference`` prefer the same image.

    Args:
        scores: The labelling to judge, [N], NaN where unknown.
        reference: What it is compared with, [N], higher is better; pairs that it ties are left out.
        identities: [N], integers or strings.
        min_gap: Leave out pairs whose reference values differ by less.
    """
    label, truth = np.asarray(scores, np.float64), np.asarray(reference, np.float64)
    agreeing, pairs, ties = 0.0, 0, 0
    for first, second in same_identity_pairs(identities):
        gap, label_gap = truth[first] - truth[second], label[first] - label[second]
        # The difference of two severities such as 0.5 and 0.2 may fall a rounding error short of their gap.
        chosen = (gap != 0) & (np.abs(gap) >= min_gap - 1e-12) & np.isfinite(label_gap)
        tied = chosen & (label_gap == 0)
        pairs += int(chosen.sum())
        ties += int(tied.sum())
        agreeing += float((chosen & (gap * label_gap > 0)).sum()) + 0.5 * float(tied.sum())
    return Direction(agreeing / pairs if pairs else float("nan"), pairs, ties)


def agreement_with_truth(
    scores: ArrayLike,
    severity: NDArray[np.float64],
    by_degradation: Mapping[str, NDArray[np.float64]],
    identities: ArrayLike,
) -> TruthAgreement:
    """Compare labels with the known severity of what was done to the images.

    Args:
        scores: Labels, [N], NaN where unknown.
        severity: All degradations together, [N], 0 (none) to 1.
        by_degradation: Severity of each degradation, [N]; 0 where it was not applied.
        identities: [N].
    """
    label = np.asarray(scores, np.float64)
    hit = {name: (values > 0) & np.isfinite(label) for name, values in by_degradation.items()}
    return TruthAgreement(
        correlation=rank_correlation(label, -severity),
        by_degradation={name: rank_correlation(label[hit[name]], -by_degradation[name][hit[name]]) for name in hit},
        images={name: int(chosen.sum()) for name, chosen in hit.items()},
        direction=direction_agreement(label, -severity, identities),
        clear_direction=direction_agreement(label, -severity, identities, min_gap=CLEAR_GAP),
    )
