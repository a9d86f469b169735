"""The training set of DIL's stage 1: a draw is a pair of a better and a worse image, for the phase of its iteration.

A draw depends on (seed, rank, number of the draw) only, so pairs are the same for any number of workers and in a
resumed training. Images are resized to ``INPUT.SIZE_TRAIN``, and nothing else of ``INPUT`` happens to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image as PILImage

from qsd_plugin.core.distributed import rank
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.hosts.fastreid.meta_arch.dil import ITERATION, WORSE_IMAGES, WORSE_TARGETS
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import (
    STAGE1,
    check_config,
    images_per_rank,
    mix_of,
    schedule_of,
)
from qsd_plugin.hosts.fastreid.mlr_datasets import degraded_cameras
from qsd_plugin.hosts.fastreid.samplers import SEEDED
from qsd_plugin.hosts.fastreid.training_degradation import Mixture

#: Arguments of the host's loader builder that are made here.
OWN = ("cfg", "train_set", "sampler", "transforms", "partner")
#: From an RGB image and a generator to the degraded image, which may be smaller.
Degrade = Callable[[PILImage.Image, np.random.Generator], PILImage.Image]


class PairDraws:
    """Who is paired with whom, and how an image is degraded.

    Args:
        cameras: Of all training images, in their order.
        cfg: The host's config.
        identities: Of all training images; needed for ``DIL.PAIRS.STORED``.

    Raises:
        ConfigError: There is no camera to pair with.
        DataError: With ``DIL.PAIRS.STORED``, an identity has no clean or no degraded image.
    """

    def __init__(self, cameras: Sequence[Any], cfg: Any, identities: Sequence[Any] = ()) -> None:
        check_config(cfg)
        self._seed, self._rank, self._batch = max(cfg.SEED, 0), rank(), images_per_rank(cfg)
        self.schedule = schedule_of(cfg)
        self.degrade = degradation_of(cfg)
        chosen = set(cfg.DIL.PAIRS.DEGRADED_CAMERAS)
        degraded: set[Any] = chosen or set(degraded_cameras(cfg))
        self._by_domain = self.schedule.other == "unpaired" and bool(degraded)
        by_number = self._by_domain and bool(chosen)
        names: list[Any] = [camera_number(camera) if by_number else str(camera) for camera in cameras]
        domains = [name in degraded for name in names] if self._by_domain else names
        self._domains = np.array(domains)
        if self.schedule.paired_probability != 1 and len(set(domains)) < 2:
            raise ConfigError(
                "DIL.PAIRS.DEGRADED_CAMERAS" if self._by_domain else "DIL.PAIRS.OTHER",
                value=sorted(degraded) if self._by_domain else self.schedule.other,
                expected="images of both domains" if self._by_domain else "training images of at least two cameras",
                remedy=f"The cameras are {sorted(set(names))[:12]}. For paired iterations alone set "
                "DIL.PAIRS.PAIRED_PROB 1.",
            )

        self._stored = _by_identity(identities, domains) if cfg.DIL.PAIRS.STORED else None

    def iteration(self, draw: int) -> int:
        """The iteration, from 1, that a draw is for."""
        return draw // self._batch + 1

    def pair(self, index: int, draw: int) -> tuple[int, int]:
        """Indices of the better and of the worse image; equal where the worse one is to be degraded."""
        stream = numpy_stream(self._seed, "dil partner", self._rank, draw)
        if self.schedule.phase(self.iteration(draw)) == "paired":
            if self._stored is not None:
                sides = self._stored[index]
                partner = int(stream.choice(sides[not self._domains[index]]))
                return (partner, index) if self._domains[index] else (index, partner)
            if self._by_domain and self._domains[index]:
                index = self._other(index, stream)  # degradations are for images that are clean
            return index, index
        other = self._other(index, stream)
        return (other, index) if self._by_domain and self._domains[index] else (index, other)

    def generator(self, draw: int) -> np.random.Generator:
        """For the degradation of a draw."""
        return numpy_stream(self._seed, "dil degradation", self._rank, draw)

    def _other(self, index: int, stream: np.random.Generator) -> int:
        """An image of any other camera, with domains of the other one."""
        others = np.flatnonzero(self._domains != self._domains[index])
        return int(others[stream.integers(len(others))]) if len(others) else index


def wants_pairs(cfg: Any) -> bool:
    """Whether the loader makes DIL's pairs."""
    return bool(cfg.MODEL.META_ARCHITECTURE == STAGE1)


def refuse_own(cfg: Any, options: Mapping[str, Any]) -> None:
    """Refuse data, transforms or a sampler that a script passes to the loader, and samplers that cannot be resumed.

    Raises:
        ConfigError: Names it.
    """
    own = [name for name in OWN if name != "cfg" and options.get(name) is not None]
    if not own and cfg.DATALOADER.SAMPLER_TRAIN == SEEDED:
        return
    raise ConfigError(
        f"{own[0]} passed to build_reid_train_loader" if own else "DATALOADER.SAMPLER_TRAIN",
        value=None if own else cfg.DATALOADER.SAMPLER_TRAIN,
        expected=f"{SEEDED} and the plugin's own images: with MODEL.META_ARCHITECTURE DIL the loader must know the "
        "iteration of every draw",
        remedy=f"Set DATALOADER.SAMPLER_TRAIN {SEEDED} and leave the argument out.",
    )


def degradation_of(cfg: Any) -> Degrade:
    """What ``DIL.PAIRS.MIX`` and ``RATIO`` say."""
    ratio = float(cfg.DIL.PAIRS.RATIO[0]), float(cfg.DIL.PAIRS.RATIO[1])
    return Mixture(mix_of(cfg), ratio).apply


def pair_transforms(cfg: Any) -> Any:
    """The host's test transforms at ``INPUT.SIZE_TRAIN``: resize, and to a tensor."""
    from fastreid.data.build import build_transforms

    plain = cfg.clone()
    plain.defrost()
    plain.INPUT.SIZE_TEST = list(cfg.INPUT.SIZE_TRAIN)
    return build_transforms(plain, is_train=False)


def pair_sample(
    draws: PairDraws,
    index: int,
    draw: int,
    read: Callable[[int], tuple[PILImage.Image, int]],
    transform: Callable[[PILImage.Image], Any],
    label: Callable[[int], int],
) -> tuple[dict[str, Any], int]:
    """What a sample holds of a pair, and which image the better one is.

    Args:
        draws: Of the training set.
        index: The sampler's.
        draw: Its number.
        read: Index to RGB image, and the index of the one that it is: another one for a damaged image.
        transform: Image to tensor.
        label: Index to class.
    """
    better, worse = draws.pair(index, draw)
    image, better_shown = read(better)
    if better == worse:
        poor, worse_shown = draws.degrade(image, draws.generator(draw)), better_shown
    else:
        poor, worse_shown = read(worse)
    sample = {
        "images": transform(image),
        WORSE_IMAGES: transform(poor),
        WORSE_TARGETS: label(worse_shown),
        ITERATION: draws.iteration(draw),
    }
    return sample, better_shown


def _by_identity(identities: Sequence[Any], domains: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """For every image its identity's clean and degraded images."""
    sides: dict[Any, tuple[list[int], list[int]]] = {}
    for place, (identity, degraded) in enumerate(zip(identities, domains, strict=True)):
        sides.setdefault(identity, ([], []))[bool(degraded)].append(place)
    alone = [str(identity) for identity, (clean, degraded) in sides.items() if not clean or not degraded]
    if alone:
        raise DataError(
            "DIL.PAIRS.STORED: identities without a clean or without a degraded image",
            value=f"{len(alone)} of {len(sides)}: {', '.join(alone[:5])}",
            expected="both, by DIL.PAIRS.DEGRADED_CAMERAS",
            remedy="For images that are no pairs set DIL.PAIRS.STORED False.",
        )
    return [sides[identity] for identity in identities]


def camera_number(camera: Any) -> int:
    """The camera of a host item: a number, or text that ends in one behind an underscore."""
    try:
        return int(str(camera).rsplit("_", 1)[-1])
    except ValueError:
        raise DataError(
            "Camera of a training image", value=camera, expected="a number, for DIL.PAIRS.DEGRADED_CAMERAS"
        ) from None
