"""The five networks of stage 1 together, at the paper's size or scaled."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.dil.discriminator import MultiScaleDiscriminator
from qsd_plugin.methods.dil.encoders import ContentEncoder, DegradationEncoder
from qsd_plugin.methods.dil.generator import Generator
from qsd_plugin.networks.resnet_stages import ResNetStages


class Networks(NamedTuple):
    """What stage 1 trains."""

    content_encoder: ContentEncoder
    degradation_encoder: DegradationEncoder
    generator: Generator
    real_discriminator: MultiScaleDiscriminator
    """D_real: is it a real image."""
    degradation_discriminator: MultiScaleDiscriminator
    """D_deg: how clean does it look."""


def dil_networks(
    num_classes: int,
    *,
    trunk: nn.Module | None = None,
    width: float = 1.0,
    degradation_scales: int = 1,
    ln_scope: str = "sample",
    dropout: float = 0.5,
) -> Networks:
    """Stage 1's networks; the defaults are the paper's for low resolution.

    Args:
        num_classes: C.
        trunk: As :class:`~.encoders.ContentEncoder`; ``None`` for a ResNet-50 of ``width`` times its channels.
        width: Factor on all channels, > 0, of a trunk that is given excepted; they are rounded to multiples of 4.
        degradation_scales: Scales of D_deg: 1 where the degradation is resolution, otherwise 3.
        ln_scope: As :class:`~.layers.LayerNorm`.
        dropout: In front of the classifier.

    Raises:
        ConfigError: ``width`` is not positive.
    """
    if not width > 0:
        raise ConfigError("DIL width", value=width, expected="a number > 0")

    def scaled(channels: int) -> int:
        return max(4, round(channels * width / 4) * 4)

    content, code = scaled(128), scaled(128)
    return Networks(
        ContentEncoder(
            num_classes,
            trunk=ResNetStages(blocks=(3, 4, 6), width=scaled(64)) if trunk is None else trunk,
            content_dim=content,
            identity_dim=scaled(2048),
            embedding_dim=scaled(512),
            branch=scaled(32),
            scale_dim=scaled(64),
            dropout=dropout,
        ),
        DegradationEncoder(code_dim=code, width=scaled(64)),
        Generator(content_dim=content, code_dim=code, hidden=scaled(512), ln_scope=ln_scope),
        MultiScaleDiscriminator(3, width=scaled(32)),
        MultiScaleDiscriminator(degradation_scales, width=scaled(32)),
    )
