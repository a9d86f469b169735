"""A tiny QSD model inside fast-reid: two identities with eight images each, and their quality labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from toy import toy_cfg, use_market, write_market

from qsd_plugin.quality.labels import QualityLabels

LEVELS = ["backbone.layer2.1", "backbone.layer3.1", "backbone.layer4.1", "heads.bottleneck", "heads:pred_class_logits"]
IDENTITIES = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
QUALITY = torch.tensor([10.0, 80.0, 45.0, 60.0, 20.0, 25.0, 90.0, 30.0])
#: The first four images of each identity are anchors, the others their partners.
ANCHORS: list[str] = []
PARTNERS: list[str] = []


def use_images(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the images below ``folder`` and fill :data:`ANCHORS` and :data:`PARTNERS`."""
    root = write_market(folder, num_ids=2, per_id=8, test_ids=1)
    use_market(monkeypatch, root)
    images = sorted(map(str, root.glob("*/bounding_box_train/*.jpg")))
    ANCHORS[:] = [*images[:4], *images[8:12]]
    PARTNERS[:] = [*images[4:8], *images[12:]]


def qsd_cfg(folder: Path, *, spread: Any = None, **overrides: Any) -> Any:
    """A tiny QSD config with labels for anchors and partners."""
    keys = tuple(f"Market1501/bounding_box_train/{Path(path).name}" for path in [*ANCHORS, *PARTNERS])
    scores = np.concatenate([QUALITY.numpy(), 100 - QUALITY.numpy()]).astype(np.float64)
    spread = np.zeros(16) if spread is None else np.asarray(spread, dtype=np.float64)
    labels = QualityLabels(scores, scores, spread, keys, {"dataset": "Market1501", "scale": "minmax"})
    labels.save(folder / "labels.npz")
    options = {
        "MODEL.META_ARCHITECTURE": "QSD",
        "MODEL.HEADS.NUM_CLASSES": 2,
        "DATALOADER.SAMPLER_TRAIN": "NaiveIdentitySampler",
        "DATALOADER.NUM_INSTANCE": 4,
        "QUALITY.FILES": (str(folder / "labels.npz"),),
        "QUALITY.SCALE": "none",
        **overrides,
    }
    return toy_cfg(folder / "out", **options)


def build(cfg: Any, seed: int = 0) -> Any:
    from fastreid.modeling.meta_arch.build import build_model

    torch.manual_seed(seed)
    return build_model(cfg).train()


def batch() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(3)
    return {
        "images": torch.rand(8, 3, 64, 32, generator=generator) * 255,
        "targets": IDENTITIES.clone(),
        "camids": torch.zeros(8, dtype=torch.int64),
        "img_paths": list(ANCHORS),
    }


def with_partners() -> dict[str, Any]:
    images = torch.rand(8, 3, 64, 32, generator=torch.Generator().manual_seed(4)) * 255
    return {**batch(), "partner_images": images, "partner_paths": list(PARTNERS), "partner_valid": torch.ones(8)}


def step(model: Any, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
    from fastreid.utils.events import EventStorage

    with EventStorage(0):
        losses: dict[str, torch.Tensor] = model(inputs)
        return losses


def base_model(cfg: Any) -> Any:
    plain = cfg.clone()
    plain.defrost()
    plain.MODEL.META_ARCHITECTURE = "Baseline"
    return build(plain)
