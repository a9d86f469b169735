"""A tiny QGFace model inside fast-reid, its batches of two views, and the same step made of the pure parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from qud_toy import FACE, build, sgd, step, train
from torch import Tensor, nn
from toy import toy_cfg

from qsd_plugin.methods.qgface import ProxyQueue, QGContrast, QGFaceHead, unit_and_norm

__all__ = ["build", "sgd", "step", "train"]

ROWS, CLASSES, DIM = 6, 7, 16


def qgface_cfg(folder: Path, **overrides: Any) -> Any:
    """An IResNet of a sixteenth of its width at 32x32, batches of 6 images; the host would have found 7 identities."""
    options = {
        **FACE,
        "MODEL.META_ARCHITECTURE": "QGFace",
        "MODEL.BACKBONE.NAME": "build_iresnet_backbone",
        "MODEL.BACKBONE.DEPTH": "18x",
        "MODEL.BACKBONE.FEAT_DIM": DIM,
        "MODEL.HEADS.NAME": "QGFaceHead",
        "MODEL.HEADS.NUM_CLASSES": CLASSES,
        "MODEL.HEADS.SCALE": 24,
        "MODEL.HEADS.MARGIN": 0.4,
        "MODEL.LOSSES.NAME": ("CrossEntropyLoss",),
        "INPUT.SIZE_TRAIN": [32, 32],
        "INPUT.SIZE_TEST": [32, 32],
        "SOLVER.IMS_PER_BATCH": ROWS,
        "QGFACE.VIEWS.MODE": "pair",
        "QGFACE.THRESHOLD": 0.4,
        "QGFACE.MOMENTUM": 0.2,
        "QGFACE.CONTRAST.QUEUE_SIZE": 40,
        "SEED": 3,
        **overrides,
    }
    return toy_cfg(folder / "out", **options)


def batch(index: int = 0, rows: int = ROWS, size: tuple[int, int] = (32, 32)) -> dict[str, Any]:
    """Clean views, and darker, blurred ones, some very much so."""
    generator = torch.Generator().manual_seed(200 + index)
    images = torch.rand(rows, 3, *size, generator=generator) * 255
    blurred = nn.functional.avg_pool2d(images, 5, 1, 2) * torch.linspace(0.1, 1, rows)[:, None, None, None]
    return {
        "images": images,
        "degraded_images": blurred,
        "targets": (torch.arange(rows) + index) % CLASSES,
        "camids": torch.zeros(rows, dtype=torch.int64),
        "img_paths": [f"{index}_{row}.jpg" for row in range(rows)],
    }


def copied(inputs: dict[str, Any]) -> dict[str, Any]:
    """The host normalises images in place."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in inputs.items()}


class Formula(nn.Module):
    """QGFace from the pure parts on the encoder of a built host model.

    Args:
        model: Its backbone is used, its class centres are copied.
        contrast: Of the contrastive branch.
        head: Of the classification head.
    """

    def __init__(self, model: Any, contrast: QGContrast, *, head: dict[str, Any], queue: dict[str, Any]) -> None:
        super().__init__()
        self.encoder = model.backbone
        self.mean, self.std = model.pixel_mean, model.pixel_std
        self.head = QGFaceHead(DIM, CLASSES, **head)
        with torch.no_grad():
            self.head.weight.copy_(model.heads.weight)
        self.queue, self.contrast = ProxyQueue(dim=DIM, **queue), contrast

    def forward(self, inputs: dict[str, Any]) -> dict[str, Tensor]:
        """The losses of a step by the host's names."""
        labels = inputs["targets"]
        images = torch.cat([inputs["images"], inputs["degraded_images"]])
        unit, norm = unit_and_norm(self.encoder((images - self.mean) / self.std).flatten(1))
        classified = self.head(unit, norm, labels.repeat(2))
        clean, poor = unit.chunk(2)
        clean_scaler, poor_scaler = classified.scaler.chunk(2)
        weight = self.head.weight if self.queue.compensate else None
        own = self.queue.enqueue(torch.stack([clean, poor]), labels, weight)
        negatives = self.queue.negatives(weight)
        contrasted = self.contrast(poor, clean, negatives, labels, poor_scaler, clean_scaler, own)
        return {"loss_cls": classified.loss, "loss_qgface": contrasted.loss}
