"""``MODEL.META_ARCHITECTURE: DILTeacher``: a plain ResNet for identities, whose last stage DIL's stage 2 takes over.

The authors' teacher was trained by another program; this one is ours, with the losses of the sensitive feature.
"""

from __future__ import annotations

from typing import Any

from qsd_plugin.hosts.fastreid.dil_files import start_trunk
from qsd_plugin.hosts.fastreid.meta_arch.dil_base import Batch, DILArchitecture, Losses, images_of
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import build_identity_encoder
from qsd_plugin.methods.dil.losses import identity_loss


class DILTeacher(DILArchitecture):
    """``loss_dil_teacher`` in training (``DIL.STAGE2_OPTIONS.SEN_LOSS``), otherwise the bottleneck's output [B, D].

    Across ranks: a local mean.

    Args:
        cfg: The host's config.

    Raises:
        ConfigError: Settings that cannot work.
        CheckpointError: The first weights are missing or of another network.
    """

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)
        self.teacher = build_identity_encoder(cfg)
        start_trunk(cfg, self.teacher.model)
        self._loss = str(cfg.DIL.STAGE2_OPTIONS.SEN_LOSS)

    def forward(self, batched_inputs: Batch) -> Any:
        """See the class."""
        features = self.teacher(self.normalised(images_of(batched_inputs)))
        if not self.training:
            return self.teacher.classifier.embed(features)
        labels = batched_inputs["targets"].to(self.device)
        losses: Losses = {
            "loss_dil_teacher": identity_loss(self.teacher.classifier(features), features, labels, self._loss)
        }
        return losses
