"""Augmentation by the number of the draw: mirror images that QSD pairs together, leave erasing to the training step.

Every draw depends on (seed, rank, number of the draw) only, so it is the same for any number of workers.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import numpy_stream, seeded_globals
from qsd_plugin.data.erasing import draw_box
from qsd_plugin.hosts.fastreid.compose import in_chain


@dataclass(frozen=True)
class PairViews:
    """What the plugin does in place of the host's transforms.

    Args:
        seed: Of all draws, >= 0.
        rank: Of this process.
        flip: Probability of mirroring; ``None``: the host's transforms decide for each image.
        batch: With in-batch pairs, the images per batch and process: an identity's images in a batch are mirrored
            together. 0 with partners: an anchor and its partner are.
        erase: Probability of erasing; ``None``: the host's transforms do it.
        seeded: Whether what the host's transforms draw is decided by the number of the draw, too.
    """

    seed: int
    rank: int
    flip: float | None = None
    batch: int = 0
    erase: float | None = None
    seeded: bool = False

    def mirrors(self, draw: int, identity: int) -> bool:
        """Whether an image is to be mirrored.

        Before the host's transforms, where it commutes with resizing and, in distribution, with padding and cropping.

        Args:
            draw: Number of the sampler's draw.
            identity: Class of the image.
        """
        if self.flip is None:
            return False
        path = (draw // self.batch, identity) if self.batch else (draw,)
        return bool(numpy_stream(self.seed, "pair flip", self.rank, *path).random() < self.flip)

    def transforming(self, draw: int, prefix: str) -> AbstractContextManager[None]:
        """To be entered around the host's transforms of one image, which draw from the global generators."""
        if not self.seeded:
            return nullcontext()
        return seeded_globals(self.seed, f"{prefix}transforms", self.rank, draw)

    def boxes(self, image: torch.Tensor, draw: int, prefix: str) -> dict[str, torch.Tensor]:
        """The sample's entry ``<prefix>erase_boxes`` [4] for an augmented image [C, H, W], if erasing is ours."""
        if self.erase is None:
            return {}
        stream = numpy_stream(self.seed, f"{prefix}erase", self.rank, draw)
        box = draw_box(stream, *image.shape[1:], probability=self.erase)
        return {f"{prefix}erase_boxes": torch.tensor(box)}


def pair_views(cfg: Any) -> PairViews | None:
    """What ``QSD.PAIR_FLIP`` and ``QSD.TEACHER_ERASE`` ask for, ``None`` if all is left to the host's transforms."""
    if not in_chain(cfg, "QSD"):
        return None
    flip = cfg.INPUT.FLIP.PROB if cfg.QSD.PAIR_FLIP == "shared" and cfg.INPUT.FLIP.ENABLED else None
    erase = cfg.INPUT.REA.PROB if not cfg.QSD.TEACHER_ERASE and cfg.INPUT.REA.ENABLED else None
    if flip is None and erase is None:
        return None
    batch = cfg.SOLVER.IMS_PER_BATCH // world_size() if cfg.QSD.PAIRING == "inbatch" else 0
    return PairViews(seed=max(cfg.SEED, 0), rank=rank(), flip=flip, batch=batch, erase=erase)


def host_transforms_config(cfg: Any, views: PairViews | None) -> Any:
    """``cfg`` for the host's ``build_transforms``, without what ``views`` does in its place."""
    if views is None:
        return cfg
    rest = cfg.clone()
    rest.defrost()
    rest.INPUT.FLIP.ENABLED = cfg.INPUT.FLIP.ENABLED and views.flip is None
    rest.INPUT.REA.ENABLED = cfg.INPUT.REA.ENABLED and views.erase is None
    return rest


def refuse_own_transforms() -> None:
    """Called when a script passes transforms of its own to the train loader while ``pair_views`` has work to do."""
    raise ConfigError(
        "QSD.PAIR_FLIP shared and QSD.TEACHER_ERASE False with transforms passed to build_reid_train_loader",
        expected="the transforms of INPUT.*, from which the plugin can take flips and erasing out",
        remedy="Leave the argument out, or set QSD.PAIR_FLIP independent and QSD.TEACHER_ERASE True.",
    )
