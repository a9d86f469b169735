"""Models with ``AdaFaceHead`` or ``QGFaceHead`` inside fast-reid, and batches whose images have norms far apart.

The host must be activated.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from toy import toy_cfg

from qsd_plugin.core.streams import torch_stream

TARGETS = torch.tensor([0, 1, 2, 3, 4, 4, 2, 0])


def head_cfg(head: str, folder: Path, **overrides: Any) -> Any:
    options = {
        "MODEL.HEADS.NAME": head,
        "MODEL.HEADS.NUM_CLASSES": 5,
        "MODEL.HEADS.SCALE": 16,
        "MODEL.HEADS.MARGIN": 0.3,
        "QGFACE.MOMENTUM": 0.2,
        **overrides,
    }
    return toy_cfg(folder, **options)


def build(cfg: Any) -> Any:
    from fastreid.modeling.meta_arch import build_model

    torch.manual_seed(0)
    return build_model(cfg)


def small(cfg: Any) -> Any:
    """The model of a config with two layers as backbone."""
    model = build(cfg)
    model.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4), nn.ReLU(), nn.Conv2d(8, 512, 3, stride=2))
    return model


def batch(step: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Images from nearly grey to full contrast, whose features have norms far apart."""
    contrast = torch.linspace(0.01, 1, 8)[torch.randperm(8, generator=torch_stream(5, step))].view(8, 1, 1, 1)
    images = (torch.rand(8, 3, 64, 32, generator=torch_stream(6, step)) - 0.5) * 255 * contrast + 127.5
    return {"images": images.to(dtype), "targets": TARGETS.clone()}


def step_losses(model: Any, step: int = 0) -> dict[str, torch.Tensor]:
    from fastreid.utils.events import EventStorage

    with EventStorage(step):
        terms: dict[str, torch.Tensor] = model(batch(step, model.pixel_mean.dtype))
        return terms
