"""What QGFace and AdaFace do to training images: rescaling, crops, photometric changes, rotation.

Sources: Song and Wang, "Quality-Guided Joint Training for Mixed-Quality Face Recognition", arXiv 2312.17494; Kim et
al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022. Drawn by severity here, where 0 changes nothing
(``qgface_rescale`` still writes its JPEG) and 1 is the strongest that either method draws. How the methods draw them is
in :mod:`.views`.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage
from PIL import ImageEnhance

from qsd_plugin.degradations.operations import DEGRADATIONS, Degradation, Image
from qsd_plugin.degradations.resampling import OPENCV_FILTERS, PILLOW_FILTERS, resize

# Shares of each side that are left, weakest and strongest.
QGFACE_SIDE = (0.5, 0.1)
ADAFACE_SIDE = (1.0, 0.2)
QGFACE_JPEG_QUALITY = 75
CROP_AREA = 0.2  # share of the area that the smallest crop keeps
CROP_RATIO = (3.0 / 4.0, 4.0 / 3.0)  # width to height
PHOTOMETRIC_RANGE = 0.5  # factors lie within 1 +- this
ROTATION = 45.0  # degrees
_ENHANCERS = {"b": ImageEnhance.Brightness, "c": ImageEnhance.Contrast, "s": ImageEnhance.Color}


def qgface_rescale(image: Image, *, height: int, width: int, down: str, up: str, quality: int) -> Image:
    """Shrink to ``height`` x ``width``, go through a JPEG there, and enlarge again.

    Args:
        image: [H, W, 3] uint8 RGB.
        height: Of the small image, in pixels.
        width: Of the small image, in pixels.
        down: Filter that shrinks, one of :data:`.resampling.PILLOW_FILTERS`.
        up: Filter that enlarges.
        quality: Of Pillow's JPEG, 1-100; chroma at half the resolution.
    """
    packed = io.BytesIO()
    small = resize(image, height, width, down)
    PILImage.fromarray(small).save(packed, format="JPEG", quality=quality, subsampling=2)
    return resize(np.array(PILImage.open(packed), dtype=np.uint8), image.shape[0], image.shape[1], up)


def adaface_rescale(image: Image, *, height: int, width: int, down: str, up: str) -> Image:
    """Shrink to ``height`` x ``width`` with one named filter and enlarge with another."""
    return resize(resize(image, height, width, down), image.shape[0], image.shape[1], up)


def qgface_crop(image: Image, *, top: int, left: int, height: int, width: int) -> Image:
    """Enlarge a box to the whole image with Pillow's bilinear filter: the face moves and grows."""
    box = image[top : top + height, left : left + width]
    return resize(np.ascontiguousarray(box), image.shape[0], image.shape[1], "pillow_bilinear")


def adaface_crop(image: Image, *, top: int, left: int, height: int, width: int) -> Image:
    """Keep a box where it is and blacken the rest: the face stays aligned."""
    kept = np.zeros_like(image)
    kept[top : top + height, left : left + width] = image[top : top + height, left : left + width]
    return kept


def photometric(image: Image, *, brightness: float, contrast: float, saturation: float, order: str) -> Image:
    """Scale brightness, contrast and saturation by the factors, in ``order``, a permutation of "bcs".

    Brightness moves values away from 0, contrast from the mean luma of the image, saturation from each pixel's luma,
    all with Pillow's arithmetic; a factor of 1 changes nothing.
    """
    factors = {"b": brightness, "c": contrast, "s": saturation}
    check_order(order)
    picture = PILImage.fromarray(image)
    for letter in order:
        picture = _ENHANCERS[letter](picture).enhance(factors[letter])
    return np.array(picture, dtype=np.uint8)


def check_order(order: str) -> None:
    """Refuse what is no permutation of "bcs".

    Raises:
        ValueError: It is none.
    """
    if sorted(order) != sorted(_ENHANCERS):
        raise ValueError(f"order {order!r} is no permutation of 'bcs'")


def rotation(image: Image, *, degrees: float) -> Image:
    """Turn counter-clockwise about the centre, nearest pixel, black where nothing is."""
    return np.array(PILImage.fromarray(image).rotate(degrees, PILImage.Resampling.NEAREST), dtype=np.uint8)


def draw_rescale(
    generator: np.random.Generator, share: float, height: int, width: int, filters: list[str]
) -> dict[str, Any]:
    """Numbers of a rescaling that leaves ``share`` in (0, 1] of each side, cut to whole pixels, and two filters."""
    down, up = (filters[int(place)] for place in generator.integers(len(filters), size=2))
    return {"height": max(1, int(share * height)), "width": max(1, int(share * width)), "down": down, "up": up}


def draw_box(
    generator: np.random.Generator, height: int, width: int, area: tuple[float, float], ratio: tuple[float, float]
) -> dict[str, Any]:
    """A random box as torchvision's RandomResizedCrop defines it.

    Up to ten times an area share, uniform, and a ratio of width to height, uniform in its logarithm, are drawn until
    such a box fits; its place is uniform. If none fits, the middle of the image at the nearest possible ratio is taken.

    Args:
        generator: Source of the draw.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        area: Smallest and largest share of the image's area.
        ratio: Smallest and largest ratio of width to height.

    Returns:
        ``top``, ``left``, ``height`` and ``width``, in pixels.
    """
    for _ in range(10):
        target = height * width * float(generator.uniform(*area))
        aspect = math.exp(float(generator.uniform(math.log(ratio[0]), math.log(ratio[1]))))
        wide, tall = round(math.sqrt(target * aspect)), round(math.sqrt(target / aspect))
        if 0 < wide <= width and 0 < tall <= height:
            top, left = int(generator.integers(height - tall + 1)), int(generator.integers(width - wide + 1))
            return {"top": top, "left": left, "height": tall, "width": wide}
    aspect = min(max(width / height, ratio[0]), ratio[1])
    wide, tall = min(width, round(height * aspect)), min(height, round(width / aspect))
    return {"top": (height - tall) // 2, "left": (width - wide) // 2, "height": tall, "width": wide}


def draw_photometric(generator: np.random.Generator, reach: float) -> dict[str, Any]:
    """Three factors, uniform within 1 +- ``reach``, and a random order."""
    brightness, contrast, saturation = (1.0 + reach * float(place) for place in generator.uniform(-1.0, 1.0, size=3))
    order = "".join(str(letter) for letter in generator.permutation(list("bcs")))
    return {"brightness": brightness, "contrast": contrast, "saturation": saturation, "order": order}


def _qgface_rescale(generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    drawn = draw_rescale(generator, QGFACE_SIDE[1] ** severity, height, width, list(PILLOW_FILTERS))
    return {**drawn, "quality": QGFACE_JPEG_QUALITY}


def free_qgface_rescale(
    generator: np.random.Generator,
    height: int,
    width: int,
    *,
    sides: tuple[float, float] = (QGFACE_SIDE[1], QGFACE_SIDE[0]),
    filters: Sequence[str] = tuple(PILLOW_FILTERS),
    quality: int = QGFACE_JPEG_QUALITY,
) -> tuple[float, dict[str, Any]]:
    """QGFace's own draw: the share of each side is uniform in ``sides``, [0.1, 0.5].

    Args:
        generator: Source of the draw.
        height: Of the image, in pixels.
        width: Of the image, in pixels.
        sides: Smallest and largest share.
        filters: To draw two of, by the names in :mod:`.resampling`.
        quality: Of the JPEG.

    Returns:
        Severity, 1 for a share of 0.1, and the numbers of ``qgface_rescale``.
    """
    share = float(generator.uniform(*sides))
    drawn = draw_rescale(generator, share, height, width, list(filters))
    return math.log(share) / math.log(QGFACE_SIDE[1]), {**drawn, "quality": quality}


def _adaface_rescale(generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    return draw_rescale(generator, ADAFACE_SIDE[1] ** severity, height, width, list(OPENCV_FILTERS))


def free_adaface_rescale(generator: np.random.Generator, height: int, width: int) -> tuple[float, dict[str, Any]]:
    """AdaFace's own draw: the share of each side is uniform in [0.2, 1]."""
    share = float(generator.uniform(ADAFACE_SIDE[1], ADAFACE_SIDE[0]))
    severity = math.log(share) / math.log(ADAFACE_SIDE[1])
    return severity, draw_rescale(generator, share, height, width, list(OPENCV_FILTERS))


def _crop(generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    down, along = (float(place) for place in generator.uniform(size=2))
    aspect = math.exp(float(generator.uniform(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1]))))
    # Shares of the image's height and width, their product the area; boxes of growing severity lie inside each other.
    area = 1.0 + severity * (CROP_AREA - 1.0)
    wide = min(1.0, max(area, math.sqrt(area * aspect)))
    tall = area / wide
    top, left = round(down * (1.0 - tall) * height), round(along * (1.0 - wide) * width)
    return {"top": top, "left": left, "height": max(1, round(tall * height)), "width": max(1, round(wide * width))}


def _photometric(generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return draw_photometric(generator, severity * PHOTOMETRIC_RANGE)


def _rotation(generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"degrees": severity * ROTATION * (1.0 if generator.uniform() < 0.5 else -1.0)}


for _name, _entry in {
    # The smallest sides keep one pixel at the strongest reduction.
    "qgface_rescale": Degradation(_qgface_rescale, qgface_rescale, free_qgface_rescale, smallest=10),
    "adaface_rescale": Degradation(_adaface_rescale, adaface_rescale, free_adaface_rescale, smallest=5),
    "qgface_crop": Degradation(_crop, qgface_crop),
    "adaface_crop": Degradation(_crop, adaface_crop),
    "photometric": Degradation(_photometric, photometric),
    "rotation": Degradation(_rotation, rotation),
}.items():
    DEGRADATIONS.add(_name, _entry)
