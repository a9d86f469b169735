"""Which images are classified and which are contrasted: QGFace's gates as functions of quality.

Shapes: B rows. Quality is ``n = (scaler + 1) / 2`` in [0, 1]; images below the threshold b are of low quality.
Source: Song and Wang, "QGFace", arXiv 2312.17494; constants as in the authors' program.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.methods.qgface.statistics import EPS

#: How the quality of a pair follows from that of its two images.
SELECTIONS = ("low", "mean", "high")
#: Weight of a pair below the threshold.
WEIGHTINGS = ("sgn", "cos", "linear")
#: Weight of a pair above it: none (``half``), or the mirrored form (``whole``).
RANGES = ("half", "whole")


def image_quality(scaler: Tensor) -> Tensor:
    """``(scaler + 1) / 2``: from the margin scaler in [-1, 1] to quality in [0, 1], any shape."""
    return (scaler + 1) / 2


def classification_gate(scaler: Tensor, threshold: float, scale: float = 64.0) -> Tensor:
    """``sigmoid(2 s (n - b))``, by which a row of logits is multiplied: 0 for low quality, 1 for high.

    It rises from 1 % to 99 % while n goes from b - 0.036 to b + 0.036 (s = 64). A threshold of 0 is no gate: 1 for all.

    Args:
        scaler: [B, 1].
        threshold: b in [0, 1].
        scale: s.

    Returns:
        [B, 1].
    """
    if threshold == 0:
        return torch.ones_like(scaler)
    return torch.sigmoid(scale * (scaler + 1 - 2 * threshold))


def pair_quality(quality_1: Tensor, quality_2: Tensor, select: str = "low") -> Tensor:
    """Quality of pairs from the qualities of their images, same shape: the ``low``er, their ``mean``, the ``high``er.

    Raises:
        ConfigError: Another selection.
    """
    check_choice("selection of a pair's quality", select, SELECTIONS)
    if select == "mean":
        return (quality_1 + quality_2) / 2
    return torch.minimum(quality_1, quality_2) if select == "low" else torch.maximum(quality_1, quality_2)


def contrast_weight(quality: Tensor, threshold: float, *, weighting: str = "sgn", weight_range: str = "half") -> Tensor:
    """Weight of a pair in the contrastive loss, by which its row of logits is multiplied.

    Below the threshold b: ``sgn`` 1; ``cos`` ``(1 - cos(pi n / (b + e))) / 2``; ``linear`` ``n / (b + e)``; the last
    two vanish for the very worst pairs and peak at b. From b on: 0 with ``half``; with ``whole`` the mirrored forms 1,
    ``1 + cos(pi (n + 1 - 2b) / (2 (1 - b + e)))`` and ``(n - 1) / (b - 1 + e)``. e is 1e-3. A threshold of 0 is no
    gate: 1 for all.

    Args:
        quality: n in [0, 1], any shape.
        threshold: b in [0, 1].
        weighting: ``"sgn"``, ``"cos"`` or ``"linear"``.
        weight_range: ``"half"`` or ``"whole"``.

    Returns:
        The shape of ``quality``.

    Raises:
        ConfigError: Another weighting or range.
    """
    check_choice("weighting", weighting, WEIGHTINGS)
    check_choice("range of the weighting", weight_range, RANGES)
    b = threshold
    if b == 0:
        return torch.ones_like(quality)
    ones = torch.ones_like(quality)
    if weighting == "sgn":
        below, above = ones, ones
    elif weighting == "cos":
        below = (1 - torch.cos(math.pi / (b + EPS) * quality)) / 2
        above = 1 + torch.cos(math.pi / (2 * (1 - b + EPS)) * (quality + 1 - 2 * b))
    else:
        below = quality / (b + EPS)
        # Kept from 0, which b - 1 + e reaches at b = 0.999.
        above = (quality - 1) / min(b - 1 + EPS, -EPS)
    return torch.where(quality < b, below, above if weight_range == "whole" else 0.0)


def check_threshold(threshold: float) -> float:
    """The threshold itself.

    Raises:
        ConfigError: It lies outside [0, 1].
    """
    if not 0 <= threshold <= 1:
        raise ConfigError(
            "QGFace quality threshold",
            value=threshold,
            expected="a number in [0, 1]",
            remedy="Quality is (margin scaler + 1) / 2; 0 switches the gate off.",
        )
    return threshold


def check_choice(what: str, value: str, choices: tuple[str, ...]) -> str:
    """The value itself.

    Raises:
        ConfigError: It is none of the choices; the message suggests the nearest.
    """
    if value not in choices:
        raise ConfigError(f"QGFace {what}", value=value, remedy=did_you_mean(value, choices))
    return value
