"""A tiny QUD model inside fast-reid: a face student and a face teacher of another kind, 16 numbers each."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.transforms.functional import InterpolationMode, resize
from toy import toy_cfg

FACE = {
    "MODEL.HEADS.POOL_LAYER": "Identity",
    "MODEL.HEADS.WITH_BNNECK": False,
    "MODEL.BACKBONE.WIDTH": 0.0625,
}
STUDENT = {
    **FACE,
    "MODEL.BACKBONE.NAME": "build_mobilefacenet_backbone",
    "MODEL.BACKBONE.DEPTH": "qud",
    "MODEL.BACKBONE.FEAT_DIM": 16,
    "INPUT.SIZE_TRAIN": [32, 32],
    "INPUT.SIZE_TEST": [32, 32],
}
#: Another network, size and normalisation.
TEACHER = {
    **FACE,
    "MODEL.BACKBONE.NAME": "build_iresnet_backbone",
    "MODEL.BACKBONE.DEPTH": "18x",
    "MODEL.BACKBONE.FEAT_DIM": 16,
    "MODEL.PIXEL_MEAN": [120.0, 110.0, 100.0],
    "MODEL.PIXEL_STD": [60.0, 50.0, 40.0],
    "INPUT.SIZE_TRAIN": [48, 48],
    "INPUT.SIZE_TEST": [48, 48],
}
ROWS = 8


def write_teacher(folder: Path, *, extra: dict[str, Tensor] | None = None, **overrides: Any) -> nn.Module:
    """A plain network in eval mode, with ``folder/teacher.yaml`` and ``teacher.pth`` as a training of 7 classes leaves.

    Args:
        folder: Where to.
        extra: More entries of the checkpoint.
        overrides: Of its config.
    """
    cfg = toy_cfg(folder, **{**TEACHER, "MODEL.HEADS.NUM_CLASSES": 7, **overrides})
    network = build(cfg, seed=11).eval()
    generator = torch.Generator().manual_seed(12)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):  # else all embeddings are much the same
            module.running_mean.normal_(0, 0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
    (folder / "teacher.yaml").write_text(cfg.dump())
    torch.save({"model": network.state_dict() | (extra or {})}, folder / "teacher.pth")
    return network


def qud_cfg(folder: Path, **overrides: Any) -> Any:
    """A tiny QUD config whose teacher lies in ``folder``; the host would have found 7 identities."""
    options = {
        **STUDENT,
        "MODEL.META_ARCHITECTURE": "QUD",
        "MODEL.HEADS.NUM_CLASSES": 7,
        "KD.MODEL_CONFIG": [str(folder / "teacher.yaml")],
        "KD.MODEL_WEIGHTS": [str(folder / "teacher.pth")],
        "SOLVER.IMS_PER_BATCH": ROWS,
        "QUD.QUEUE_SIZE": 20,
        "SEED": 3,
        **overrides,
    }
    return toy_cfg(folder / "out", **options)


def build(cfg: Any, seed: int = 0) -> Any:
    from fastreid.modeling.meta_arch.build import build_model

    torch.manual_seed(seed)
    return build_model(cfg).train()


def plain_of(model: Any, cfg: Any) -> Any:
    """The base architecture with the model's weights."""
    own = cfg.clone()
    own.MODEL.META_ARCHITECTURE = cfg.QUD.BASE
    own.MODEL.HEADS.NUM_CLASSES = len(model.heads.weight)
    plain = build(own, seed=99)
    state = model.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    return plain


def batch(index: int = 0, rows: int = ROWS, size: tuple[int, int] = (32, 32)) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(100 + index)
    return {
        "images": torch.rand(rows, 3, *size, generator=generator) * 255,
        "targets": torch.arange(rows) % 7,
        "camids": torch.zeros(rows, dtype=torch.int64),
        "img_paths": [f"{index}_{row}.jpg" for row in range(rows)],
    }


def step(model: Any, inputs: dict[str, Any]) -> dict[str, Tensor]:
    from fastreid.utils.events import EventStorage

    with EventStorage(0):
        losses: dict[str, Tensor] = model(inputs)
        return losses


def sgd(model: Any) -> torch.optim.SGD:
    return torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05, momentum=0.9)


def train(model: Any, optimizer: Any, batches: list[dict[str, Any]]) -> list[float]:
    """The loss of every step."""
    curve = []
    for inputs in batches:
        optimizer.zero_grad()
        loss = sum(step(model, inputs).values())
        loss.backward()
        optimizer.step()
        curve.append(loss.item())
    return curve


def teacher_embedding(teacher: Any, images: Tensor) -> Tensor:
    """By the host's own evaluation of the teacher."""
    size = [48, 48]
    shown = resize(images, size, InterpolationMode.BICUBIC, antialias=True).clamp(0, 255)
    with torch.no_grad():
        return F.normalize(teacher({"images": shown}))


def student_embedding(plain: Any, images: Tensor) -> Tensor:
    """Layer by layer, as in a training step of the host."""
    pooled = plain.heads.pool_layer(plain.backbone((images - plain.pixel_mean) / plain.pixel_std))
    return plain.heads.bottleneck(pooled)[..., 0, 0]


def logits(student: Tensor, teacher: Tensor, queue: Tensor) -> tuple[Tensor, Tensor]:
    """Cosines with the row's own teacher embedding in front of those with the queue: the student's, the teacher's."""
    cosines = [torch.cat([(rows * teacher).sum(1, keepdim=True), rows @ queue.T], 1) for rows in (student, teacher)]
    return cosines[0], cosines[1]


def qud(student: Tensor, teacher: Tensor, queue: Tensor) -> Tensor:
    return F.cross_entropy(logits(student, teacher, queue)[0] / 0.1, torch.zeros(len(student), dtype=torch.int64))
