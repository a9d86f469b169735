"""A measure of image sharpness that involves no trained model, for grouping queries by quality."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def sharpness(paths: Sequence[str], *, size: tuple[int, int] = (64, 128)) -> NDArray[np.float64]:
    """Mean squared gradient of the grey image (Tenengrad without its threshold), brightness divided out.

    Args:
        paths: Images, N of them.
        size: Width and height in pixels they are brought to first, so that large crops do not look sharper.

    Returns:
        [N], higher is sharper.
    """
    from PIL import Image

    values = np.empty(len(paths))
    for place, path in enumerate(paths):
        with Image.open(path) as image:
            grey = np.asarray(image.convert("L").resize(size, Image.Resampling.BILINEAR), dtype=np.float64)
        values[place] = relative_gradient(grey)
    return values


def relative_gradient(grey: NDArray[np.float64]) -> float:
    """Mean squared gradient of a grey image [H, W], 0 to 255, over its squared mean; higher is sharper."""
    vertical, horizontal = np.gradient(grey)
    return float(np.mean(vertical**2 + horizontal**2)) / max(float(np.mean(grey)) ** 2, 1.0)
