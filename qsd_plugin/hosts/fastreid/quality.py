"""``QUALITY.*``: the quality of the images of a batch, from the source the config names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsd_plugin.core.errors import ConfigError, LabelError, did_you_mean
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.quality.labels import require_coverage
from qsd_plugin.quality.scaling import CONTROLS
from qsd_plugin.quality.sources import FileSource, QualitySource, build_source

logger = logging.getLogger("fastreid.qsd_plugin.quality")

#: The ``QUALITY.SOURCE`` that needs nothing but image paths.
FILE = "file"


class ImageQuality(nn.Module):
    """Quality of training images, 0 to 100, higher is better.

    Label files are read at the first training step, so that a model can be built for evaluation without them. A source
    with state of its own keeps it in this module's buffers.

    Args:
        cfg: The host's config; reads ``QUALITY.*``, ``DATASETS.NAMES``, ``SEED`` and ``OUTPUT_DIR``.

    Raises:
        ConfigError: Unknown source or control, or a control that the source cannot have.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        check_config(cfg)
        self._cfg = cfg.clone()
        self.needs_embeddings = cfg.QUALITY.SOURCE != FILE
        self.source: QualitySource | None = build_source(cfg.QUALITY.SOURCE) if self.needs_embeddings else None

    def forward(
        self, paths: Sequence[str], embeddings: torch.Tensor | None, device: torch.device
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quality [B] float32 and whether each image has one [B], on ``device``.

        Args:
            paths: Image paths as the host knows them.
            embeddings: Features before any normalisation [B, D]; needed unless the source is ``file``.
            device: Where the training step wants them.

        Raises:
            LabelError: A label file is missing, wrong, or covers too few training images.
        """
        if self.source is None:
            self.source = file_source(self._cfg)
        batch = {"paths": paths} if embeddings is None else {"paths": paths, "embeddings": embeddings}
        quality, valid = self.source(batch)
        return quality.to(device, non_blocking=True), valid.to(device, non_blocking=True)


def check_config(cfg: Any) -> None:
    """Refuse impossible ``QUALITY`` settings."""
    quality = cfg.QUALITY
    if quality.CONTROL not in CONTROLS:
        raise ConfigError("QUALITY.CONTROL", value=quality.CONTROL, remedy=did_you_mean(quality.CONTROL, CONTROLS))
    if quality.SOURCE != FILE and quality.CONTROL in ("shuffle", "reverse"):
        raise ConfigError(
            "QUALITY.CONTROL",
            value=quality.CONTROL,
            expected=f"none or random_direction with QUALITY.SOURCE {quality.SOURCE}",
            remedy="shuffle and reverse act on stored labels: make some with --stage labels.",
        )
    if quality.SOURCE == FILE:
        label_files(cfg)


def label_files(cfg: Any) -> list[Path]:
    """The label file of each training set: ``QUALITY.FILES``, or where the recipe writes them."""
    names: Sequence[str] = cfg.DATASETS.NAMES
    if not cfg.QUALITY.FILES:
        return [Path(cfg.OUTPUT_DIR) / "labels" / f"{name}.npz" for name in names]
    if len(cfg.QUALITY.FILES) != len(names):
        raise ConfigError(
            "QUALITY.FILES",
            value=tuple(cfg.QUALITY.FILES),
            expected=f"one label file per training set, in the order of DATASETS.NAMES {tuple(names)}",
            remedy="Labels of different data sets are not comparable, so each set has its own file.",
        )
    return [Path(path) for path in cfg.QUALITY.FILES]


def file_source(cfg: Any) -> FileSource:
    """The labels of ``QUALITY.FILES``, checked against the training images.

    Raises:
        LabelError: A file is missing, wrong, or covers less than ``QUALITY.MIN_COVERAGE`` of its data set.
    """
    files = label_files(cfg)
    for path in files:
        if not path.is_file():
            raise LabelError(
                "Quality labels",
                value=str(path),
                expected="an existing label file",
                remedy="Make it with: python tools/train_net.py --config-file CONFIG --stage labels "
                f"OUTPUT_DIR {cfg.OUTPUT_DIR}, or name yours in QUALITY.FILES.",
            )
    roots = datasets.dataset_roots(cfg)
    source = FileSource(
        files,
        roots=list(roots.values()),
        scale=cfg.QUALITY.SCALE,
        control="none" if cfg.QUALITY.CONTROL == "random_direction" else cfg.QUALITY.CONTROL,
        seed=max(cfg.SEED, 0),
    )
    for (name, root), labels in zip(roots.items(), source.labels, strict=True):
        items = datasets.training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1]
        coverage = require_coverage(labels, [path for path, _, _ in items], cfg.QUALITY.MIN_COVERAGE, root=root)
        logger.info("Quality labels of %s: %s, %.2f %% of %d images", name, labels.origin, 100 * coverage, len(items))
    return source
