"""Face crops as ArcFace and its successors expect them: five landmarks moved onto a template by a similarity."""

from __future__ import annotations

import cv2
import numpy as np
from numpy.typing import ArrayLike, NDArray

from qsd_plugin.core.errors import DataError
from qsd_plugin.data.face_images import check_rgb

#: Left eye, right eye, nose, left and right mouth corner (left in the image), x and y in a crop of 112x112 pixels.
TEMPLATE_112 = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655], [70.7299, 92.2041]]
)


def norm_crop(image: NDArray[np.uint8], points: ArrayLike, size: int = 112) -> NDArray[np.uint8]:
    """The aligned crop of one face: linear interpolation, black outside the image.

    Args:
        image: RGB, uint8 [H, W, 3]. (The crop of a BGR image is the same crop in BGR.)
        points: Landmarks in pixels, [5, 2] in the order of :data:`TEMPLATE_112`, or the 68 of iBUG, [68, 2].
        size: Side of the crop in pixels: a multiple of 112 or of 128, see :func:`template`.

    Returns:
        uint8 [size, size, 3].

    Raises:
        DataError: The image, the points or the size are not of this kind.
    """
    check_rgb(image)
    return _warp(image, similarity(_five(points), template(size)), size)


def crop_by(image: NDArray[np.uint8], points: ArrayLike, size: int = 112) -> NDArray[np.uint8]:
    """:func:`norm_crop`, also by four points, [4, 2]: both eyes, the nose and the middle of the mouth (SCface's lists).

    Args:
        image: RGB, uint8 [H, W, 3].
        points: Landmarks in pixels.
        size: Side of the crop in pixels.

    Raises:
        DataError: The image, the points or the size are not of this kind.
    """
    if np.shape(points) != (4, 2):
        return norm_crop(image, points, size)
    check_rgb(image)
    five = template(size)
    return _warp(image, similarity(points, np.stack([*five[:3], five[3:].mean(axis=0)])), size)


def template(size: int) -> NDArray[np.float64]:
    """The five target points in a crop of ``size`` pixels, [5, 2].

    For multiples of 112 the template is scaled; for multiples of 128 it is scaled as for 128 and moved right by 8 of
    128 pixels, so that a crop of 128 shows the crop of 112 with a margin.

    Raises:
        DataError: ``size`` is neither.
    """
    if size > 0 and size % 112 == 0:
        return TEMPLATE_112 * (size / 112)
    if size > 0 and size % 128 == 0:
        points: NDArray[np.float64] = TEMPLATE_112 + np.array([8.0, 0.0])
        return points * (size / 128)
    raise DataError("Side of an aligned face crop", value=size, expected="a multiple of 112 or of 128 pixels")


def similarity(source: ArrayLike, target: ArrayLike) -> NDArray[np.float64]:
    """The rotation, scale and shift, [2, 3], that moves ``source`` onto ``target`` with the least squared distances.

    Umeyama's solution (PAMI 1991), which in the plane is a quotient of complex numbers. Never a reflection.

    Args:
        source: Points [N, 2], N >= 2.
        target: As many points.

    Raises:
        DataError: Points that are not finite, or all the same.
    """
    start, end = (np.asarray(points, dtype=np.float64) for points in (source, target))
    if start.shape != end.shape or start.ndim != 2 or start.shape[1] != 2 or not np.isfinite([start, end]).all():
        raise DataError(
            "Landmarks", value=f"shapes {start.shape} and {end.shape}", expected="two lists of as many finite points"
        )
    from_centre = (start - start.mean(axis=0)) @ (1, 1j)
    to_centre = (end - end.mean(axis=0)) @ (1, 1j)
    spread = np.vdot(from_centre, from_centre).real
    if not spread > 0.0:
        raise DataError("Landmarks", value=start.tolist(), expected="points that are not all the same")
    factor = np.vdot(from_centre, to_centre) / spread  # scale * exp(i * angle)
    linear = np.array([[factor.real, -factor.imag], [factor.imag, factor.real]])
    return np.column_stack([linear, end.mean(axis=0) - linear @ start.mean(axis=0)])


def five_points(points: ArrayLike) -> NDArray[np.float64]:
    """The five points, [5, 2], of iBUG's 68, [68, 2]: middles of the eyes, tip of the nose, mouth corners.

    Raises:
        DataError: Not 68 points.
    """
    marks = np.asarray(points, dtype=np.float64)
    if marks.shape != (68, 2):
        raise DataError("Landmarks", value=f"shape {marks.shape}", expected="(68, 2)")
    eyes = [marks[[36, 39]].mean(axis=0), marks[[42, 45]].mean(axis=0)]
    return np.stack([*eyes, marks[30], marks[48], marks[54]])


def _warp(image: NDArray[np.uint8], matrix: NDArray[np.float64], size: int) -> NDArray[np.uint8]:
    crop: NDArray[np.uint8] = cv2.warpAffine(image, matrix, (size, size), flags=cv2.INTER_LINEAR, borderValue=0)
    return crop


def _five(points: ArrayLike) -> NDArray[np.float64]:
    marks = np.asarray(points, dtype=np.float64)
    if marks.shape == (68, 2):
        return five_points(marks)
    if marks.shape != (5, 2):
        raise DataError(
            "Landmarks of a face",
            value=f"shape {marks.shape}",
            expected="(5, 2): left eye, right eye, nose, left and right mouth corner; or (68, 2)",
        )
    return marks
