"""``QUALITY.*``: the quality of the images of a batch, from the source the config names."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from qsd_plugin.core.errors import ConfigError, LabelError, did_you_mean
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.methods.qsd import check_labels
from qsd_plugin.quality.labels import QualityLabels, require_coverage
from qsd_plugin.quality.scaling import CONTROLS, TOP
from qsd_plugin.quality.sources import FileSource, QualitySource, build_source

logger = logging.getLogger("fastreid.qsd_plugin.quality")

#: The ``QUALITY.SOURCE`` that needs nothing but image paths.
FILE = "file"
#: The one that looks at the images of the batch.
NETWORK = "network"


class ImageQuality(nn.Module):
    """Quality of training images, 0 to 100, higher is better.

    Label files are read at the first training step, so that a model can be built for evaluation without them. A source
    with state of its own keeps it in this module's buffers.

    Args:
        cfg: The host's config; reads ``QUALITY.*``, ``DATASETS.NAMES``, ``SEED`` and ``OUTPUT_DIR``.

    Attributes:
        needs_embeddings: Whether the qualities of a batch depend on a forward pass of the model that is trained, so
            that they are not known before it.

    Raises:
        ConfigError: Unknown source or control, a control that the source cannot have, or a quality network that cannot
            be built or has no weights.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        check_config(cfg)
        self._cfg = cfg.clone()
        self.needs_embeddings = cfg.QUALITY.SOURCE not in (FILE, NETWORK)
        self.source: QualitySource | None = None
        self._spreads: FileSource | None = None
        if cfg.QUALITY.SOURCE == NETWORK:
            self.source = build_source(NETWORK, network=cfg.QUALITY.NETWORK, weights=cfg.QUALITY.NETWORK_WEIGHTS)
        elif self.needs_embeddings:
            self.source = build_source(cfg.QUALITY.SOURCE)

    def forward(
        self,
        paths: Sequence[str],
        embeddings: torch.Tensor | None,
        device: torch.device,
        images: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Quality [B] float32 and whether each image has one [B], on ``device``.

        Args:
            paths: Image paths as the host knows them.
            embeddings: Features before any normalisation [B, D]; needed if ``needs_embeddings``.
            device: Where the training step wants them.
            images: Training images as the model is given them [B, 3, H, W], RGB, 0 to 255; needed by ``network``.

        Raises:
            LabelError: A label file is missing, wrong, or covers too few training images.
        """
        if self.source is None:
            self.source = file_source(self._cfg)
        entries = {"paths": paths, "embeddings": embeddings, "images": images}
        quality, valid = self.source({name: entry for name, entry in entries.items() if entry is not None})
        return quality.to(device, non_blocking=True), valid.to(device, non_blocking=True)

    def spread(self, paths: Sequence[str], device: torch.device) -> torch.Tensor:
        """Standard deviation of each label over the labelling rounds [B] float32, in label units; NaN where unknown.

        Only label files know them.
        """
        if self.source is None:
            self.source = file_source(self._cfg)
        if not isinstance(self.source, FileSource):
            return torch.full((len(paths),), torch.nan, device=device)
        if self._spreads is None:
            self._spreads = _spread_source(self.source)
        spread, known = self._spreads({"paths": paths})
        return torch.where(known, spread, torch.nan).to(device, non_blocking=True)


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
        warning = check_labels(torch.from_numpy(labels.score[np.isfinite(labels.score)]), labels.origin)
        if warning:
            logger.warning(warning)
    return source


def _spread_source(source: FileSource) -> FileSource:
    """``source`` with the spread of each label in the label's place."""
    spreads = copy.copy(source)
    spreads.labels = tuple(replace(labels, score=_spread_on_label_scale(labels)) for labels in source.labels)
    if not any(np.isfinite(labels.score).any() for labels in spreads.labels):
        logger.warning("QSD.CONFIDENCE drops no pair: %s holds no spreads.", source.labels[0].origin)
    return spreads


def _spread_on_label_scale(labels: QualityLabels) -> NDArray[np.float64]:
    fitted_to = labels.meta.get("scale_fitted_to")
    if fitted_to is None:
        return labels.spread
    low, high = fitted_to
    # Ranks have no factor that a spread could be multiplied with.
    factor = TOP / (high - low) if labels.meta["scale"] == "minmax" and high > low else np.nan
    return labels.spread * factor
