"""``DATA.FOLDS`` and ``DATA.FOLD``: training without the identities of one fold, so that others may label them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.fastreid.datasets import Item
from qsd_plugin.quality.folds import identity_folds

_IDENTITY_SAMPLERS = ("NaiveIdentitySampler", "BalancedIdentitySampler")


def fold_of_items(cfg: Any, items: Sequence[Item], folds: int) -> NDArray[np.int64]:
    """The fold of every training image of one data set, [N], 1 to ``folds``; it depends on ``SEED``."""
    return identity_folds([identity for _, identity, _ in items], folds, seed=max(cfg.SEED, 0)) + 1


def training_part(cfg: Any, items: Sequence[Item]) -> list[Item]:
    """The training images of one data set without those of ``DATA.FOLD``; all of them when that is 0.

    Raises:
        ConfigError: ``DATA.FOLD`` is no fold, or the identities cannot be divided.
    """
    fold, folds = cfg.DATA.FOLD, cfg.DATA.FOLDS
    if fold == 0:
        return list(items)
    if not 1 <= fold <= folds:
        raise ConfigError(
            "DATA.FOLD",
            value=fold,
            expected=f"0 (train on everybody) to DATA.FOLDS {folds}",
            remedy="The recipe sets both when QUALITY.FOLDS is 2 or more.",
        )
    return [item for item, own in zip(items, fold_of_items(cfg, items, folds), strict=True) if own != fold]


def check_folds(cfg: Any, items: Mapping[str, Sequence[Item]]) -> None:
    """Refuse a number of folds that would fail only after hours of training.

    Raises:
        ConfigError: Label files are given as well, a fold is too small to draw negatives from, or too few identities
            remain to fill a batch.
    """
    folds = cfg.QUALITY.FOLDS
    if cfg.QUALITY.FILES:
        raise ConfigError(
            "QUALITY.FOLDS",
            value=folds,
            expected=f"0 when QUALITY.FILES names labels ({cfg.QUALITY.FILES[0]})",
            remedy="Folds make new labels: leave QUALITY.FILES empty, or QUALITY.FOLDS 0.",
        )
    remaining = [0] * folds
    for name, entries in items.items():
        fold = fold_of_items(cfg, entries, folds)
        images = [
            Counter(pid for (_, pid, _), own in zip(entries, fold, strict=True) if own == k + 1) for k in range(folds)
        ]
        for number, counts in enumerate(images):
            others = counts.total() - max(counts.values())
            if cfg.QUALITY.METHOD == "sdd_fiqa" and others < cfg.QUALITY.NEGATIVES:
                raise ConfigError(
                    f"QUALITY.FOLDS {folds}: negatives in fold {number + 1} of {name}",
                    value=others,
                    expected=f"at least QUALITY.NEGATIVES {cfg.QUALITY.NEGATIVES} images beside the largest identity",
                    remedy="Use fewer folds or fewer negatives.",
                )
            remaining[number] += sum(map(len, images)) - len(counts)
    wanted = cfg.SOLVER.IMS_PER_BATCH // max(cfg.DATALOADER.NUM_INSTANCE, 1)
    if cfg.DATALOADER.SAMPLER_TRAIN in _IDENTITY_SAMPLERS and min(remaining) < wanted:
        raise ConfigError(
            f"QUALITY.FOLDS {folds}: identities left to train on",
            value=min(remaining),
            expected=f"at least {wanted} (SOLVER.IMS_PER_BATCH / DATALOADER.NUM_INSTANCE)",
            remedy="Use more folds or smaller batches.",
        )
