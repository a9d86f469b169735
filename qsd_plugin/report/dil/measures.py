"""What is measured on pictures without a model: sharpness and brightness.

A picture is an [h, w, 3] uint8 RGB array; N pictures.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image as PILImage

from qsd_plugin.core.panels import Picture
from qsd_plugin.report.sharpness import relative_gradient

#: In this order everywhere.
MEASURES = ("sharpness", "brightness")
_FLAT = 1e-6


def measured(pictures: Sequence[Picture]) -> NDArray[np.float64]:
    """Sharpness and brightness of every picture, [N, 2].

    Sharpness is the natural logarithm of the mean squared gradient over the squared mean, so that a difference is the
    logarithm of a ratio and darkness alone does not count as blur. Brightness is the mean grey level, 0 to 255.
    """
    values = np.empty((len(pictures), len(MEASURES)))
    for place, picture in enumerate(pictures):
        grey = np.asarray(PILImage.fromarray(picture).convert("L"), dtype=np.float64)
        values[place] = np.log(max(relative_gradient(grey), _FLAT)), grey.mean()
    return values
