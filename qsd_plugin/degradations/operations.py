"""Drawing, applying and replaying degradations, and the toolkit's own seven with the numbers behind a severity.

For each degradation there is a function that draws its numbers and a pure function that applies them. Those of the
methods are registered by :mod:`.dil_functions` and :mod:`.face_functions`.

An image is an H x W x 3 uint8 RGB array (``numpy.asarray(pil_image.convert("RGB"))`` makes one of a PIL image).

Severity s in [0, 1] is 0 for no visible change and 1 for the most that still leaves a person guessable. Lengths scale
with the image's shorter side, so one severity looks alike at every image size. Everything else that is random (an
angle, a box's place, a noise seed) is drawn without looking at s: one generator state gives the same angle at every
severity, and the damage only grows with s.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image as PILImage

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.registry import Registry

Image = npt.NDArray[np.uint8]
#: (generator, severity, height, width) -> the keyword arguments of the operation, as plain numbers and words.
Draw = Callable[[np.random.Generator, float, int, int], dict[str, Any]]
#: (generator, height, width) -> a severity and the keyword arguments, as a method's paper draws them.
DrawFreely = Callable[[np.random.Generator, int, int], tuple[float, dict[str, Any]]]

# What severity 1 means.
BLUR_SIGMA = 0.055  # standard deviation, share of the shorter side
MOTION_LENGTH = 0.30  # share of the shorter side
LOW_RESOLUTION_FACTOR = 8.0  # reduction of each side
NOISE_STD = 55.0  # grey levels
DARKNESS_GAIN, DARKNESS_GAMMA = 0.25, 1.6
COMPRESSION_QUALITY = 4.0  # JPEG quality; severity 0 is 100
OCCLUSION_AREA = 0.4  # covered share of the image


@dataclass(frozen=True)
class Degradation:
    """A registered degradation: ``run(image, **draw(generator, severity, height, width))``.

    Args:
        draw: Draws the numbers for one severity.
        run: Applies them.
        draw_freely: Draws severity and numbers when no severity is asked for; default: severity is uniform in [0, 1].
        smallest: Shortest side that it works on, in pixels.
        resizes: The result has the ``height`` and ``width`` of the numbers and not those of the image.
    """

    draw: Draw
    run: Callable[..., Image]
    draw_freely: DrawFreely | None = None
    smallest: int = 1
    resizes: bool = False


DEGRADATIONS: Registry[Degradation] = Registry("degradation")


def names() -> list[str]:
    """Names of all degradations, sorted."""
    return DEGRADATIONS.names()


def apply(
    name: str, image: Image, generator: np.random.Generator, severity: float | None = None
) -> tuple[Image, dict[str, Any]]:
    """Degrade one image.

    Args:
        name: One of :func:`names`.
        image: [H, W, 3] uint8 RGB; left as it is.
        generator: Source of every random choice.
        severity: In [0, 1]. When ``None``, a method's degradation is drawn as its paper draws it, and the toolkit's own
            with a uniform severity.

    Returns:
        The degraded image, uint8, and the parameters of the draw: ``name``, ``severity`` and the operation's own
        numbers. They survive JSON, and :func:`replay` makes the same image of them again. The image is [H, W, 3] but
        for ``dil_res``, which leaves it small.

    Raises:
        RegistryError: Unknown name.
        DataError: Not an image, or too small a one.
        ConfigError: Severity outside [0, 1].
    """
    degradation = DEGRADATIONS.get(name)
    check_image(image)
    params = draw(name, generator, image.shape[0], image.shape[1], severity)
    return degradation.run(image, **_numbers(params)), params


def draw(
    name: str, generator: np.random.Generator, height: int, width: int, severity: float | None = None
) -> dict[str, Any]:
    """What :func:`apply` draws for an image of ``height`` x ``width`` pixels, without an image.

    Raises:
        RegistryError, DataError, ConfigError: As :func:`apply`.
    """
    degradation = DEGRADATIONS.get(name)
    check_size(name, height, width)
    if severity is None and degradation.draw_freely is not None:
        severity, drawn = degradation.draw_freely(generator, height, width)
        return {"name": name, "severity": severity, **drawn}
    severity = float(generator.uniform() if severity is None else severity)
    if not 0.0 <= severity <= 1.0:
        raise ConfigError(
            f"Severity of degradation {name!r}",
            value=severity,
            expected="a number in [0, 1]",
            remedy="0 leaves the image alone and 1 is the strongest; pass None to draw it.",
        )
    return {"name": name, "severity": severity, **degradation.draw(generator, severity, height, width)}


def replay(image: Image, params: Mapping[str, Any]) -> Image:
    """Degrade ``image`` as a former :func:`apply` did; bit-equal for the same image.

    Args:
        image: [H, W, 3] uint8 RGB; left as it is.
        params: What :func:`apply` returned, also after a trip through JSON.

    Raises:
        RegistryError: Unknown name.
        DataError: Not an image, or not such parameters.
    """
    check_image(image)
    degradation = registered(params)
    check_size(params["name"], image.shape[0], image.shape[1])
    try:
        return degradation.run(image, **_numbers(params))
    except (TypeError, ValueError) as error:  # a number is missing, misspelt, impossible or no number
        raise parameters_error(params) from error


def registered(params: Mapping[str, Any]) -> Degradation:
    """The degradation that ``params`` were drawn for.

    Raises:
        RegistryError: Unknown name.
        DataError: Not such parameters.
    """
    name = params.get("name") if isinstance(params, Mapping) else None
    if not isinstance(name, str):
        raise parameters_error(params)
    return DEGRADATIONS.get(name)


def blur(image: Image, *, sigma: float) -> Image:
    """Gaussian blur with standard deviation ``sigma`` in pixels; 0 changes nothing."""
    if sigma == 0.0:
        return image.copy()
    size = blur_size(sigma)
    return np.asarray(cv2.GaussianBlur(image, (size, size), sigma, borderType=cv2.BORDER_REPLICATE), dtype=np.uint8)


def blur_size(sigma: float) -> int:
    """Side of the window of :func:`blur`: 8 sigma + 1, so that the cut-off is below one grey level."""
    return 2 * math.ceil(4.0 * sigma) + 1


def motion_blur(image: Image, *, length: float, angle: float) -> Image:
    """Average over a straight movement of ``length`` pixels at ``angle`` radians; length 0 changes nothing."""
    if length == 0.0:
        return image.copy()
    kernel, reach = motion_kernel(length, angle)
    return np.asarray(
        cv2.filter2D(image, -1, kernel, anchor=(reach, reach), borderType=cv2.BORDER_REPLICATE), dtype=np.uint8
    )


def motion_kernel(length: float, angle: float) -> tuple[npt.NDArray[np.float64], int]:
    """The weights of :func:`motion_blur` (their sum is 1) and the row and column of the pixel that they belong to."""
    count, reach = 8 * math.ceil(length), math.ceil(length / 2.0)
    steps = ((np.arange(count) + 0.5) / count - 0.5) * length
    kernel = np.zeros((2 * reach + 2, 2 * reach + 2), dtype=np.float64)
    rows, columns = reach + steps * math.sin(angle), reach + steps * math.cos(angle)
    top, left = np.floor(rows).astype(int), np.floor(columns).astype(int)
    below, right = rows - top, columns - left
    for down, along, weight in (
        (0, 0, (1 - below) * (1 - right)),
        (0, 1, (1 - below) * right),
        (1, 0, below * (1 - right)),
        (1, 1, below * right),
    ):
        np.add.at(kernel, (top + down, left + along), weight / count)
    return kernel, reach


def low_resolution(image: Image, *, height: int, width: int) -> Image:
    """Shrink to ``height`` x ``width`` and enlarge again, both with Pillow's bicubic filter (antialiased downwards)."""
    full = PILImage.fromarray(image)
    small = full.resize((width, height), PILImage.Resampling.BICUBIC)
    return np.array(small.resize(full.size, PILImage.Resampling.BICUBIC), dtype=np.uint8)


def noise(image: Image, *, std: float, seed: int) -> Image:
    """Add independent Gaussian noise of ``std`` grey levels to every value; ``seed`` fixes it."""
    drawn = np.random.default_rng(seed).standard_normal(image.shape, dtype=np.float32)
    return to_uint8(image + np.float32(std) * drawn)


def darkness(image: Image, *, gain: float, gamma: float) -> Image:
    """Map every value x to ``255 * gain * (x / 255) ** gamma``."""
    return np.asarray(dark_levels(gain, gamma)[image], dtype=np.uint8)


def dark_levels(gain: float, gamma: float) -> npt.NDArray[np.uint8]:
    """What :func:`darkness` makes of each grey level, [256]."""
    return to_uint8(255.0 * gain * (np.arange(256) / 255.0) ** gamma)


def compression(image: Image, *, quality: int) -> Image:
    """A JPEG round trip at ``quality`` 1-100; no chroma subsampling, which would cost colour even at quality 100."""
    packed = io.BytesIO()
    PILImage.fromarray(image).save(packed, format="JPEG", quality=quality, subsampling=0)
    return np.array(PILImage.open(packed), dtype=np.uint8)


def occlusion(image: Image, *, top: int, bottom: int, left: int, right: int, red: int, green: int, blue: int) -> Image:
    """Cover rows ``top`` to ``bottom`` and columns ``left`` to ``right``, ends excluded, with one colour."""
    covered = image.copy()
    covered[top:bottom, left:right] = (red, green, blue)
    return covered


def _draw_blur(_generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    return {"sigma": severity * BLUR_SIGMA * min(height, width)}


def _draw_motion_blur(generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    return {"length": severity * MOTION_LENGTH * min(height, width), "angle": float(generator.uniform(0.0, math.pi))}


def _draw_low_resolution(_generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    factor = LOW_RESOLUTION_FACTOR**severity
    return {"height": max(1, round(height / factor)), "width": max(1, round(width / factor))}


def _draw_noise(generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"std": severity * NOISE_STD, "seed": int(generator.integers(2**32))}


def _draw_darkness(_generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    return {"gain": 1.0 + severity * (DARKNESS_GAIN - 1.0), "gamma": 1.0 + severity * (DARKNESS_GAMMA - 1.0)}


def _draw_compression(_generator: np.random.Generator, severity: float, _height: int, _width: int) -> dict[str, Any]:
    # Geometric: equal steps of severity are about equal steps of visible damage, which quality itself is not.
    return {"quality": round(100.0 * (COMPRESSION_QUALITY / 100.0) ** severity)}


def _draw_occlusion(generator: np.random.Generator, severity: float, height: int, width: int) -> dict[str, Any]:
    aspect, down, along = generator.uniform([-0.7, 0.0, 0.0], [0.7, 1.0, 1.0])
    # Street furniture, cars and other people: any brightness, little colour.
    red, green, blue = (int(level) for level in generator.integers(35, 190) + generator.integers(-25, 26, size=3))
    # Shares of the image's height and width, their product the covered area.
    area = severity * OCCLUSION_AREA
    tall = min(1.0, max(area, math.sqrt(area) * math.exp(aspect)))
    wide = area / tall if tall else 0.0
    # The place scales with the free room: boxes of growing severity lie inside each other.
    return {
        "top": round(down * (1.0 - tall) * height),
        "bottom": round((down * (1.0 - tall) + tall) * height),
        "left": round(along * (1.0 - wide) * width),
        "right": round((along * (1.0 - wide) + wide) * width),
        "red": red,
        "green": green,
        "blue": blue,
    }


def to_uint8(values: npt.NDArray[np.floating[Any]]) -> npt.NDArray[np.uint8]:
    """Clip to 0-255 and round."""
    return np.asarray(np.rint(np.clip(values, 0.0, 255.0)), dtype=np.uint8)


def parameters_error(params: object) -> DataError:
    """What to raise for parameters that cannot be replayed."""
    return DataError(
        "Parameters of a degradation",
        value=dict(params) if isinstance(params, Mapping) else params,
        expected="the dictionary that apply() returned",
        remedy="Pass it on whole and unchanged.",
    )


def check_image(image: object) -> None:
    """Refuse what is not [H, W, 3] uint8.

    Raises:
        DataError: It is something else.
    """
    found: object = type(image).__name__
    if isinstance(image, np.ndarray):
        if image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] == 3 and image.size:
            return
        found = f"{image.dtype} array of shape {image.shape}"
    raise DataError(
        "Image to degrade",
        value=found,
        expected="a uint8 array of shape (height, width, 3), RGB",
        remedy="Use numpy.asarray(pil_image.convert('RGB')); float images: scale to 0-255, round, convert to uint8.",
    )


def check_size(name: str, height: int, width: int) -> None:
    """Refuse an image of a size that the degradation ``name`` does not work on.

    Raises:
        RegistryError: Unknown name.
        DataError: Too small.
    """
    smallest = DEGRADATIONS.get(name).smallest
    if min(height, width) < smallest:
        raise DataError(
            f"Size of an image to degrade by {name!r}",
            value=f"{height} x {width} pixels",
            expected=f"at least {smallest} pixels on the shorter side",
            remedy="Enlarge the image first, or leave it out.",
        )


def _numbers(params: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in params.items() if key not in ("name", "severity")}


for _name, _draw, _run in (
    ("blur", _draw_blur, blur),
    ("motion_blur", _draw_motion_blur, motion_blur),
    ("low_resolution", _draw_low_resolution, low_resolution),
    ("noise", _draw_noise, noise),
    ("darkness", _draw_darkness, darkness),
    ("compression", _draw_compression, compression),
    ("occlusion", _draw_occlusion, occlusion),
):
    DEGRADATIONS.add(_name, Degradation(_draw, _run))
