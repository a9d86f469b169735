"""IResNet, the residual network of ArcFace, under arcface_torch's names, so that its published weights load strictly.

Shapes: B images, C channels, H x W grid, D embedding. QUD's teachers (``resnet18``, ``resnet50``, ``resnet100``) are
these networks with these names.
Source: Deng et al., "ArcFace", CVPR 2019 (Section 3.1); He et al., "Identity Mappings", ECCV 2016; Duta et al.,
"Improved Residual Networks", ICPR 2020.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Concatenate, ParamSpec

import torch
from torch import Tensor, nn

from qsd_plugin.networks.face_shapes import InputSize, base_channels, grid, height_width, require_size

_P = ParamSpec("_P")

#: Residual blocks of the four stages by depth.
IRESNET_BLOCKS: Mapping[int, tuple[int, int, int, int]] = {
    18: (2, 2, 2, 2),
    34: (3, 4, 6, 3),
    50: (3, 4, 14, 3),
    100: (3, 13, 30, 3),
    200: (6, 26, 60, 6),
}


class IBasicBlock(nn.Module):
    """Pre-activation block BN, 3x3, BN, PReLU, 3x3, BN with the stride in the second kernel and no activation behind.

    Args:
        in_channels: Channels of the input.
        channels: Channels of the output.
        stride: 1 or 2; 2 brings a projection on the shortcut.
    """

    def __init__(self, in_channels: int, channels: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            shortcut = nn.Conv2d(in_channels, channels, 1, stride, bias=False)
            self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, channels, H / stride, W / stride]."""
        out = self.prelu(self.bn2(self.conv1(self.bn1(x))))
        out = self.bn3(self.conv2(out))
        total: Tensor = out + (x if self.downsample is None else self.downsample(x))
        return total


class IResNet(nn.Module):
    """IResNet of any depth, width and input size.

    ``layer1`` to ``layer4`` return the maps of the stages, [B, C, 56, 56] to [B, 8 C, 7, 7] for 112 pixels; the
    embedding is the output of ``features``, a batch norm whose scale is frozen at 1. The layers from the flattened map
    on compute in the precision of their parameters, outside autocast. Across ranks: plain; batch norms are converted
    with ``torch.nn.SyncBatchNorm.convert_sync_batchnorm``.

    Args:
        blocks: Residual blocks of the four stages, see :data:`IRESNET_BLOCKS`.
        embedding_dim: D.
        input_size: Pixels, or (height, width); only the size of ``fc`` depends on it.
        width: Factor on all channels but D: 1 is the published network.
        dropout: Probability in front of ``fc``, in [0, 1).

    Raises:
        ConfigError: An impossible width or size; in forward, images of another size.
    """

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        embedding_dim: int = 512,
        input_size: InputSize = 112,
        width: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.input_size = height_width(input_size)
        channels = base_channels(width)
        self.conv1 = nn.Conv2d(3, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.prelu = nn.PReLU(channels)
        first, second, third, fourth = blocks
        self.layer1 = _stage(channels, channels, first)
        self.layer2 = _stage(channels, 2 * channels, second)
        self.layer3 = _stage(2 * channels, 4 * channels, third)
        self.layer4 = _stage(4 * channels, 8 * channels, fourth)
        self.bn2 = nn.BatchNorm2d(8 * channels)
        self.dropout = nn.Dropout(dropout)
        rows, columns = grid(self.input_size)
        self.fc = nn.Linear(8 * channels * rows * columns, embedding_dim)
        self.features = nn.BatchNorm1d(embedding_dim)
        self.features.weight.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.1)

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], RGB, -1 to 1, to embeddings [B, D], not normalised."""
        require_size(x, self.input_size)
        x = self.prelu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        x = self.dropout(self.bn2(x).flatten(1))
        with torch.autocast(x.device.type, enabled=False):
            embedding: Tensor = self.features(self.fc(x.to(self.fc.weight.dtype)))
        return embedding


def iresnet(
    depth: int, embedding_dim: int = 512, *, width: float = 1.0, input_size: InputSize = 112, dropout: float = 0.0
) -> IResNet:
    """The published network of a depth in :data:`IRESNET_BLOCKS`. Arguments as for :class:`IResNet`."""
    return IResNet(
        IRESNET_BLOCKS[depth], embedding_dim=embedding_dim, width=width, input_size=input_size, dropout=dropout
    )


def _of_depth(build: Callable[Concatenate[int, _P], IResNet], depth: int, summary: str) -> Callable[_P, IResNet]:
    """``build`` for one depth, under a name of its own, with the signature that is left."""

    def of_depth(*args: _P.args, **kwargs: _P.kwargs) -> IResNet:
        return build(depth, *args, **kwargs)

    left = inspect.signature(build)
    of_depth.__name__ = of_depth.__qualname__ = f"iresnet{depth}"
    of_depth.__doc__ = f"{summary} Arguments as for :class:`IResNet`."
    vars(of_depth)["__signature__"] = left.replace(parameters=list(left.parameters.values())[1:])
    return of_depth


iresnet18 = _of_depth(iresnet, 18, "arcface_torch's ``r18``, QUD's ``resnet18``: 24.0 M parameters.")
iresnet34 = _of_depth(iresnet, 34, "arcface_torch's ``r34``: 34.1 M parameters.")
iresnet50 = _of_depth(iresnet, 50, "arcface_torch's ``r50``, QUD's ``resnet50``: 43.6 M parameters.")
iresnet100 = _of_depth(iresnet, 100, "arcface_torch's ``r100``, QUD's ``resnet100``: 65.2 M parameters.")
iresnet200 = _of_depth(iresnet, 200, "arcface_torch's ``r200``: 118.8 M parameters.")


def _stage(in_channels: int, channels: int, blocks: int) -> nn.Sequential:
    first = IBasicBlock(in_channels, channels, stride=2)
    return nn.Sequential(first, *(IBasicBlock(channels, channels, stride=1) for _ in range(blocks - 1)))
