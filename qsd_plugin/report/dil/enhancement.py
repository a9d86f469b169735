"""How good an enhanced picture is: PSNR and SSIM against the true one, and two measures that need none.

Measures are scikit-image's. Without a reference there is no NIQE in a library that is kept and small (its model is
fitted on photographs and would say little about crops of 64 pixels), so these two stand in for it: the entropy of the
grey levels, which darkness lowers, and the blur of Crete et al. ("The blur effect", 2007).

A picture is an [h, w, 3] uint8 RGB array; N pictures.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tabulate import tabulate

from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.panels import Picture
from qsd_plugin.report.bootstrap import IdentityBootstrap, Interval

#: Measures against a reference: dB, and 1 for equal pictures.
WITH_REFERENCE = ("psnr", "ssim")
#: Measures of a picture alone: bits, and 0 (sharp) to 1.
WITHOUT = ("entropy", "blur")
_CLOSEST = 100.0  # dB, for equal pictures
_WINDOW = 11  # pixels: the smallest side that SSIM's window fits in

Values = NDArray[np.float64]


def compared(pictures: Sequence[Picture], references: Sequence[Picture]) -> Values:
    """PSNR in dB (at most 100) and SSIM of every picture with its reference, [N, 2].

    SSIM as Wang et al. (2004): a Gaussian window of 11 pixels and deviation 1.5, constants 0.01 and 0.03, mean over the
    channels.

    Raises:
        DataError: Sizes differ, or are below 11 pixels.
        ConfigError: scikit-image is not installed.
    """
    metrics = _scikit_image("metrics")
    values = np.empty((len(pictures), len(WITH_REFERENCE)))
    for place, (picture, reference) in enumerate(zip(pictures, references, strict=True)):
        if picture.shape != reference.shape or min(picture.shape[:2]) < _WINDOW:
            raise DataError(
                "Picture and reference: sizes",
                value=(picture.shape[:2], reference.shape[:2]),
                expected=f"equal, at least {_WINDOW} pixels",
            )
        equal = np.array_equal(picture, reference)
        psnr = _CLOSEST if equal else metrics.peak_signal_noise_ratio(reference, picture, data_range=255)
        ssim = metrics.structural_similarity(
            reference,
            picture,
            data_range=255,
            channel_axis=2,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        values[place] = min(psnr, _CLOSEST), ssim
    return values


def alone(pictures: Sequence[Picture]) -> Values:
    """Entropy of the grey levels in bits and blur from 0 to 1 of every picture, [N, 2].

    Raises:
        ConfigError: scikit-image is not installed.
    """
    measure, colour = _scikit_image("measure"), _scikit_image("color")
    values = np.empty((len(pictures), len(WITHOUT)))
    for place, picture in enumerate(pictures):
        grey = colour.rgb2gray(picture)
        flat = not np.ptp(grey)  # the blur of a flat picture is 0 / 0
        blur = 1.0 if flat else measure.blur_effect(grey)
        values[place] = measure.shannon_entropy(np.rint(255 * grey)), blur
    return values


def scaled_to(pictures: Sequence[Picture], brightness: float) -> list[Picture]:
    """What needs no network: every picture times a factor that gives it the mean level ``brightness``, clipped."""
    result = []
    for picture in pictures:
        factor = brightness / max(float(picture.mean()), 1.0)
        result.append(np.rint(np.clip(picture * factor, 0, 255)).astype(np.uint8))
    return result


def summary(
    before: Sequence[Picture],
    arms: Mapping[str, Sequence[Picture]],
    references: Sequence[Picture] | None,
    identities: Sequence[str],
    *,
    seed: int = 0,
) -> dict[str, dict[str, dict[str, Any]]]:
    """All measures of the pictures before and of every arm, with the difference to before.

    Args:
        before: N pictures, all of one size, at least 1.
        arms: By name, what was made of them, N each.
        references: The true pictures, where they are known.
        identities: Whom the pictures show; drawn together by the bootstrap.
        seed: Of the bootstrap.

    Returns:
        By arm (``"before"`` first) and measure: ``mean`` and, but for ``"before"``, ``gain``: an
        :class:`~qsd_plugin.report.bootstrap.Interval` of arm minus before.
    """
    bootstrap = IdentityBootstrap([np.asarray(identities)], seed=seed)

    def every(pictures: Sequence[Picture]) -> Values:
        own = alone(pictures)
        return own if references is None else np.hstack([compared(pictures, references), own])

    names = WITHOUT if references is None else (*WITH_REFERENCE, *WITHOUT)
    first = every(before)
    found: dict[str, dict[str, dict[str, Any]]] = {
        "before": {name: {"mean": float(mean)} for name, mean in zip(names, first.mean(axis=0), strict=True)}
    }
    for arm, pictures in arms.items():
        values = every(pictures)
        gains = bootstrap.intervals([values - first])
        means = values.mean(axis=0)
        found[arm] = {
            name: {"mean": float(mean), "gain": gain} for name, mean, gain in zip(names, means, gains, strict=True)
        }
    return found


def as_table(found: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Markdown table of :func:`summary`: means, and in brackets the 95 % interval of the difference to before."""
    names = list(found["before"])
    titles = {"psnr": "PSNR, dB", "ssim": "SSIM", "entropy": "entropy, bits", "blur": "blur, 0 to 1"}
    rows = [[arm, *(_cell(name, values[name]) for name in names)] for arm, values in found.items()]
    return tabulate(rows, headers=["pictures", *(titles[name] for name in names)], tablefmt="github")


def _cell(name: str, value: Mapping[str, Any]) -> str:
    digits = 3 if name in ("ssim", "blur") else 2
    text = f"{value['mean']:.{digits}f}"
    gain: Interval | None = value.get("gain")
    return text if gain is None else f"{text} ({gain.low:+.{digits}f} to {gain.high:+.{digits}f})"


def _scikit_image(name: str) -> ModuleType:
    import importlib

    try:
        return importlib.import_module(f"skimage.{name}")
    except ImportError as error:
        raise ConfigError(
            "Measures of enhanced pictures need a package that is not installed",
            value=error.name,
            expected="scikit-image",
            remedy="pip install scikit-image",
        ) from error
