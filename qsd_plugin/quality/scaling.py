"""Putting quality scores on a common scale, and the controls that take quality away again.

Everything here acts on the scores of **one** data set: scores are not comparable across data sets, so a scale is
fitted, and labels are shuffled, inside each. Unlabelled images carry NaN and stay NaN.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.streams import numpy_stream

#: Values of ``QUALITY.SCALE``.
SCALES = ("none", "minmax", "rank")
#: Values of ``QUALITY.CONTROL``.
CONTROLS = ("none", "shuffle", "random_direction", "reverse")
#: The top of the label scale; labels span 0 to this.
TOP = 100.0


def rescale(scores: ArrayLike, kind: str) -> NDArray[np.float64]:
    """Scores of one data set on the 0 to 100 label scale.

    Args:
        scores: Quality per image, [N], higher is better, NaN where unlabelled.
        kind: ``none`` returns the scores as they are, ``minmax`` stretches them linearly, ``rank`` replaces them by
            their rank, ties sharing the mean rank.

    Returns:
        Float64 [N]. Scores that are all equal carry no order: both scales map them to 50.

    Raises:
        ConfigError: ``kind`` is not one of :data:`SCALES`.
    """
    _check_name("QUALITY.SCALE", kind, SCALES)
    values = np.array(scores, dtype=np.float64)
    if kind == "none":
        return values
    known = ~np.isnan(values)
    values[known] = minmax(values[known]) if kind == "minmax" else _percentile(values[known])
    return values


def control(scores: ArrayLike, kind: str, *, seed: int) -> NDArray[np.float64]:
    """Labels of one data set as a control experiment wants them.

    Args:
        scores: Labels on the 0 to 100 scale, [N], NaN where unlabelled.
        kind: ``none``; ``shuffle`` deals the labels out again at random (same distribution, no relation to the image);
            ``reverse`` gives ``100 - q`` (every gap kept, every direction turned round).
        seed: Seeds the shuffle.

    Raises:
        ConfigError: ``kind`` is unknown, or ``random_direction``, which no labelling of single images can produce.
    """
    _check_name("QUALITY.CONTROL", kind, CONTROLS)
    values = np.array(scores, dtype=np.float64)
    if kind == "shuffle":
        known = ~np.isnan(values)
        values[known] = numpy_stream(seed, "quality control").permutation(values[known])
    elif kind == "reverse":
        values = TOP - values
    elif kind == "random_direction":
        raise ConfigError(
            "The control random_direction acts on pairs, not on the labels of single images",
            remedy="Call random_direction(quality_1, quality_2, generator) on the labels of the pairs of a batch.",
        )
    return values


def random_direction(
    quality_1: torch.Tensor, quality_2: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Swap the two labels of each pair with probability 1/2.

    Gaps, and with them the choice of pairs, stay exactly those of the method; only who teaches is left to chance.
    Labels of single images cannot do this: any fixed labelling is a consistent order of the images (that is
    ``shuffle``).

    Args:
        quality_1: Labels of the first images, [B].
        quality_2: Labels of the second images, [B].
        generator: A CPU generator. Coins are drawn on the CPU and then moved, so that every device sees the same ones.
    """
    coins = torch.rand(quality_1.shape, generator=generator) < 0.5
    swap = coins.to(quality_1.device)
    return torch.where(swap, quality_2, quality_1), torch.where(swap, quality_1, quality_2)


def minmax(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``values`` [N, ...] stretched to [0, 100] along the first axis; a column of equal values becomes 50."""
    if not values.size:
        return values
    low, high = values.min(axis=0), values.max(axis=0)
    spread = high - low
    flat = spread == 0
    unit = (values - low) / np.where(flat, 1.0, spread)  # exactly 1 at the top, so that no label exceeds the scale
    return np.where(flat, TOP / 2, TOP * unit)


def _percentile(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """``100 * rank / (N - 1)`` with ranks from 0, ties sharing the mean of theirs; a single value becomes 50."""
    if len(values) < 2:
        return np.full_like(values, TOP / 2)
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    mean_rank = np.cumsum(counts) - 1 - (counts - 1) / 2
    ranks: NDArray[np.float64] = mean_rank[inverse.reshape(-1)]
    return TOP * ranks / (len(values) - 1)


def _check_name(key: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(key, value=value, expected=f"one of {', '.join(known)}", remedy=did_you_mean(value, known))
