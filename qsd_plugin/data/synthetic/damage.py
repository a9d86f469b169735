"""Which degradations a synthetic picture suffers, how strongly, and one number for all of them."""

from __future__ import annotations

import math

import numpy as np

from qsd_plugin import degradations
from qsd_plugin.degradations.operations import Image

#: The degradations used, in the order light meets them on its way into a file. A list of its own, because a
#: degradation registered later must not change the sets.
DEGRADATIONS = ("occlusion", "darkness", "motion_blur", "blur", "low_resolution", "noise", "compression")
#: Shares of pictures with no, one and two degradations.
DEGRADATION_COUNTS = (0.35, 0.4, 0.25)


def damage(picture: Image, generator: np.random.Generator, level: float) -> tuple[Image, dict[str, float]]:
    """Degrade a picture in none, one or two ways.

    Args:
        picture: [H, W, 3] uint8 RGB.
        generator: Decides which and how.
        level: In [0, 1]; severities are drawn from [0, ``level``], and nothing else depends on it.

    Returns:
        The picture, and the severity in [0, 1] of every degradation it went through.
    """
    severities: dict[str, float] = {}
    count = int(generator.choice(len(DEGRADATION_COUNTS), p=DEGRADATION_COUNTS))
    chosen = sorted(generator.choice(len(DEGRADATIONS), size=count, replace=False).tolist())
    for name in (DEGRADATIONS[place] for place in chosen):
        severities[name] = level * float(generator.uniform())
        picture, _ = degradations.apply(name, picture, generator, severities[name])
    return picture, severities


def total_severity(severities: dict[str, float]) -> float:
    """One number in [0, 1] for several degradations: ``1 - product of (1 - severity)``."""
    return 1.0 - math.prod(1.0 - severity for severity in severities.values())
