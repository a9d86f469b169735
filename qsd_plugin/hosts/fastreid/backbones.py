"""Backbones of the plugin under names of ``MODEL.BACKBONE.NAME``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.fastreid.compat.backbones import explained
from qsd_plugin.hosts.fastreid.compat.checkpoint_files import load_safely
from qsd_plugin.networks.agw_resnet import AGWResNet


def register_backbones() -> None:
    """Add ``build_agw_backbone`` to the host's registry."""
    from fastreid.modeling.backbones.build import BACKBONE_REGISTRY

    BACKBONE_REGISTRY.register(explained(build_agw_backbone))


def build_agw_backbone(cfg: Any) -> nn.Module:
    """AGW's ResNet-50 with non-local blocks, for the authors' weights.

    Reads ``MODEL.BACKBONE.{DEPTH, LAST_STRIDE, NORM, FEAT_DIM, PRETRAIN, PRETRAIN_PATH}``. ``FEAT_DIM`` is a setting
    here, not a mere statement: the network is FEAT_DIM / 2048 as wide as a ResNet-50. ``WITH_NL`` is not read.
    ``PRETRAIN`` takes torchvision's ImageNet weights, or a file with its names.

    Raises:
        ConfigError: Another depth, or a FEAT_DIM that is no multiple of 32.
    """
    from fastreid.layers import get_norm

    options = cfg.MODEL.BACKBONE
    if options.DEPTH != "50x":
        raise ConfigError("MODEL.BACKBONE.DEPTH", value=options.DEPTH, expected="50x for build_agw_backbone")
    if options.FEAT_DIM % 32 or options.FEAT_DIM <= 0:
        raise ConfigError(
            "MODEL.BACKBONE.FEAT_DIM", value=options.FEAT_DIM, expected="a multiple of 32; 2048 is a ResNet-50"
        )
    backbone = AGWResNet(
        width=options.FEAT_DIM // 32,
        last_stride=options.LAST_STRIDE,
        norm=lambda channels: get_norm(options.NORM, channels),
    )
    if options.PRETRAIN:
        weights = _imagenet_weights(options.PRETRAIN_PATH)
        own = backbone.state_dict()
        fitting = {name: value for name, value in weights.items() if name in own and value.shape == own[name].shape}
        backbone.load_state_dict(fitting, strict=False)
    return backbone


def _imagenet_weights(path: str) -> dict[str, torch.Tensor]:
    if path:
        content = load_safely(Path(path), title="MODEL.BACKBONE.PRETRAIN_PATH")
        weights: dict[str, torch.Tensor] = content.get("state_dict", content) if isinstance(content, dict) else {}
        return weights
    from torchvision.models import ResNet50_Weights

    downloaded: dict[str, torch.Tensor] = ResNet50_Weights.IMAGENET1K_V1.get_state_dict(progress=True)
    return downloaded
