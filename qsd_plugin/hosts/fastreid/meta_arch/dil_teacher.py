"""``MODEL.META_ARCHITECTURE: DILTeacher``: a plain ResNet for identities, whose last stage DIL's stage 2 takes over.

The authors' teacher was trained by another program; this one is ours, with the losses of the sensitive feature.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsd_plugin.hosts.fastreid.dil_files import start_trunk
from qsd_plugin.hosts.fastreid.meta_arch.dil_base import Batch, DILArchitecture, images_of
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import build_identity_encoder
from qsd_plugin.methods.dil.losses import identity_loss


class DILTeacher(DILArchitecture):
    """``loss_dil_teacher`` in training (``DIL.STAGE2_OPTIONS.SEN_LOSS``), otherwise the bottleneck's output [B, D].

    Dropout depends on (seed, rank, step), and the step is a buffer: a resumed training goes on exactly. Across ranks: a
    local mean, and the triplet as that of one process.

    Args:
        cfg: The host's config.

    Raises:
        ConfigError: Settings that cannot work.
        CheckpointError: The first weights are missing or of another network.
    """

    steps: Tensor
    """Training steps so far, 0-d int64."""

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.teacher = build_identity_encoder(cfg)
        start_trunk(cfg, self.teacher.model)
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._loss = str(cfg.DIL.STAGE2_OPTIONS.SEN_LOSS)

    def forward(self, batched_inputs: Batch) -> Any:
        """See the class; under ``no_grad`` no step is counted."""
        features = self.teacher(self.normalised(images_of(batched_inputs)))
        if not self.training:
            return self.teacher.classifier.embed(features)
        labels = batched_inputs["targets"].to(self.device)
        with self.repeatable("dil teacher", int(self.steps)):
            logits = self.teacher.classifier(features)
        if torch.is_grad_enabled():
            self.steps.add_(1)
        return self.reached({"loss_dil_teacher": identity_loss(logits, features, labels, self._loss)})
