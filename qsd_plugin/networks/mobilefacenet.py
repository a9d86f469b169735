"""MobileFaceNet as arcface_torch has it (``mbf``, ``mbf_large``), under its names, so that its weights load strictly.

QUD's MobileFaceNet, with half the channels and names of its own, is in :mod:`qsd_plugin.networks.mobilefacenet_qud`.
Shapes: B images, C channels, H x W grid, D embedding.
Source: Chen et al., "MobileFaceNets", CCBR 2018; Sandler et al., "MobileNetV2", CVPR 2018 (inverted residuals).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qsd_plugin.networks.face_shapes import InputSize, base_channels, grid, height_width, require_size


class ConvBlock(nn.Module):
    """Convolution and batch norm, with a PReLU per channel behind unless ``linear``."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        kernel: int | tuple[int, int] = 1,
        *,
        stride: int = 1,
        padding: int = 0,
        groups: int = 1,
        linear: bool = False,
    ) -> None:
        super().__init__()
        convolution = nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False)
        activation = [] if linear else [nn.PReLU(channels)]
        self.layers = nn.Sequential(convolution, nn.BatchNorm2d(channels), *activation)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H', W']."""
        out: Tensor = self.layers(x)
        return out


class DepthWise(nn.Module):
    """Inverted block: 1x1 to ``expanded`` channels, depthwise 3x3, linear 1x1; a shortcut with ``residual`` only."""

    def __init__(
        self, in_channels: int, channels: int, expanded: int, *, stride: int = 1, residual: bool = False
    ) -> None:
        super().__init__()
        self.residual = residual
        self.layers = nn.Sequential(
            ConvBlock(in_channels, expanded),
            ConvBlock(expanded, expanded, 3, stride=stride, padding=1, groups=expanded),
            ConvBlock(expanded, channels, linear=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        out: Tensor = self.layers(x)
        return x + out if self.residual else out


class Residuals(nn.Module):
    """``count`` inverted residuals with shortcuts, one behind the other."""

    def __init__(self, channels: int, expanded: int, count: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(DepthWise(channels, channels, expanded, residual=True) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        """[B, channels, H, W] to the same shape."""
        out: Tensor = self.layers(x)
        return out


class GlobalDepthWise(nn.Module):
    """Pooling with learnt weights per position and channel, a linear layer and a batch norm: [B, C, H, W] to [B, D]."""

    def __init__(self, channels: int, embedding_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            ConvBlock(channels, channels, size, groups=channels, linear=True),
            nn.Flatten(),
            nn.Linear(channels, embedding_dim, bias=False),
            nn.BatchNorm1d(embedding_dim),
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, *size] to [B, D]."""
        out: Tensor = self.layers(x)
        return out


class MobileFaceNet(nn.Module):
    """MobileFaceNet of any width and input size.

    ``layers.1``, ``layers.3``, ``layers.5`` and ``conv_sep`` return the last maps of the four resolutions, 56 x 56 to
    7 x 7 for 112 pixels; the embedding is the output of ``features``. From ``conv_sep`` on it computes in the precision
    of its parameters, outside autocast. Across ranks: plain.

    Args:
        blocks: Residual blocks at the four resolutions; 1 at the first is a plain 3x3 block in 64 groups instead.
        scale: Factor on the narrow ends of the blocks, not on their expanded middles.
        embedding_dim: D.
        input_size: Pixels, or (height, width); only the kernel that pools depends on it.
        width: Factor on all channels but D: 1 is the published network.

    Raises:
        ConfigError: An impossible width or size; in forward, images of another size.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (1, 4, 6, 2),
        scale: int = 2,
        embedding_dim: int = 512,
        input_size: InputSize = 112,
        width: float = 1.0,
    ) -> None:
        super().__init__()
        self.input_size = height_width(input_size)
        base = base_channels(width)
        narrow, wide, pooled = base * scale, 2 * base * scale, 8 * base
        first: nn.Module
        if blocks[0] == 1:
            first = ConvBlock(narrow, narrow, 3, padding=1, groups=base)
        else:
            first = Residuals(narrow, 2 * base, blocks[0])
        self.layers = nn.ModuleList(
            [
                ConvBlock(3, narrow, 3, stride=2, padding=1),
                first,
                DepthWise(narrow, narrow, 2 * base, stride=2),
                Residuals(narrow, 2 * base, blocks[1]),
                DepthWise(narrow, wide, 4 * base, stride=2),
                Residuals(wide, 4 * base, blocks[2]),
                DepthWise(wide, wide, 8 * base, stride=2),
                Residuals(wide, 4 * base, blocks[3]),
            ]
        )
        self.conv_sep = ConvBlock(wide, pooled)
        self.features = GlobalDepthWise(pooled, embedding_dim, grid(self.input_size))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB, -1 to 1, to embeddings [B, D], not normalised."""
        require_size(x, self.input_size)
        for layer in self.layers:
            x = layer(x)
        with torch.autocast(x.device.type, enabled=False):
            embedding: Tensor = self.features(self.conv_sep(x.to(next(self.conv_sep.parameters()).dtype)))
        return embedding


def mobilefacenet(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112) -> MobileFaceNet:
    """arcface_torch's ``mbf``: 2.06 M parameters. Arguments as for :class:`MobileFaceNet`."""
    return MobileFaceNet(embedding_dim=embedding_dim, width=width, input_size=input_size)


def mobilefacenet_large(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112) -> MobileFaceNet:
    """arcface_torch's ``mbf_large``: 6.31 M parameters. Arguments as for :class:`MobileFaceNet`."""
    return MobileFaceNet(blocks=(2, 8, 12, 4), scale=4, embedding_dim=embedding_dim, width=width, input_size=input_size)


def initialise(network: nn.Module) -> None:
    """He initialisation of kernels and linear layers, scaled by the fan out."""
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
