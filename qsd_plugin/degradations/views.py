"""The training views of QGFace and AdaFace, as functions of an image and a generator, replayable.

Source: Song and Wang, arXiv 2312.17494, and the released programs of QGFace and AdaFace. Images are [H, W, 3] uint8 RGB
on both sides; making tensors of them is the loader's work. The papers' are aligned faces of 112 x 112; other sizes keep
the same proportions.

Every draw of a view takes all its random numbers in a fixed order, used or not: a changed probability changes which
steps happen, and no number of the others.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from qsd_plugin.core.errors import ConfigError, DataError, did_you_mean
from qsd_plugin.degradations.face_functions import (
    ADAFACE_SIDE,
    QGFACE_JPEG_QUALITY,
    QGFACE_SIDE,
    ROTATION,
    draw_box,
    draw_photometric,
    draw_rescale,
    free_adaface_rescale,
    free_qgface_rescale,
)
from qsd_plugin.degradations.mixing import replay_steps
from qsd_plugin.degradations.operations import Image, check_image, check_size
from qsd_plugin.degradations.resampling import OPENCV_FILTERS, PILLOW_FILTERS

FLIP_PROBABILITY = 0.5
CROP_PROBABILITY = PHOTOMETRIC_PROBABILITY = 0.2
#: Off in the only public account of the paper's settings.
ROTATION_PROBABILITY = 0.0
ADAFACE_PROBABILITY = 0.2  # of each of its three steps
QGFACE_CROP_AREA, QGFACE_CROP_RATIO = (0.8, 1.0), (0.75, 1.33)
ADAFACE_CROP_AREA = (0.2, 1.0)
QGFACE_JITTER, ADAFACE_JITTER = 0.2, 0.5
#: Which channels JPEG and luma see as red, green, blue. The released QGFace works on ``bgr``.
COLOUR_ORDERS = ("rgb", "bgr")
#: ``adaface``: the box stays in place, OpenCV filters, ratio to 4/3. ``qgface``: QGFace's variant of it, where the box
#: is enlarged, with Pillow filters and a ratio to 1.33.
ADAFACE_VARIANTS = ("adaface", "qgface")


def clean_view(
    image: Image, generator: np.random.Generator, *, flip_probability: float = FLIP_PROBABILITY
) -> tuple[Image, dict[str, Any]]:
    """The clean view H of QGFace: mirrored with probability 1/2, otherwise as it is.

    Args:
        image: [H, W, 3] uint8 RGB; left as it is.
        generator: Source of every random choice.
        flip_probability: Of mirroring.

    Returns:
        The view, [H, W, 3] uint8, and its parameters for :func:`replay_view`.

    Raises:
        DataError: Not an image.
        ConfigError: A probability outside [0, 1].
    """
    check_image(image)
    _check_probability("flip_probability", flip_probability)
    params = _view([], generator.uniform() < flip_probability, "rgb")
    return replay_view(image, params), params


def degraded_view(
    image: Image,
    generator: np.random.Generator,
    *,
    crop_probability: float = CROP_PROBABILITY,
    photometric_probability: float = PHOTOMETRIC_PROBABILITY,
    rotation_probability: float = ROTATION_PROBABILITY,
    flip_probability: float = FLIP_PROBABILITY,
    sides: tuple[float, float] = (QGFACE_SIDE[1], QGFACE_SIDE[0]),
    filters: Sequence[str] = tuple(PILLOW_FILTERS),
    jpeg_quality: int = QGFACE_JPEG_QUALITY,
    colour_order: str = "rgb",
) -> tuple[Image, dict[str, Any]]:
    """The degraded view L of QGFace.

    Always ``qgface_rescale``, to a share uniform in [0.1, 0.5] of each side with two Pillow filters and JPEG 75 at the
    small size; then with their probabilities ``qgface_crop`` (area 0.8 to 1, ratio 0.75 to 1.33), ``photometric``
    (factors in [0.8, 1.2], random order) and ``rotation`` (up to 45 degrees); mirrored with probability 1/2.

    Args:
        image: [H, W, 3] uint8 RGB, at least 10 pixels on the shorter side; left as it is.
        generator: Source of every random choice.
        crop_probability: Unknown for the paper; 0.2 in a third party's account, as is the next.
        photometric_probability: See there.
        rotation_probability: 0 in the same account.
        flip_probability: Of mirroring.
        sides: Smallest and largest share of each side that the rescaling leaves, in (0, 1].
        filters: That it draws two of: names in :mod:`.resampling`.
        jpeg_quality: Of the JPEG at the small size, 1 to 100; 0: no JPEG.
        colour_order: ``"bgr"`` does it all on swapped channels, as the released program does; the result is RGB again.

    Returns:
        The view, [H, W, 3] uint8, and its parameters for :func:`replay_view`.

    Raises:
        DataError: Not an image, or too small a one.
        ConfigError: An option is out of range, or an unknown filter or order.
    """
    check_image(image)
    height, width = _checked_size(image, "qgface_rescale")
    chances = (crop_probability, photometric_probability, rotation_probability, flip_probability)
    for name, chance in zip(("crop", "photometric", "rotation", "flip"), chances, strict=True):
        _check_probability(f"{name}_probability", chance)
    check_rescaling(sides, filters, jpeg_quality)
    happens = generator.uniform(size=4) < chances
    severity, rescale = free_qgface_rescale(
        generator, height, width, sides=sides, filters=filters, quality=jpeg_quality
    )
    name = "qgface_rescale" if jpeg_quality else "adaface_rescale"  # which is the same without the JPEG
    if not jpeg_quality:
        del rescale["quality"]
    optional = (
        {"name": "qgface_crop", **draw_box(generator, height, width, QGFACE_CROP_AREA, QGFACE_CROP_RATIO)},
        {"name": "photometric", **draw_photometric(generator, QGFACE_JITTER)},
        {"name": "rotation", "degrees": float(generator.uniform(-ROTATION, ROTATION))},
    )
    steps = [{"name": name, "severity": severity, **rescale}]
    steps += [step for step, wanted in zip(optional, happens[:3], strict=True) if wanted]
    params = _view(steps, happens[3], colour_order)
    return replay_view(image, params), params


def adaface_view(
    image: Image,
    generator: np.random.Generator,
    *,
    variant: str = "adaface",
    probability: float = ADAFACE_PROBABILITY,
    flip_probability: float = FLIP_PROBABILITY,
    colour_order: str = "rgb",
) -> tuple[Image, dict[str, Any]]:
    """AdaFace's augmentation, or what QGFace's program has under that name.

    Each with ``probability``, in this order: a random crop (area 0.2 to 1), rescaling to a share uniform in [0.2, 1] of
    each side and back without JPEG, and photometric factors in [0.5, 1.5]; mirrored with probability 1/2.

    Args:
        image: [H, W, 3] uint8 RGB, at least 5 pixels on the shorter side; left as it is.
        generator: Source of every random choice.
        variant: One of :data:`ADAFACE_VARIANTS`.
        probability: Of each of the three.
        flip_probability: Of mirroring.
        colour_order: As in :func:`degraded_view`.

    Returns:
        The view, [H, W, 3] uint8, and its parameters for :func:`replay_view`.

    Raises:
        DataError: Not an image, or too small a one.
        ConfigError: Unknown variant or order, or a probability outside [0, 1].
    """
    check_image(image)
    height, width = _checked_size(image, "adaface_rescale")
    _check_choice("variant of the AdaFace view", variant, ADAFACE_VARIANTS)
    _check_probability("probability", probability)
    _check_probability("flip_probability", flip_probability)
    own = variant == "adaface"
    happens = generator.uniform(size=4) < (probability, probability, probability, flip_probability)
    ratio = (0.75, 4.0 / 3.0) if own else QGFACE_CROP_RATIO
    crop = {"name": f"{variant}_crop", **draw_box(generator, height, width, ADAFACE_CROP_AREA, ratio)}
    if own:
        severity, rescale = free_adaface_rescale(generator, height, width)
    else:
        severity, rescale = _pillow_rescale(generator, height, width)
    steps: tuple[dict[str, Any], ...] = (
        crop,
        {"name": "adaface_rescale", "severity": severity, **rescale},
        {"name": "photometric", **draw_photometric(generator, ADAFACE_JITTER)},
    )
    chosen = [step for step, wanted in zip(steps, happens[:3], strict=True) if wanted]
    params = _view(chosen, happens[3], colour_order)
    return replay_view(image, params), params


def view_pair(
    image: Image, generator: np.random.Generator, *, aligned: bool = True, **options: Any
) -> tuple[Image, Image, dict[str, Any]]:
    """The pair that QGFace trains on: a degraded view of an image and its clean view.

    Args:
        image: [H, W, 3] uint8 RGB; left as it is.
        generator: Source of every random choice.
        aligned: False makes both views degraded ones, independent of each other (the program's ``LH_align``).
        options: Of :func:`degraded_view`.

    Returns:
        The degraded view, the clean (or second degraded) view and the parameters of both, for :func:`replay_pair`.

    Raises:
        DataError, ConfigError: As :func:`degraded_view`.
    """
    degraded, first = degraded_view(image, generator, **options)
    flip = {"flip_probability": options.get("flip_probability", FLIP_PROBABILITY)}
    other, second = clean_view(image, generator, **flip) if aligned else degraded_view(image, generator, **options)
    return degraded, other, {"degraded": first, "clean" if aligned else "second": second}


def replay_view(image: Image, params: Mapping[str, Any]) -> Image:
    """The view that a former call made of ``image``; bit-equal, also after a trip of ``params`` through JSON.

    Raises:
        RegistryError: Unknown degradation.
        DataError: Not an image, or not such parameters.
    """
    check_image(image)
    check_view(params)
    order = -1 if params["colour_order"] == "bgr" else 1
    result = replay_steps(np.ascontiguousarray(image[:, :, ::order]), params["steps"])[:, :, ::order]
    return np.ascontiguousarray(result[:, ::-1] if params["mirrored"] else result)


def replay_pair(image: Image, params: Mapping[str, Any]) -> tuple[Image, Image]:
    """Both views that :func:`view_pair` made of ``image``; bit-equal.

    Raises:
        RegistryError, DataError: As :func:`replay_view`.
    """
    if not isinstance(params, Mapping) or len(params) != 2 or "degraded" not in params:
        raise _view_error(params)
    first, second = params["degraded"], params.get("clean", params.get("second"))
    return replay_view(image, first), replay_view(image, second)


def check_rescaling(sides: Sequence[float], filters: Sequence[str], jpeg_quality: int) -> None:
    """Refuse settings of a rescaling that :func:`degraded_view` cannot draw from.

    Raises:
        ConfigError: Names the setting.
    """
    if len(sides) != 2 or not 0 < sides[0] <= sides[1] <= 1:
        raise ConfigError(
            "Shares of a side that a degraded view keeps",
            value=list(sides),
            expected="[smallest, largest], above 0 and at most 1",
        )
    known = [*PILLOW_FILTERS, *OPENCV_FILTERS]
    unknown = [name for name in filters if name not in known]
    if unknown or not filters:
        raise ConfigError(
            "Filters of a degraded view",
            value=unknown[0] if unknown else list(filters),
            expected="at least one known name",
            remedy=did_you_mean(str(unknown[0]), known) if unknown else "",
        )
    if not 0 <= jpeg_quality <= 100:
        raise ConfigError("JPEG quality of a degraded view", value=jpeg_quality, expected="1 to 100, or 0 for no JPEG")


def check_view(params: object) -> None:
    """Refuse what are no parameters of a view.

    Raises:
        DataError: They are none.
    """
    if not isinstance(params, Mapping) or set(params) != {"steps", "mirrored", "colour_order"}:
        raise _view_error(params)
    if params["colour_order"] not in COLOUR_ORDERS:
        raise _view_error(params)


def _view(steps: list[dict[str, Any]], mirrored: bool | np.bool_, colour_order: str) -> dict[str, Any]:
    _check_choice("colour order", colour_order, COLOUR_ORDERS)
    return {"steps": steps, "mirrored": bool(mirrored), "colour_order": colour_order}


def _pillow_rescale(generator: np.random.Generator, height: int, width: int) -> tuple[float, dict[str, Any]]:
    share = float(generator.uniform(ADAFACE_SIDE[1], ADAFACE_SIDE[0]))
    severity = float(np.log(share) / np.log(ADAFACE_SIDE[1]))
    return severity, draw_rescale(generator, share, height, width, list(PILLOW_FILTERS))


def _checked_size(image: Image, name: str) -> tuple[int, int]:
    height, width = image.shape[:2]
    check_size(name, height, width)
    return height, width


def _check_probability(name: str, value: float) -> None:
    if not 0.0 <= value <= 1.0:
        raise ConfigError(
            f"Option {name} of a view", value=value, expected="a number in [0, 1]", remedy="0 switches the step off."
        )


def _check_choice(what: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ConfigError(f"Unknown {what}", value=value, remedy=did_you_mean(str(value), choices))


def _view_error(params: object) -> DataError:
    return DataError(
        "Parameters of a view",
        value=dict(params) if isinstance(params, Mapping) else params,
        expected="the dictionary that came with the view",
        remedy="Pass it on whole and unchanged.",
    )
