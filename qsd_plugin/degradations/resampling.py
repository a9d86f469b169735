"""Resizing by named filters of Pillow and OpenCV, as a function of an image and as the matrix it multiplies by."""

from __future__ import annotations

import functools

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.degradations.operations import Image

#: Antialiased when shrinking, but for ``nearest``.
PILLOW_FILTERS = {
    f"pillow_{member.name.lower()}": member
    for member in (
        PILImage.Resampling.BICUBIC,
        PILImage.Resampling.BILINEAR,
        PILImage.Resampling.NEAREST,
        PILImage.Resampling.BOX,
        PILImage.Resampling.LANCZOS,
    )
}
#: Not antialiased, but for ``area``.
OPENCV_FILTERS = {
    "opencv_nearest": cv2.INTER_NEAREST,
    "opencv_linear": cv2.INTER_LINEAR,
    "opencv_area": cv2.INTER_AREA,
    "opencv_cubic": cv2.INTER_CUBIC,
    "opencv_lanczos4": cv2.INTER_LANCZOS4,
}


def resize(image: Image, height: int, width: int, resampling: str) -> Image:
    """Resize to ``height`` x ``width`` with a filter of :data:`PILLOW_FILTERS` or :data:`OPENCV_FILTERS`.

    Raises:
        ConfigError: Unknown filter.
    """
    check_filter(resampling)
    if resampling in PILLOW_FILTERS:
        full = PILImage.fromarray(image)
        return np.array(full.resize((width, height), PILLOW_FILTERS[resampling]), dtype=np.uint8)
    return np.asarray(cv2.resize(image, (width, height), interpolation=OPENCV_FILTERS[resampling]), dtype=np.uint8)


@functools.lru_cache(maxsize=512)
def resize_matrix(length: int, target: int, resampling: str) -> npt.NDArray[np.float32]:
    """The weights that :func:`resize` gives ``length`` values for each of ``target`` ones, [target, length].

    They are the library's own: what it makes of the unit vectors. Resizing an image is one such product along each
    side, up to rounding. The array is shared by all callers and read-only.

    Raises:
        ConfigError: Unknown filter.
    """
    check_filter(resampling)
    unit = np.eye(length, dtype=np.float32)
    if resampling in PILLOW_FILTERS:
        weights = np.array(PILImage.fromarray(unit).resize((length, target), PILLOW_FILTERS[resampling]))
    else:
        weights = np.asarray(cv2.resize(unit, (length, target), interpolation=OPENCV_FILTERS[resampling]))
    weights = weights.astype(np.float32).reshape(target, length)
    weights.flags.writeable = False
    return weights


def check_filter(resampling: str) -> None:
    """Refuse a filter that is in neither set.

    Raises:
        ConfigError: It is unknown; the message suggests the nearest.
    """
    if resampling not in PILLOW_FILTERS and resampling not in OPENCV_FILTERS:
        known = [*PILLOW_FILTERS, *OPENCV_FILTERS]
        raise ConfigError("Unknown resampling filter", value=resampling, remedy=did_you_mean(str(resampling), known))
