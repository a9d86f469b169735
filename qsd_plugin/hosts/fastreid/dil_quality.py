"""``QUALITY.SOURCE dil_severity``: labels that DIL's stage 1 reads off the degradation code of an image.

Training images are degraded as ``DIL.PAIRS`` says; the direction that separates their codes from those of the images as
they are is the one along which images get worse (:mod:`qsd_plugin.methods.dil.severity`). A label is minus the place of
an image's code along it, scaled to [0, 100]. Nothing needs to know which image is good.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from torch import Tensor

from qsd_plugin.core.distributed import on_main
from qsd_plugin.core.errors import ConfigError, DataError, LabelError
from qsd_plugin.core.progress import progress
from qsd_plugin.core.streams import numpy_stream, torch_stream
from qsd_plugin.hosts.fastreid.compat.images import read_image
from qsd_plugin.hosts.fastreid.datasets import Item, dataset_folder
from qsd_plugin.hosts.fastreid.dil_files import encoder_digest, load_stage1
from qsd_plugin.hosts.fastreid.dil_pairs import degradation_of
from qsd_plugin.hosts.fastreid.label_reports import write_report
from qsd_plugin.hosts.fastreid.meta_arch import dil_config
from qsd_plugin.hosts.fastreid.training_stages import training_items
from qsd_plugin.methods.dil import DegradationEncoder, flip_averaged_codes
from qsd_plugin.methods.dil.severity import Severity, fit_severity, severity
from qsd_plugin.quality.keys import label_key
from qsd_plugin.quality.labels import QualityLabels
from qsd_plugin.quality.scaling import minmax

logger = logging.getLogger("fastreid.qsd_plugin.labels")

FOLDER = METHOD = "dil_severity"
#: Share of degraded and other images on the right side of the direction, below which it says little.
DOUBTFUL = 0.6


def severity_files(cfg: Any) -> list[Path]:
    """The label file of each training set in ``OUTPUT_DIR``; those that are missing or outdated are made first.

    Raises:
        ConfigError: No stage 1 is named.
        CheckpointError: It is something else.
        LabelError: Too few images can be read.
    """
    folder = Path(cfg.OUTPUT_DIR) / FOLDER
    files = [folder / f"{name}.npz" for name in cfg.DATASETS.NAMES]

    def make() -> None:
        encoder = load_encoder(cfg)
        wanted = _settings(cfg, encoder)
        if not all(file.is_file() and _is_made_with(QualityLabels.load(file), wanted) for file in files):
            make_severity_labels(cfg, training_items(cfg), folder)

    on_main(make)
    return files


def stage1_path(cfg: Any) -> Path:
    """The stage 1 that labels the images.

    Raises:
        ConfigError: None is named.
    """
    path = cfg.QUALITY.SEVERITY.STAGE1 or cfg.DIL.STAGE1
    if not path:
        raise ConfigError(
            "QUALITY.SEVERITY.STAGE1",
            value="",
            expected="a checkpoint of DIL's stage 1, for QUALITY.SOURCE dil_severity",
            remedy="Train one: python tools/train_net.py --config-file CONFIG --stage stage1, with RECIPE.NAME dil.",
        )
    return Path(path)


def load_encoder(cfg: Any) -> DegradationEncoder:
    """The degradation encoder of :func:`stage1_path` on ``MODEL.DEVICE``, in eval mode."""
    networks = dil_config.build_networks(cfg)
    load_stage1(networks, stage1_path(cfg), parts=["degradation_encoder"])
    return networks.degradation_encoder.eval().to(cfg.MODEL.DEVICE)


def make_severity_labels(cfg: Any, items: Mapping[str, Sequence[Item]], folder: Path) -> None:
    """Label training sets, as ``<folder>/<data set>.npz``, and report on the labels.

    Args:
        cfg: Reads ``QUALITY.SEVERITY``, ``DIL.PAIRS``, ``DIL.WIDTH``, ``INPUT.SIZE_TEST`` and ``SEED``.
        items: Training items by data-set name.
        folder: Where to write.

    Raises:
        ConfigError, CheckpointError: As :func:`severity_files`.
        LabelError: Too few images can be read, or a code is not finite.
    """
    encoder = load_encoder(cfg)
    found = find_direction(cfg, encoder, [path for part in items.values() for path, _, _ in part])
    logger.info("DIL severity: %.1f %% of held-out images on the right side", 100 * found.accuracy)
    if found.accuracy < DOUBTFUL:
        logger.warning(
            "Stage 1 hardly tells degraded images from others (%.2f of them, chance is 0.5): its labels say little.",
            found.accuracy,
        )
    for name, part in items.items():
        root = dataset_folder(cfg, name)
        keys = tuple(label_key(path, root=root, dataset=name) for path, _, _ in part)
        codes = _codes(cfg, encoder, _images(part), f"Severity of {name}", len(part))
        raw = -severity(codes.double(), found.direction.double()).numpy()
        known = np.isfinite(raw)
        if known.sum() < 2:
            raise LabelError(f"DIL severity of {name}", value=int(known.sum()), expected="two images that can be read")
        score = np.full(len(raw), np.nan)
        score[known] = minmax(raw[known])
        meta = {
            **_settings(cfg, encoder),
            "dataset": name,
            "scale": "minmax",
            "images": len(keys),
            "identities": len({pid for _, pid, _ in part}),
            "unlabelled": int((~known).sum()),
            "raw_range": [float(raw[known].min()), float(raw[known].max())],
            "accuracy": found.accuracy,
        }
        QualityLabels(score, raw, np.full(len(raw), np.nan), keys, meta).save(folder / f"{name}.npz")
    write_report(cfg, {name: folder / f"{name}.npz" for name in items}, folder)


def find_direction(cfg: Any, encoder: DegradationEncoder, paths: Sequence[str]) -> Severity:
    """The direction of worse images, from images of ``paths`` and degraded copies of them.

    Args:
        cfg: As for :func:`make_severity_labels`.
        encoder: Of stage 1.
        paths: Training images.

    Raises:
        ConfigError: ``QUALITY.SEVERITY.IMAGES`` is too small.
        LabelError: Too few images can be read.
    """
    count, seed = int(cfg.QUALITY.SEVERITY.IMAGES), max(cfg.SEED, 0)
    if count < 10:
        raise ConfigError("QUALITY.SEVERITY.IMAGES", value=count, expected="an integer >= 10")
    degrade = degradation_of(cfg)
    chosen = numpy_stream(seed, "dil severity images").permutation(len(paths))[:count]
    images = [image for row in chosen for image in _readable(paths[row])]
    if len(images) < 10:
        raise LabelError("DIL severity: images that can be read", value=len(images), expected="at least 10")
    worse = [degrade(image, numpy_stream(seed, "dil severity", row)) for row, image in enumerate(images)]
    codes = _codes(cfg, encoder, [*images, *worse], "Direction of severity", 2 * len(images))
    quality = torch.cat([torch.ones(len(images)), torch.zeros(len(worse))])
    return fit_severity(codes.double(), quality, torch_stream(seed, "dil severity held out"), fraction=0.5)


def _settings(cfg: Any, encoder: DegradationEncoder) -> dict[str, Any]:
    """What the labels depend on beside the images."""
    return {
        "method": METHOD,
        "extractor": f"degradation encoder {encoder_digest(encoder)[:16]}",
        "degradation": f"{cfg.DIL.PAIRS.MIX} {list(cfg.DIL.PAIRS.RATIO)}",
        "severity_images": int(cfg.QUALITY.SEVERITY.IMAGES),
        "size": list(cfg.INPUT.SIZE_TEST),
        "seed": max(cfg.SEED, 0),
    }


def _is_made_with(labels: QualityLabels, wanted: Mapping[str, Any]) -> bool:
    return all(labels.meta.get(key) == value for key, value in wanted.items())


def _images(items: Iterable[Item]) -> Iterable[PILImage.Image | None]:
    for path, _, _ in items:
        yield next(iter(_readable(path)), None)


def _readable(path: str) -> list[PILImage.Image]:
    try:
        return [read_image(path)]
    except DataError as error:
        logger.warning("Image has no severity: %s", error)
        return []


def _codes(
    cfg: Any, encoder: DegradationEncoder, images: Iterable[PILImage.Image | None], title: str, total: int
) -> Tensor:
    """Codes of images under the test transform, [N, K] on the CPU; NaN in the place of an image that is ``None``."""
    from fastreid.data.transforms import build_transforms

    transforms = build_transforms(cfg, is_train=False)
    mean, std = (torch.tensor(cfg.MODEL[key]).view(3, 1, 1) for key in ("PIXEL_MEAN", "PIXEL_STD"))
    size = (3, int(cfg.INPUT.SIZE_TEST[0]), int(cfg.INPUT.SIZE_TEST[-1]))
    codes: list[Tensor] = []
    waiting: list[Tensor] = []
    for place, image in enumerate(progress(images, title, total=total), 1):
        waiting.append(torch.full(size, torch.nan) if image is None else (transforms(image) - mean) / std)
        if len(waiting) == cfg.TEST.IMS_PER_BATCH or place == total:
            codes.append(flip_averaged_codes(encoder, torch.stack(waiting).to(cfg.MODEL.DEVICE)).cpu())
            waiting = []
    return torch.cat(codes)
