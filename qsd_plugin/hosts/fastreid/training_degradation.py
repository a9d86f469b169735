"""``INPUT.DEGRADE`` in the train loader: an image goes through the project's degradations before the host's transforms.

A draw depends on (seed, rank, number of the draw) only, so images are the same for any number of workers, and
:func:`~qsd_plugin.degradations.mixing.replay_steps` makes them again.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image as PILImage

from qsd_plugin.core.distributed import rank
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations.dil_functions import draw_res
from qsd_plugin.degradations.mixing import Mix, parse_mix, replay_steps
from qsd_plugin.hosts.fastreid.compose import in_chain

logger = logging.getLogger("fastreid.qsd_plugin.data")

RESOLUTION = "dil_res"


@dataclass(frozen=True)
class Mixture:
    """A mix of degradations, with a range of its own for the factor of low resolution where that is all there is.

    Args:
        mix: What is applied.
        ratio: Range of the factor by which both sides shrink if low resolution is always applied, and alone.
    """

    mix: Mix
    ratio: tuple[float, float]

    def draw(self, generator: np.random.Generator, height: int, width: int) -> list[dict[str, Any]]:
        """The steps for an image of that size in pixels, as :meth:`.Mix.draw` gives them."""
        if self.mix.names == (RESOLUTION,) and self.mix.probability == 1:
            severity, numbers = draw_res(generator, height, width, self.ratio)
            return [{"name": RESOLUTION, "severity": severity, **numbers}]
        return self.mix.draw(generator, height, width)

    def apply(self, image: PILImage.Image, generator: np.random.Generator) -> PILImage.Image:
        """The degraded image, which may be smaller."""
        pixels = np.asarray(image)
        return PILImage.fromarray(replay_steps(pixels, self.draw(generator, *pixels.shape[:2])))


@dataclass(frozen=True)
class TrainingDegradation:
    """What becomes of a training image in front of the host's transforms.

    Args:
        mixture: Of degradations.
        probability: Of an image to be degraded.
        seed: Of all draws, >= 0.
        rank: Of this process.
    """

    mixture: Mixture
    probability: float
    seed: int
    rank: int

    def steps(self, size: Sequence[int], draw: int, prefix: str = "") -> list[dict[str, Any]]:
        """The degradations of a draw with their parameters; none: the image is left alone.

        Args:
            size: Height and width of the image in pixels.
            draw: Number of the sampler's draw.
            prefix: Of an image that is a partner.
        """
        stream = numpy_stream(self.seed, f"{prefix}training degradation", self.rank, draw)
        if stream.random() >= self.probability:
            return []
        return self.mixture.draw(stream, *size[:2])

    def __call__(self, image: PILImage.Image, draw: int, prefix: str = "") -> PILImage.Image:
        """The image of a draw, RGB; see :meth:`steps`."""
        steps = self.steps((image.height, image.width), draw, prefix)
        return PILImage.fromarray(replay_steps(np.asarray(image), steps)) if steps else image


def training_degradation(cfg: Any) -> TrainingDegradation | None:
    """What ``INPUT.DEGRADE`` asks for; ``None``: nothing.

    Raises:
        ConfigError, RegistryError: Settings that cannot work.
    """
    settings = cfg.INPUT.DEGRADE
    if not settings.ENABLED:
        return None
    if not 0 <= settings.PROB <= 1:
        raise ConfigError("INPUT.DEGRADE.PROB", value=settings.PROB, expected="a number in [0, 1]")
    low, high = map(float, settings.RATIO)
    if not 1 <= low <= high:
        raise ConfigError("INPUT.DEGRADE.RATIO", value=[low, high], expected="two ascending numbers >= 1")
    if cfg.QGFACE.VIEWS.MODE != "none":
        raise ConfigError(
            "INPUT.DEGRADE.ENABLED",
            value=True,
            expected=f"False with QGFACE.VIEWS.MODE {cfg.QGFACE.VIEWS.MODE}, whose views are degraded already",
            remedy="Use one of the two.",
        )
    if in_chain(cfg, "QSD") and cfg.QUALITY.SOURCE == "file":
        logger.warning("INPUT.DEGRADE changes images after they were labelled: their quality labels are too high.")
    mixture = Mixture(parse_mix(settings.MIX), (low, high))
    return TrainingDegradation(mixture, float(settings.PROB), max(cfg.SEED, 0), rank())


def refuse_foreign(cfg: Any) -> None:
    """Refuse ``INPUT.DEGRADE`` for a training set that a script brings, whose images are not read here.

    Raises:
        ConfigError: It is enabled.
    """
    if cfg.INPUT.DEGRADE.ENABLED:
        raise ConfigError(
            "INPUT.DEGRADE.ENABLED",
            value=True,
            expected="False where a training set is passed to build_reid_train_loader",
            remedy="Name the data set in DATASETS.NAMES, or degrade the images in the set itself.",
        )
