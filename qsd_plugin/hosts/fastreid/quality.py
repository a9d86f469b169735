"""``QUALITY.*``: the quality of the images of a batch, from the source the config names."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from qsd_plugin.core.errors import ConfigError, LabelError, did_you_mean
from qsd_plugin.hosts.fastreid import datasets
from qsd_plugin.hosts.fastreid.labelling import check_method
from qsd_plugin.quality.checks import label_warnings, require_usable
from qsd_plugin.quality.labels import require_coverage
from qsd_plugin.quality.scaling import CONTROLS
from qsd_plugin.quality.sources import FileSource, QualitySource, build_source

logger = logging.getLogger("fastreid.qsd_plugin.quality")

#: The ``QUALITY.SOURCE`` that needs nothing but image paths.
FILE = "file"
#: The one that looks at the images of the batch.
NETWORK = "network"
#: The one whose labels are those of DIL's stage 1.
SEVERITY = "dil_severity"
#: Those whose labels are stored, and known before an image is loaded.
STORED = (FILE, SEVERITY)


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
        self.needs_embeddings = cfg.QUALITY.SOURCE not in (*STORED, NETWORK)
        self.source: QualitySource | None = None
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
        entries = {"paths": paths, "embeddings": embeddings, "images": images}
        batch = {name: entry for name, entry in entries.items() if entry is not None}
        quality, valid = self._ready_source()(batch)
        return quality.to(device, non_blocking=True), valid.to(device, non_blocking=True)

    def spread(self, paths: Sequence[str], device: torch.device) -> torch.Tensor:
        """How uncertain the quality of each image is, [B] float32 on ``device``, in units of the quality.

        The standard deviation over the labelling's rounds. NaN where it is not known: images without a label, labels
        without rounds (``norm``, files of others), ``QUALITY.SCALE rank``, and sources other than ``file``.

        Raises:
            LabelError: As :meth:`forward`.
        """
        source = self._ready_source()
        if not isinstance(source, FileSource):
            return torch.full((len(paths),), torch.nan, device=device)
        return source.spread(paths).to(device, non_blocking=True)

    def use_files(self, files: Sequence[Path]) -> None:
        """From now on take the labels from these files instead, one per training set.

        Raises:
            LabelError: As :meth:`forward`.
        """
        self.source = file_source(self._cfg, files)

    def _ready_source(self) -> QualitySource:
        if self.source is None:
            self.source = file_source(self._cfg)
        return self.source


def check_config(cfg: Any) -> None:
    """Refuse impossible ``QUALITY`` settings."""
    quality = cfg.QUALITY
    if quality.CONTROL not in CONTROLS:
        raise ConfigError("QUALITY.CONTROL", value=quality.CONTROL, remedy=did_you_mean(quality.CONTROL, CONTROLS))
    if quality.SOURCE not in STORED and quality.CONTROL in ("shuffle", "reverse"):
        raise ConfigError(
            "QUALITY.CONTROL",
            value=quality.CONTROL,
            expected=f"none or random_direction with QUALITY.SOURCE {quality.SOURCE}",
            remedy="shuffle and reverse act on stored labels: make some with --stage labels.",
        )
    check_method(cfg)
    _check_refresh(quality)
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
    files = [Path(path) for path in cfg.QUALITY.FILES]
    if len({file.resolve() for file in files}) < len(files):
        raise ConfigError(
            "QUALITY.FILES names one file for several training sets",
            value=tuple(map(str, files)),
            expected=f"a file of its own for each of DATASETS.NAMES {tuple(names)}",
            remedy="Labels of different data sets are not comparable, so each set has its own file.",
        )
    return files


def severity_inputs(cfg: Any) -> list[Path]:
    """The file of a stage 1 that only the labels come from."""
    path = cfg.QUALITY.SEVERITY.STAGE1
    return [Path(path)] if path and cfg.QUALITY.SOURCE == SEVERITY and not Path(path).is_dir() else []


def file_source(cfg: Any, files: Sequence[Path] | None = None) -> FileSource:
    """The labels of ``QUALITY.FILES``, of DIL's stage 1 or of ``files``, checked against the training images.

    Raises:
        LabelError: A file is missing, wrong, has equal labels only, or covers less than ``QUALITY.MIN_COVERAGE`` of its
            data set.
    """
    if files is None and cfg.QUALITY.SOURCE == SEVERITY:
        from qsd_plugin.hosts.fastreid.dil_quality import severity_files  # which is made of loaders that need samplers

        files = severity_files(cfg)
    files = label_files(cfg) if files is None else files
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
        paths = [path for path, _, _ in items]
        coverage = require_coverage(labels, paths, cfg.QUALITY.MIN_COVERAGE, root=root, basenames=source.basenames)
        require_usable(labels)
        for text in label_warnings(labels):
            logger.warning("Quality labels of %s (%s): %s", name, labels.origin, text)
        logger.info("Quality labels of %s: %s, %.2f %% of %d images", name, labels.origin, 100 * coverage, len(items))
        if cfg.QSD.CONFIDENCE > 0 and np.isnan(labels.spread).all():
            logger.warning("QSD.CONFIDENCE drops no pair of %s: %s holds no spreads.", name, labels.origin)
    return source


def _check_refresh(quality: Any) -> None:
    if quality.REFRESH_EPOCHS < 0:
        raise ConfigError("QUALITY.REFRESH_EPOCHS", value=quality.REFRESH_EPOCHS, expected="0 (never) or more")
    if quality.REFRESH_EPOCHS and quality.SOURCE != FILE:
        raise ConfigError(
            "QUALITY.REFRESH_EPOCHS",
            value=quality.REFRESH_EPOCHS,
            expected=f"0 with QUALITY.SOURCE {quality.SOURCE}, which scores every batch anew",
        )
    if quality.REFRESH_EPOCHS and quality.FOLDS:
        raise ConfigError(
            "QUALITY.REFRESH_EPOCHS",
            value=quality.REFRESH_EPOCHS,
            expected=f"0 with QUALITY.FOLDS {quality.FOLDS}",
            remedy="Refreshed labels come from the network in training, which sees every image; cross-fitted ones must "
            "come from networks that do not. Choose one of the two.",
        )
