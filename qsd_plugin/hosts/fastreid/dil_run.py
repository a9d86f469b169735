"""A finished stage 1 of DIL: its networks, and images of its data to show them on."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from qsd_plugin.core.errors import DataError
from qsd_plugin.core.streams import numpy_stream
from qsd_plugin.data.images import read_rgb
from qsd_plugin.data.items import image_files
from qsd_plugin.hosts.fastreid.datasets import Item, test_set, training_set
from qsd_plugin.hosts.fastreid.dil_files import classes_of, load_parts, read_stage1
from qsd_plugin.hosts.fastreid.dil_pairs import Degrade, camera_number, degradation_of
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import build_networks
from qsd_plugin.hosts.fastreid.report import image_quality
from qsd_plugin.methods.dil import Networks
from qsd_plugin.report.dil.renderer import Picture, Renderer

logger = logging.getLogger("fastreid.qsd_plugin.dil")

CONFIG, CHECKPOINT, STAGE = "config.yaml", "model_final.pth", "stage1"


@dataclass(frozen=True)
class Stage1Run:
    """What a training of stage 1 left.

    Args:
        cfg: Its config, unfrozen.
        checkpoint: Its weights.
        networks: With those weights, on the device.
    """

    cfg: Any
    checkpoint: Path
    networks: Networks

    @property
    def folder(self) -> Path:
        """Of the stage."""
        return self.checkpoint.parent

    @property
    def bank(self) -> Path | None:
        """The codes that the recipe made of this stage 1, if it has come to that."""
        from qsd_plugin.hosts.fastreid.recipes_dil import CODES

        file = self.folder.parent / "bank" / CODES
        return file if self.folder.name == STAGE and file.is_file() else None

    def renderer(self, size: tuple[int, int] | None = None) -> Renderer:
        """For pictures of ``size`` (height, width); default: the run's ``INPUT.SIZE_TEST``.

        Raises:
            DataError: The generator cannot hold the size.
        """
        height, width = self.cfg.INPUT.SIZE_TEST if size is None else size
        return Renderer(
            self.networks,
            mean=self.cfg.MODEL.PIXEL_MEAN,
            std=self.cfg.MODEL.PIXEL_STD,
            size=(int(height), int(width)),
        )

    def degradation(self, mix: str) -> Degrade:
        """What a mix such as ``res`` or ``ill+noise_0.5`` does; with the run's own text, as in its training."""
        cfg = self.cfg.clone()
        cfg.DIL.PAIRS.MIX = mix
        return degradation_of(cfg)


def load_run(path: Path) -> Stage1Run:
    """The stage 1 in a recipe's folder, in the folder of one training, or in one of its checkpoints.

    Args:
        path: Any of these; ``config.yaml`` must lie beside the checkpoint.

    Raises:
        DataError: There is no stage 1.
        CheckpointError: The checkpoint is of another architecture, stage or size.
    """
    from fastreid.config import get_cfg

    candidates = [path / STAGE / CHECKPOINT, path / CHECKPOINT] if path.is_dir() else [path]
    checkpoint = next((file for file in candidates if file.is_file()), None)
    if checkpoint is None or not (checkpoint.parent / CONFIG).is_file():
        raise DataError(
            "Run of DIL's stage 1",
            value=str(path),
            expected=f"the folder of a recipe with {STAGE}/{CHECKPOINT}, or one with {CHECKPOINT} and {CONFIG}",
            remedy="Train one: python tools/train_net.py --config-file projects/DIL/demo.yml --stage stage1",
        )
    weights = read_stage1(checkpoint)
    cfg = get_cfg()
    cfg.merge_from_file(str(checkpoint.parent / CONFIG))
    cfg.MODEL.HEADS.NUM_CLASSES = classes_of(weights)
    networks = build_networks(cfg)
    load_parts(networks, weights, str(checkpoint))
    device = cfg.MODEL.DEVICE if torch.cuda.is_available() else "cpu"
    for network in networks:
        network.to(device)
    return Stage1Run(cfg, checkpoint, networks)


def draw_items(run: Stage1Run, count: int, *, seed: int, best: float = 1.0, trained_on: bool = False) -> list[Item]:
    """Images of the run's data: queries of its first data set with a test part, otherwise training images.

    Args:
        run: Images of its ``DIL.PAIRS.DEGRADED_CAMERAS`` are left out.
        count: How many, at most.
        seed: Of the draw.
        best: Share of the drawn images that is kept, those of the highest quality; above 0, at most 1.
        trained_on: Images of the first training set in any case.

    Raises:
        DataError: There are no images.
    """
    cfg = run.cfg
    name, items = _training_items(cfg) if trained_on else _items(cfg)
    degraded = set(cfg.DIL.PAIRS.DEGRADED_CAMERAS)
    if degraded:
        items = [item for item in items if camera_number(item[2]) not in degraded]
    if not items:
        raise DataError("Images of the run that count as clean", value=0, expected="at least one; name images instead")
    order = numpy_stream(seed, "dil pictures").permutation(len(items))
    drawn = [items[place] for place in order[: round(count / best)]]
    if best < 1:
        quality, _ = image_quality(cfg, name, [path for path, _, _ in drawn])
        kept = np.sort(np.argsort(-quality, kind="stable")[: max(1, round(best * len(drawn)))])
        drawn = [drawn[place] for place in kept]
    return drawn


def read_pictures(paths: Sequence[str]) -> list[Picture]:
    """Images as arrays.

    Raises:
        DataError: One cannot be decoded.
    """
    return [np.asarray(read_rgb(path), dtype=np.uint8) for path in paths]


def image_paths(named: Sequence[Path]) -> list[Path]:
    """Files as they are, and all images below folders.

    Raises:
        DataError: There is no image.
    """
    found = [file for path in named for file in (image_files(path) if path.is_dir() else [path])]
    missing = [str(path) for path in found if not path.is_file()]
    if missing or not found:
        raise DataError(
            "Images",
            value=missing[0] if missing else [str(path) for path in named],
            expected="image files, or folders with images below them",
        )
    return found


def _items(cfg: Any) -> tuple[str, list[Item]]:
    name = [*cfg.DATASETS.TESTS, *cfg.DATASETS.NAMES][0]
    try:
        return name, test_set(cfg, name)[1]
    except DataError as error:
        logger.info("No held-out images, so training images are shown: %s", error)
        return _training_items(cfg)


def _training_items(cfg: Any) -> tuple[str, list[Item]]:
    return cfg.DATASETS.NAMES[0], training_set(cfg, cfg.DATASETS.NAMES[0])[1]
