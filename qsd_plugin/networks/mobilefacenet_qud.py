"""MobileFaceNet as QUD's students have it, under the names of their checkpoints.

It is the network of the MobileFaceNet paper; arcface_torch's, with twice the channels, is in
:mod:`qsd_plugin.networks.mobilefacenet`. Shapes: B images, C channels, H x W grid, D embedding.
Source: Chen et al., "MobileFaceNets", CCBR 2018.
"""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

from qsd_plugin.networks.face_shapes import InputSize, base_channels, grid, height_width, require_size
from qsd_plugin.networks.mobilefacenet import initialise


class MobileFaceNetQUD(nn.Module):
    """QUD's MobileFaceNet of any width and input size.

    ``conv2_dw``, ``conv_3``, ``conv_4`` and ``conv_6_sep`` return the last maps of the four resolutions, 56 x 56 to
    7 x 7 for 112 pixels; the embedding is the output of ``output_layer``, whose batch norm has neither scale nor shift.
    From ``conv_6_sep`` on it computes in the precision of its parameters, outside autocast. Across ranks: plain.

    Args:
        embedding_dim: D.
        input_size: Pixels, or (height, width); only the kernel that pools depends on it.
        width: Factor on all channels but D: 1 is the published network.

    Raises:
        ConfigError: An impossible width or size; in forward, images of another size.
    """

    def __init__(self, *, embedding_dim: int = 512, input_size: InputSize = 112, width: float = 1.0) -> None:
        super().__init__()
        self.input_size = height_width(input_size)
        c = base_channels(width)
        self.conv1 = _conv(3, c, 3, stride=2, padding=1)
        self.conv2_dw = _conv(c, c, 3, padding=1, groups=c)
        self.conv_23 = _InvertedBlock(c, c, 2 * c, stride=2)
        self.conv_3 = _Residuals(c, 2 * c, 4)
        self.conv_34 = _InvertedBlock(c, 2 * c, 4 * c, stride=2)
        self.conv_4 = _Residuals(2 * c, 4 * c, 6)
        self.conv_45 = _InvertedBlock(2 * c, 2 * c, 8 * c, stride=2)
        self.conv_5 = _Residuals(2 * c, 4 * c, 2)
        self.conv_6_sep = _conv(2 * c, 8 * c, 1)
        self.output_layer = _Pooling(8 * c, embedding_dim, grid(self.input_size))
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB, -1 to 1, to embeddings [B, D], not normalised."""
        require_size(x, self.input_size)
        x = self.conv2_dw(self.conv1(x))
        x = self.conv_3(self.conv_23(x))
        x = self.conv_4(self.conv_34(x))
        x = self.conv_5(self.conv_45(x))
        with torch.autocast(x.device.type, enabled=False):
            embedding: Tensor = self.output_layer(self.conv_6_sep(x.to(next(self.conv_6_sep.parameters()).dtype)))
        return embedding


def mobilefacenet_qud(embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112) -> MobileFaceNetQUD:
    """QUD's ``mobilefacenet``, the student of the paper: 1.20 M parameters. Arguments as for the class."""
    return MobileFaceNetQUD(embedding_dim=embedding_dim, width=width, input_size=input_size)


class _InvertedBlock(nn.Module):
    """1x1 to ``expanded`` channels, depthwise 3x3, linear 1x1."""

    def __init__(self, in_channels: int, channels: int, expanded: int, *, stride: int = 1) -> None:
        super().__init__()
        self.conv = _conv(in_channels, expanded, 1)
        self.conv_dw = _conv(expanded, expanded, 3, stride=stride, padding=1, groups=expanded)
        self.project = _conv(expanded, channels, 1, linear=True)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.project(self.conv_dw(self.conv(x)))
        return out


class _Residuals(nn.Module):
    def __init__(self, channels: int, expanded: int, count: int) -> None:
        super().__init__()
        self.model = nn.Sequential(*(_InvertedBlock(channels, channels, expanded) for _ in range(count)))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.model:
            x = x + block(x)
        return x


class _Pooling(nn.Module):
    def __init__(self, channels: int, embedding_dim: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.conv_6_dw = _conv(channels, channels, size, groups=channels, linear=True)
        self.linear = nn.Linear(channels, embedding_dim, bias=False)
        self.bn = nn.BatchNorm1d(embedding_dim, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.bn(self.linear(self.conv_6_dw(x).flatten(1)))
        return out


def _conv(
    in_channels: int,
    channels: int,
    kernel: int | tuple[int, int],
    *,
    stride: int = 1,
    padding: int = 0,
    groups: int = 1,
    linear: bool = False,
) -> nn.Sequential:
    """Convolution and batch norm, with a PReLU per channel behind unless ``linear``."""
    parts: OrderedDict[str, nn.Module] = OrderedDict(
        conv=nn.Conv2d(in_channels, channels, kernel, stride, padding, groups=groups, bias=False),
        bn=nn.BatchNorm2d(channels),
    )
    if not linear:
        parts["prelu"] = nn.PReLU(channels)
    return nn.Sequential(parts)
