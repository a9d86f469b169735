"""Named levels of degradation for tests: ``lowres-0.15``, ``px-16``, ``blur-0.5``; the same for an image every time.

A level is a name and a number. Of the names, two set the side of the image, all others are those of
:func:`qsd_plugin.degradations.operations.names` at a severity from 0 to 1.

- ``lowres-S``: QGFace's degraded view at a fixed share S of each side (the paper draws S in [0.1, 0.5]): shrunk,
  through a JPEG of quality 75 at the small size, enlarged; both filters are drawn per image from the paper's five.
- ``px-N``: both sides N pixels and back, bilinear and antialiased: cross-resolution LFW at 8, 12, 16 and 20 pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations import face_functions
from qsd_plugin.degradations.operations import DEGRADATIONS, Image, apply, check_image, check_size, names, replay
from qsd_plugin.degradations.resampling import PILLOW_FILTERS

LOWRES, PIXELS = "lowres", "px"

#: Shares of each side from mild to the strongest that QGFace trains on: 56, 28, 16 and 11 of 112 pixels.
LOWRES_LEVELS = ("lowres-0.5", "lowres-0.25", "lowres-0.15", "lowres-0.1")
#: Cross-resolution LFW.
CROSS_RESOLUTION_LEVELS = ("px-8", "px-12", "px-16", "px-20")


@dataclass(frozen=True)
class Level:
    """One level of one degradation.

    Args:
        name: ``lowres``, ``px``, or a registered degradation.
        amount: Share of each side in (0, 1]; pixels, a whole number >= 1; or severity in [0, 1].
        text: As it was written; results carry this name.
    """

    name: str
    amount: float
    text: str

    def apply(self, image: Image, *, seed: int, index: int) -> tuple[Image, dict[str, Any]]:
        """The degraded image, [H, W, 3] uint8, and the parameters with which ``operations.replay`` makes it again.

        What is random depends on ``seed``, the degradation's name and ``index`` alone, and not on the amount: levels of
        one degradation differ in nothing else.

        Args:
            image: [H, W, 3] uint8 RGB; left as it is.
            seed: Of the evaluation, >= 0.
            index: Number of the image in its test set, >= 0.

        Raises:
            DataError: Not an image, or one too small for the degradation.
        """
        generator = numpy_stream(seed, "degradation level", self.name, index)
        if self.name not in (LOWRES, PIXELS):
            return apply(self.name, image, generator, self.amount)
        check_image(image)
        height, width = image.shape[:2]
        if self.name == LOWRES:
            check_size("qgface_rescale", height, width)
            drawn = face_functions.draw_rescale(generator, self.amount, height, width, list(PILLOW_FILTERS))
            quality = face_functions.QGFACE_JPEG_QUALITY
            params = {"name": "qgface_rescale", **drawn, "quality": quality}
        else:
            side = int(self.amount)
            filters = {"down": "pillow_bilinear", "up": "pillow_bilinear"}
            params = {"name": "adaface_rescale", "height": side, "width": side, **filters}
        return replay(image, params), params


def parse_levels(texts: Sequence[str]) -> tuple[Level, ...]:
    """Levels by their names, such as those of :data:`LOWRES_LEVELS`.

    Raises:
        ConfigError: None, one twice, an unknown degradation, one that changes the image's size, or an amount out of its
            range.
    """
    if not texts or len(set(texts)) < len(texts):
        raise ConfigError(
            "Levels of degradation",
            value=list(texts),
            expected="one or more, each once",
            remedy=f"Such as {', '.join(LOWRES_LEVELS)}.",
        )
    return tuple(map(_parsed, texts))


def _parsed(text: str) -> Level:
    name, dash, number = str(text).rpartition("-")
    known = [LOWRES, PIXELS, *(each for each in names() if not DEGRADATIONS.get(each).resizes)]
    try:
        amount = float(number)
    except ValueError:
        dash = ""
    if not dash:
        raise ConfigError("Level of degradation", value=text, expected="a degradation, '-' and a number: lowres-0.15")
    if name not in known:
        raise ConfigError("Degradation of a level", value=text, remedy=did_you_mean(name, known))
    if name == LOWRES and not 0 < amount <= 1:
        raise ConfigError("Level of degradation", value=text, expected="a share of the image's side above 0, up to 1")
    if name == PIXELS and not (amount >= 1 and amount.is_integer()):
        raise ConfigError("Level of degradation", value=text, expected="a whole number of pixels")
    if not 0 <= amount <= 1 and name != PIXELS:
        raise ConfigError("Level of degradation", value=text, expected="a severity from 0 to 1")
    return Level(name, amount, str(text))
