"""``QGFACE.VIEWS`` in the train loader: an image becomes a degraded view and, with ``MODE pair``, a clean one.

A draw depends on (seed, rank, number of the draw) only, so views are the same for any number of workers and in a
resumed training. Works for images of any size and shape.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from PIL import Image as PILImage
from torchvision.transforms import InterpolationMode
from torchvision.transforms.functional import resize

from qsd_plugin.core.distributed import rank
from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.degradations.views import (
    COLOUR_ORDERS,
    adaface_view,
    check_rescaling,
    clean_view,
    degraded_view,
)
from qsd_plugin.hosts.fastreid.compose import in_chain

MODES = ("none", "pair", "single")
#: Augmentation of the degraded view, and for AdaFace's the variant of :func:`~.views.adaface_view`.
DEGRADED = {"qgface": "", "adaface": "adaface", "adaface_qgface": "qgface"}
#: Put in front of the batch keys of the degraded view, as in ``degraded_images``.
PREFIX = "degraded_"

#: From an image [H, W, 3] uint8 RGB and a generator to the view and its parameters.
View = Callable[[Any, np.random.Generator], tuple[Any, dict[str, Any]]]


@dataclass(frozen=True)
class TrainingViews:
    """The views of one training image.

    Args:
        seed: Of all draws, >= 0.
        rank: Of this process.
        size: Height and width in pixels that images are brought to first, as the host does; ``None``: as they are.
        degraded: Makes the degraded view.
        other: Makes the view that goes with it; ``None``: there is none.
    """

    seed: int
    rank: int
    size: tuple[int, int] | None
    degraded: View
    other: View | None

    def of(self, image: PILImage.Image, draw: int, prefix: str = "") -> dict[str, PILImage.Image]:
        """The views by the prefix of their batch keys: the only one or the clean one under ``prefix`` itself.

        Args:
            image: RGB.
            draw: Number of the sampler's draw.
            prefix: Of an image that is a partner.
        """
        if self.size is not None:
            image = resize(image, list(self.size), InterpolationMode.BICUBIC)
        pixels = np.asarray(image)

        def made(view: View, purpose: str) -> PILImage.Image:
            stream = numpy_stream(self.seed, f"{prefix}{purpose} view", self.rank, draw)
            return PILImage.fromarray(view(pixels, stream)[0])

        if self.other is None:
            return {prefix: made(self.degraded, "degraded")}
        return {prefix: made(self.other, "other"), f"{prefix}{PREFIX}": made(self.degraded, "degraded")}


def wants_views(cfg: Any) -> bool:
    """Whether the loader makes the views of ``QGFACE.VIEWS``."""
    return bool(cfg.QGFACE.VIEWS.MODE != "none")


def training_views(cfg: Any) -> TrainingViews | None:
    """What ``QGFACE.VIEWS`` asks for, ``None`` for the host's transforms alone.

    Raises:
        ConfigError: Settings that cannot work.
    """
    check_config(cfg)
    if not wants_views(cfg):
        return None
    views = cfg.QGFACE.VIEWS
    flip = float(cfg.INPUT.FLIP.PROB) if cfg.INPUT.FLIP.ENABLED else 0.0
    degraded = _degraded(views, flip)
    other = None
    if views.MODE == "pair":
        other = partial(clean_view, flip_probability=flip) if views.ALIGNED else degraded
    size = tuple(cfg.INPUT.SIZE_TRAIN)
    return TrainingViews(
        seed=max(cfg.SEED, 0),
        rank=rank(),
        size=None if size[0] <= 0 else (int(size[0]), int(size[-1])),
        degraded=degraded,
        other=other,
    )


def without_flip(cfg: Any) -> Any:
    """``cfg`` for the host's ``build_transforms`` behind the views, which mirror by themselves."""
    rest = cfg.clone()
    rest.defrost()
    rest.INPUT.FLIP.ENABLED = False
    return rest


def check_config(cfg: Any) -> None:
    """Refuse ``QGFACE.VIEWS`` settings that cannot work.

    Raises:
        ConfigError: Names the key, its value and what is accepted.
    """
    views = cfg.QGFACE.VIEWS
    for key, allowed in (("MODE", MODES), ("DEGRADED", tuple(DEGRADED)), ("COLOUR_ORDER", COLOUR_ORDERS)):
        if views[key] not in allowed:
            remedy = did_you_mean(str(views[key]), allowed)
            raise ConfigError(f"QGFACE.VIEWS.{key}", value=views[key], remedy=remedy)
    for key in ("CROP_PROB", "PHOTOMETRIC_PROB", "ROTATION_PROB", "ADAFACE_PROB"):
        if not 0 <= views[key] <= 1:
            raise ConfigError(f"QGFACE.VIEWS.{key}", value=views[key], expected="a number in [0, 1]")
    check_rescaling(views.SIDES, views.FILTERS, views.JPEG_QUALITY)
    if views.OUTPUT_ORDER != "rgb":
        raise ConfigError(
            "QGFACE.VIEWS.OUTPUT_ORDER",
            value=views.OUTPUT_ORDER,
            expected="rgb: fast-reid evaluates and deploys with RGB images, and a network trained on another order "
            "would be scored on swapped channels",
            remedy="For JPEG and jitter as in the authors' program set QGFACE.VIEWS.COLOUR_ORDER bgr. Of weights that "
            "were trained on BGR swap the input channels of the first kernel.",
        )
    if not wants_views(cfg):
        return
    architecture = cfg.MODEL.META_ARCHITECTURE
    if views.MODE == "pair" and not in_chain(cfg, "QGFace"):
        raise ConfigError(
            "QGFACE.VIEWS.MODE",
            value="pair",
            expected=f"none or single with MODEL.META_ARCHITECTURE {architecture}, which looks at one view only",
            remedy="Pairs are for MODEL.META_ARCHITECTURE QGFace.",
        )
    if in_chain(cfg, "QSD") and (cfg.QSD.PAIR_FLIP == "shared" or not cfg.QSD.TEACHER_ERASE):
        raise ConfigError(
            "QGFACE.VIEWS.MODE",
            value=views.MODE,
            expected="none with QSD.PAIR_FLIP shared or QSD.TEACHER_ERASE False",
            remedy="Each view is mirrored and erased by itself: set QSD.PAIR_FLIP independent, QSD.TEACHER_ERASE True.",
        )


def _degraded(views: Any, flip: float) -> View:
    common = {"flip_probability": flip, "colour_order": views.COLOUR_ORDER}
    variant = DEGRADED[views.DEGRADED]
    if variant:
        return partial(adaface_view, variant=variant, probability=views.ADAFACE_PROB, **common)
    return partial(
        degraded_view,
        crop_probability=views.CROP_PROB,
        photometric_probability=views.PHOTOMETRIC_PROB,
        rotation_probability=views.ROTATION_PROB,
        sides=tuple(views.SIDES),
        filters=tuple(views.FILTERS),
        jpeg_quality=views.JPEG_QUALITY,
        **common,
    )
