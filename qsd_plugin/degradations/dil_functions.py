"""The degradation functions of DIL, registered as ``dil_`` and the authors' name, with the authors' constants.

Source: Huang et al., "Real-World Person Re-Identification via Degradation Invariance Learning", CVPR 2020, and the
released program. Without a severity they are drawn as there. With a severity, 0 changes nothing and 1 is the strongest
that the authors draw; their own range then begins somewhere between.

Three things differ from the released program on purpose: sizes are rounded and not cut (``dil_res``), the JPEG quality
is a whole number, and JPEG sees the channels in their true order.
"""

from __future__ import annotations

import math
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage
from PIL import ImageFilter

from qsd_plugin.degradations.operations import DEGRADATIONS, Degradation, Image

# The ranges that are drawn from; the second end is the stronger one.
RATIO = (3.0, 5.0)  # reduction of each side
GAMMA, GAIN = (2.0, 3.5), (1.0, 0.75)
JPEG_QUALITY = (20, 10)
MOTION_LENGTH = (5, 14)  # pixels
BLUR_RADIUS = (3, 6)  # standard deviation in pixels of BLUR_SIZE
BLUR_SIZE = (256, 128)  # height and width at which the blur happens
NOISE_STD = 10.0  # grey levels
#: Full scale of torchvision's gamma correction, whose result is truncated: severity 0 keeps every level.
_FULL_SCALE = 255.999


def dil_res(image: Image, *, height: int, width: int) -> Image:
    """Shrink to ``height`` x ``width`` with Pillow's bilinear filter (antialiased). The result stays small."""
    return np.array(PILImage.fromarray(image).resize((width, height), PILImage.Resampling.BILINEAR), dtype=np.uint8)


def dil_ill(image: Image, *, gamma: float, gain: float) -> Image:
    """Map every value x to ``255 * gain * (x / 255) ** gamma``, truncated (see :func:`ill_levels`)."""
    return np.asarray(ill_levels(gamma, gain)[image], dtype=np.uint8)


def ill_levels(gamma: float, gain: float) -> npt.NDArray[np.uint8]:
    """What :func:`dil_ill` makes of each grey level, [256]."""
    values = _FULL_SCALE * gain * (np.arange(256) / 255.0) ** gamma
    return np.clip(values, 0.0, 255.0).astype(np.uint8)


def dil_jpg(image: Image, *, quality: int) -> Image:
    """OpenCV's JPEG round trip at ``quality`` 1-100, chroma at half the resolution."""
    _, packed = cv2.imencode(".jpg", image[:, :, ::-1], [cv2.IMWRITE_JPEG_QUALITY, quality])
    decoded = np.asarray(cv2.imdecode(packed, cv2.IMREAD_COLOR), dtype=np.uint8)
    return np.ascontiguousarray(decoded[:, :, ::-1])


def dil_motion(image: Image, *, length: int, angle: float) -> Image:
    """Average along a line of ``length`` pixels at 45 + ``angle`` degrees, then stretch to the image's own extremes.

    The darkest and the brightest value over all channels become those of ``image`` again. Length 1 changes nothing.
    """
    if length == 1:
        return image.copy()
    blurred = cv2.filter2D(image, -1, line_kernel(length, angle))
    stretched = cv2.normalize(blurred, None, int(image.min()), int(image.max()), cv2.NORM_MINMAX)
    return np.asarray(stretched, dtype=np.uint8)


def line_kernel(length: int, angle: float) -> npt.NDArray[np.float64]:
    """The weights of :func:`dil_motion`: a diagonal rotated by ``angle`` degrees about its end's middle, [L, L].

    Parts of the line leave the square, so that the sum is at most 1.
    """
    turn = cv2.getRotationMatrix2D((length / 2, length / 2), angle, 1.0)
    return np.asarray(cv2.warpAffine(np.eye(length), turn, (length, length)) / length, dtype=np.float64)


def dil_blur(image: Image, *, radius: float) -> Image:
    """Pillow's Gaussian blur of ``radius`` pixels at 256 x 128, bilinear there and back; 0 changes nothing."""
    if radius == 0.0:
        return image.copy()
    full, size = PILImage.fromarray(image), BLUR_SIZE[::-1]
    blurred = full.resize(size, PILImage.Resampling.BILINEAR).filter(ImageFilter.GaussianBlur(radius))
    return np.array(blurred.resize(full.size, PILImage.Resampling.BILINEAR), dtype=np.uint8)


def dil_noise(image: Image, *, std: float, seed: int) -> Image:
    """Add independent Gaussian noise of ``std`` grey levels to every value, clip, truncate; ``seed`` fixes it."""
    return add_noise(image, std * np.random.default_rng(seed).standard_normal(image.shape))


def add_noise(image: Image, values: npt.NDArray[np.float64]) -> Image:
    """``image + values``, clipped to 0-255 and truncated."""
    return np.clip(image + values, 0.0, 255.0).astype(np.uint8)


def dil_poisson(image: Image, *, strength: float, seed: int) -> Image:
    """Add to every value a Poisson number of that mean and rescale so that the maximum is 255; ``seed`` fixes it.

    Args:
        image: [H, W, 3] uint8.
        strength: Share of that in the result, in [0, 1]; the rest is the image itself. The authors have 1.
        seed: Of the Poisson numbers.
    """
    return add_counts(image, np.random.default_rng(seed).poisson(image), strength)


def add_counts(image: Image, counts: npt.NDArray[np.int64], strength: float = 1.0) -> Image:
    """``image + counts`` rescaled to a maximum of 255, mixed with the image by ``strength``, truncated."""
    total = image.astype(np.float64) + counts
    scaled = total * 255.0 / max(float(total.max()), 1.0)
    return np.clip(image + strength * (scaled - image), 0.0, 255.0).astype(np.uint8)


def dil_dark(image: Image, *, gamma: float, gain: float, strength: float, seed: int, poisson_first: bool) -> Image:
    """:func:`dil_ill` and :func:`dil_poisson` after each other, ``poisson_first`` or last."""
    if poisson_first:
        return dil_ill(dil_poisson(image, strength=strength, seed=seed), gamma=gamma, gain=gain)
    return dil_poisson(dil_ill(image, gamma=gamma, gain=gain), strength=strength, seed=seed)


def shrunk_size(height: int, width: int, ratio: float) -> dict[str, Any]:
    """The numbers of ``dil_res`` that reduce both sides by ``ratio`` >= 1, rounded, at least one pixel."""
    return {"height": max(1, round(height / ratio)), "width": max(1, round(width / ratio))}


def draw_res(
    generator: np.random.Generator, height: int, width: int, ratio: tuple[float, float] = RATIO
) -> tuple[float, dict[str, Any]]:
    """Severity and numbers of ``dil_res`` for a reduction drawn uniformly from ``ratio`` (the flag sync_ds_ratio)."""
    drawn = float(generator.uniform(*ratio))
    return min(1.0, math.log(drawn) / math.log(RATIO[1])), shrunk_size(height, width, drawn)


def _res(_generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    return shrunk_size(height, width, RATIO[1] ** severity)


def _ill(_generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"gamma": 1.0 + severity * (GAMMA[1] - 1.0), "gain": 1.0 + severity * (GAIN[1] - 1.0)}


def _free_ill(generator: np.random.Generator, _height: int, _width: int) -> tuple[float, dict[str, Any]]:
    gamma, gain = float(generator.uniform(*GAMMA)), float(generator.uniform(GAIN[1], GAIN[0]))
    severity = ((gamma - 1.0) / (GAMMA[1] - 1.0) + (gain - 1.0) / (GAIN[1] - 1.0)) / 2.0
    return severity, {"gamma": gamma, "gain": gain}


def _jpg(_generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"quality": round(100.0 * (JPEG_QUALITY[1] / 100.0) ** severity)}


def _free_jpg(generator: np.random.Generator, _height: int, _width: int) -> tuple[float, dict[str, Any]]:
    quality = int(generator.integers(JPEG_QUALITY[1], JPEG_QUALITY[0], endpoint=True))
    return math.log(quality / 100.0) / math.log(JPEG_QUALITY[1] / 100.0), {"quality": quality}


def _motion(generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"length": 1 + round(severity * (MOTION_LENGTH[1] - 1)), "angle": float(generator.uniform(0.0, 180.0))}


def _free_motion(generator: np.random.Generator, _height: int, _width: int) -> tuple[float, dict[str, Any]]:
    length = int(generator.integers(*MOTION_LENGTH, endpoint=True))
    severity = (length - 1) / (MOTION_LENGTH[1] - 1)
    return severity, {"length": length, "angle": float(generator.uniform(0.0, 180.0))}


def _blur(_generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"radius": severity * BLUR_RADIUS[1]}


def _free_blur(generator: np.random.Generator, _height: int, _width: int) -> tuple[float, dict[str, Any]]:
    radius = int(generator.integers(*BLUR_RADIUS, endpoint=True))
    return radius / BLUR_RADIUS[1], {"radius": radius}


def _noise(generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"std": severity * NOISE_STD, "seed": int(generator.integers(2**32))}


def _free_noise(generator: np.random.Generator, height: int, width: int) -> tuple[float, dict[str, Any]]:
    return 1.0, _noise(generator, 1.0, height, width)


def _poisson(generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"strength": severity, "seed": int(generator.integers(2**32))}


def _free_poisson(generator: np.random.Generator, height: int, width: int) -> tuple[float, dict[str, Any]]:
    return 1.0, _poisson(generator, 1.0, height, width)


def _dark(generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    numbers = {**_ill(generator, severity, height, width), **_poisson(generator, severity, height, width)}
    return {**numbers, "poisson_first": bool(generator.uniform() < 0.5)}


def _free_dark(generator: np.random.Generator, height: int, width: int) -> tuple[float, dict[str, Any]]:
    severity, numbers = _free_ill(generator, height, width)
    numbers |= _poisson(generator, 1.0, height, width)
    return severity, {**numbers, "poisson_first": bool(generator.uniform() < 0.5)}


for _name, _entry in {
    # The smallest sides keep a pixel of the image, and room for the line's mirrored border.
    "dil_res": Degradation(_res, dil_res, draw_res, smallest=int(RATIO[1]), resizes=True),
    "dil_ill": Degradation(_ill, dil_ill, _free_ill),
    "dil_jpg": Degradation(_jpg, dil_jpg, _free_jpg),
    "dil_motion": Degradation(_motion, dil_motion, _free_motion, smallest=MOTION_LENGTH[1] // 2 + 1),
    "dil_blur": Degradation(_blur, dil_blur, _free_blur),
    "dil_noise": Degradation(_noise, dil_noise, _free_noise),
    "dil_poisson": Degradation(_poisson, dil_poisson, _free_poisson),
    "dil_dark": Degradation(_dark, dil_dark, _free_dark),
}.items():
    DEGRADATIONS.add(_name, _entry)
