"""``MODEL.HEADS.NAME QGFaceHead`` (or ``AdaFaceHead``) with ``DILReID``: the joined feature is classified by that head.

It takes the place of the linear classifier of the joined feature in training. Evaluation does not need either.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.hosts.fastreid.meta_arch.dil_config import num_classes
from qsd_plugin.hosts.fastreid.quality_margin_heads import AdaFaceHead
from qsd_plugin.methods.dil import Stage2Options

#: What is left of the joined feature's losses.
_WITHOUT_CLASSIFIER = {"ce_tri": "tri", "ce": "none"}


def margin_head(cfg: Any, feature_dim: int) -> nn.Module | None:
    """The host head for features [B, ``feature_dim``], ``None`` where ``MODEL.HEADS.NAME`` is another one.

    Raises:
        ConfigError: Settings with which it cannot work.
    """
    from fastreid.modeling.heads.build import REID_HEADS_REGISTRY

    kind = REID_HEADS_REGISTRY.get(cfg.MODEL.HEADS.NAME)
    if not (isinstance(kind, type) and issubclass(kind, AdaFaceHead)):
        return None
    own = cfg.clone()
    own.defrost()
    own.MODEL.BACKBONE.FEAT_DIM = feature_dim
    own.MODEL.HEADS.POOL_LAYER = "Identity"
    own.MODEL.HEADS.NUM_CLASSES = num_classes(cfg)
    head: nn.Module = kind(own)
    return head


def without_classifier(options: Stage2Options) -> Stage2Options:
    """``options`` without the cross entropy that the head's takes the place of."""
    return replace(options, fuse_loss=_WITHOUT_CLASSIFIER.get(options.fuse_loss, options.fuse_loss))


def margin_loss(head: nn.Module, features: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of the head's logits, 0-d, for joined features [B, D] and labels [B] int64."""
    outputs = head(features[..., None, None], labels)
    return F.cross_entropy(outputs["cls_outputs"], labels)
