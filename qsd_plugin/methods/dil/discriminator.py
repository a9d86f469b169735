"""The discriminators: is it a real image, and how clean does it look.

Shapes: B images, H x W pixels, S scales. Source: Huang et al., CVPR 2020.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.dil.cheap import channels_last
from qsd_plugin.methods.dil.layers import ConvLayer

_RESIDUAL_BLOCKS = 4
#: Standard deviation of the authors' initial weights, and the width it is for.
_STD, _WIDTH = 0.02, 32


class ResidualConvs(nn.Module):
    """``x + conv(lrelu(conv(x)))``.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(
            ConvLayer(channels, channels, 3, activation="lrelu"), ConvLayer(channels, channels, 3)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        out: Tensor = x + self.model(x)
        return out


class MultiScaleDiscriminator(nn.Module):
    """A convolutional network per scale, each on an image half as large as the one before.

    Args:
        scales: S; the authors' have 3 for real or not, and for the degradation 1 where it is resolution, otherwise 3.
        width: Channels of the first layers; the last ones have twice as many. Initial weights are normal, with the
            authors' deviation of 0.02 times the root of 32 / width: a layer's output then has the scale it has in their
            network. With 0.02, a narrow network's gradients are so small that weight decay turns it off.

    Raises:
        ConfigError: Not at least one scale; on call, images too small for the last scale.
    """

    def __init__(self, scales: int = 3, *, width: int = 32) -> None:
        super().__init__()
        if scales < 1:
            raise ConfigError("DIL discriminator scales", value=scales, expected="at least 1")
        self.nets = nn.ModuleList(_network(width) for _ in range(scales))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=_STD * math.sqrt(_WIDTH / width))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Images [B, 3, H, W] to a map of scores per scale s, [B, 1, H / 2**(s + 2), W / 2**(s + 2)]; not bounded."""
        smallest = 2 ** (len(self.nets) + 1)
        if min(images.shape[-2:]) <= smallest:
            raise ConfigError(
                f"DIL discriminator of {len(self.nets)} scales: image size",
                value=tuple(images.shape[-2:]),
                expected=f"more than {smallest} pixels",
            )
        maps = []
        images = channels_last(images)
        for number, network in enumerate(self.nets):
            if number:
                images = F.avg_pool2d(images, 3, stride=2, padding=1, count_include_pad=False)
            maps.append(network(images))
        return maps


def _network(width: int) -> nn.Sequential:
    return nn.Sequential(
        ConvLayer(3, width, 1, activation="lrelu"),
        ConvLayer(width, width, 3, bias=False, activation="lrelu"),
        ConvLayer(width, width, 3, stride=2, bias=False, activation="lrelu"),
        ConvLayer(width, width, 3, bias=False, activation="lrelu"),
        ConvLayer(width, 2 * width, 3, stride=2, bias=False, activation="lrelu"),
        *(ResidualConvs(2 * width) for _ in range(_RESIDUAL_BLOCKS)),
        nn.Conv2d(2 * width, 1, 1),
    )
