"""``DATALOADER.SAMPLER_TRAIN``: the plugin's samplers beside the host's, made from the config and quality labels."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Sampler

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.errors import ConfigError, RegistryError, did_you_mean
from qsd_plugin.core.registry import Registry
from qsd_plugin.data.samplers import (
    QualityBalancedSampler,
    QualityIdentitySampler,
    SeededIdentitySampler,
    SeededTrainingSampler,
    quality_bins,
)
from qsd_plugin.hosts.fastreid.compat.samplers import SetReWeightSampler
from qsd_plugin.hosts.fastreid.datasets import Item
from qsd_plugin.hosts.fastreid.quality import FILE, STORED, file_source

logger = logging.getLogger("fastreid.qsd_plugin.data")

#: Makes a sampler from the config, the training items and the index of each item's data set.
SamplerFactory = Callable[[Any, Sequence[Item], Sequence[int]], Sampler[int]]

#: The plugin's samplers, and the place for your own.
SAMPLERS: Registry[SamplerFactory] = Registry("training sampler")

#: Names that the host's loader builder knows; it has no registry.
HOST_SAMPLERS = (
    "BalancedIdentitySampler",
    "ImbalancedDatasetSampler",
    "NaiveIdentitySampler",
    "SetReWeightSampler",
    "TrainingSampler",
)

#: All images in random order, as TrainingSampler, but resumed exactly together with the augmentation of each draw.
SEEDED = "SeededTrainingSampler"

#: Groups of each identity's images, as NaiveIdentitySampler, but resumed exactly, too.
SEEDED_IDENTITIES = "SeededIdentitySampler"

#: Samplers that need the quality labels of the training images.
NEED_LABELS = ("QualityBalancedSampler", "QualityIdentitySampler")

#: Samplers whose batches hold the ``DATALOADER.NUM_INSTANCE`` images of an identity in a row.
IN_BLOCKS = ("BalancedIdentitySampler", "NaiveIdentitySampler", "SetReWeightSampler", SEEDED_IDENTITIES, *NEED_LABELS)


def build_sampler(cfg: Any, items: Sequence[Item], sets: Sequence[int]) -> Sampler[int] | None:
    """The sampler that ``DATALOADER.SAMPLER_TRAIN`` names, or ``None`` for one that the host builds.

    Args:
        cfg: The host's config.
        items: Training items in the order of the training set.
        sets: Index of each item's data set in ``DATASETS.NAMES``.

    Raises:
        ConfigError: Settings that cannot work.
        LabelError: A label file is missing, wrong, or covers too few training images.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    check_config(cfg)
    if name not in SAMPLERS:
        return None
    logger.info("Using training sampler %s", name)
    return SAMPLERS.get(name)(cfg, items, sets)


def check_config(cfg: Any) -> None:
    """Refuse settings with which one of the plugin's samplers cannot work.

    Raises:
        ConfigError: Names the key, its value and what is accepted.
    """
    name = cfg.DATALOADER.SAMPLER_TRAIN
    if name in NEED_LABELS and cfg.QUALITY.SOURCE not in STORED:
        raise ConfigError(
            "QUALITY.SOURCE",
            value=cfg.QUALITY.SOURCE,
            expected=f"{FILE} with DATALOADER.SAMPLER_TRAIN {name}, which chooses images before they are seen",
            remedy="Make label files with --stage labels, or use NaiveIdentitySampler.",
        )
    if name == "QualityBalancedSampler":
        quality_bins((), cfg.QUALITY.BALANCE.BINS, cfg.QUALITY.BALANCE.EDGES)


@contextmanager
def names_explained(cfg: Any) -> Iterator[None]:
    """Answer a name that the host's builder does not know with those that exist.

    The host is asked first, because a host of your own may know more names than the released one.

    Raises:
        RegistryError: Unknown name.
    """
    try:
        yield
    except ValueError as error:
        if not str(error).startswith("Unknown training sampler"):
            raise
        name = cfg.DATALOADER.SAMPLER_TRAIN
        raise RegistryError(
            "Unknown name for DATALOADER.SAMPLER_TRAIN",
            value=name,
            remedy=did_you_mean(name, {*SAMPLERS, *HOST_SAMPLERS}),
        ) from error


def needs_labels(cfg: Any) -> bool:
    """Whether the configured sampler reads quality labels."""
    return cfg.DATALOADER.SAMPLER_TRAIN in NEED_LABELS


def without_labels(cfg: Any) -> str:
    """The configured sampler, or the one to use in its place while there are no labels."""
    return "NaiveIdentitySampler" if needs_labels(cfg) else str(cfg.DATALOADER.SAMPLER_TRAIN)


@SAMPLERS.register("QualityIdentitySampler")
def _quality_identity(cfg: Any, items: Sequence[Item], sets: Sequence[int]) -> QualityIdentitySampler:
    identities = [identity for _, identity, _ in items]
    sampler = QualityIdentitySampler(identities, _scores(cfg, items), **_common(cfg))
    if sampler.without_gap:
        logger.warning(
            "%d of %d training identities have no two different labels: their images are drawn without regard to "
            "quality and QSD finds no pair among them.",
            sampler.without_gap,
            len(set(identities)),
        )
    return sampler


@SAMPLERS.register("QualityBalancedSampler")
def _quality_balanced(cfg: Any, items: Sequence[Item], sets: Sequence[int]) -> QualityBalancedSampler:
    return QualityBalancedSampler(
        [identity for _, identity, _ in items],
        _scores(cfg, items),
        num_bins=cfg.QUALITY.BALANCE.BINS,
        edges=cfg.QUALITY.BALANCE.EDGES,
        sets=sets,
        **_common(cfg),
    )


@SAMPLERS.register(SEEDED)
def _seeded(cfg: Any, items: Sequence[Item], sets: Sequence[int]) -> SeededTrainingSampler:
    common = _common(cfg)
    del common["num_instances"]
    return SeededTrainingSampler(len(items), **common)


@SAMPLERS.register(SEEDED_IDENTITIES)
def _seeded_identity(cfg: Any, items: Sequence[Item], sets: Sequence[int]) -> SeededIdentitySampler:
    return SeededIdentitySampler([identity for _, identity, _ in items], **_common(cfg))


@SAMPLERS.register("SetReWeightSampler")
def _set_weighted(cfg: Any, items: Sequence[Item], sets: Sequence[int]) -> SetReWeightSampler:
    common = _common(cfg)
    return SetReWeightSampler(
        items, common["batch_size"], common["num_instances"], cfg.DATALOADER.SET_WEIGHT, seed=common["seed"]
    )


def _common(cfg: Any) -> dict[str, int]:
    from fastreid.utils import comm

    return {
        "batch_size": cfg.SOLVER.IMS_PER_BATCH // world_size(),
        "num_instances": cfg.DATALOADER.NUM_INSTANCE,
        "seed": cfg.SEED if cfg.SEED >= 0 else int(comm.shared_random_seed()),
        "rank": rank(),
        "world_size": world_size(),
    }


def _scores(cfg: Any, items: Sequence[Item]) -> NDArray[np.float64]:
    """The run's labels of the training images, [N], as the training step sees them; NaN where there is none."""
    scores, valid = file_source(cfg)({"paths": [path for path, _, _ in items]})
    missing = int((~valid).sum())
    if missing:
        logger.warning(
            "%d of %d training images have no quality label: %s draws them only where an identity's labelled images do "
            "not fill its group.",
            missing,
            len(items),
            cfg.DATALOADER.SAMPLER_TRAIN,
        )
    return np.where(valid.numpy(), scores.double().numpy(), np.nan)
