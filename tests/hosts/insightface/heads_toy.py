"""A head on the tree's PartialFC that is the same for any number of ranks, and what a network would give it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from qsd_plugin.hosts.insightface.heads import build_head
from qsd_plugin.hosts.insightface.option_checks import read_options
from qsd_plugin.hosts.insightface.wrappers import TrainingOutput

IMAGES, DIM, CLASSES = 8, 6, 5
TEACHER = {"teacher": {"network": "r18", "weights": "x.pt"}, "queue_size": 40}


def values(*shape: int, shift: float = 0.0) -> Tensor:
    count = math.prod(shape)
    return torch.sin(torch.arange(count, dtype=torch.float32) * 1.7 + shift).reshape(shape) * 3


def labels() -> Tensor:
    return torch.arange(IMAGES) % CLASSES


def output(views: int, rows: slice = slice(None)) -> TrainingOutput:
    """Embeddings, two levels and a teacher's embeddings of some images."""

    def part(tensor: Tensor) -> Tensor:
        return tensor.view(views, IMAGES, *tensor.shape[1:])[:, rows].flatten(0, 1)

    embedding = part(values(views * IMAGES, DIM)).clone().requires_grad_()
    maps = part(values(views * IMAGES, 3, 4, 4, shift=0.4)).clone().requires_grad_()
    taps = {"layer4": maps, "embedding": embedding}
    return TrainingOutput(embedding, taps, part(values(views * IMAGES, DIM, shift=2.0)))


def make_head(given: dict[str, Any], batch: int = IMAGES, **config: Any) -> Any:
    """A head whose class rows are the same for any number of ranks."""
    from losses import CombinedMarginLoss
    from partial_fc_v2 import PartialFC_V2

    whole = {"batch_size": batch, "seed": 1, "qsd_plugin": given, **config}
    margin = CombinedMarginLoss(64, 1.0, 0.5, 0.0, 0)
    levels = {"layer4": 1.0, "embedding": 0.5}
    head: Any = build_head(PartialFC_V2, read_options(whole), whole, levels, (margin, DIM, CLASSES, 1.0, False))
    head.train()
    if hasattr(head, "weight"):
        with torch.no_grad():
            head.weight.copy_(rows()[head.class_start : head.class_start + head.num_local])
    return head


def rows() -> Tensor:
    return values(CLASSES, DIM, shift=1.0)


def gradients(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))
