"""A ResNet that returns the map behind every stage, for methods that read several scales.

Shapes: B images, H x W pixels. Source: He et al., "Deep Residual Learning for Image Recognition", CVPR 2016; the names
and the place of the stride are torchvision's, so that its weights fit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.networks.agw_resnet import Bottleneck, Norm


class BasicBlock(nn.Module):
    """Residual block of two 3x3 convolutions, with the stride in the first.

    Args:
        in_channels: Channels of the input.
        width: Channels of the output.
        stride: 1 or 2.
        norm: Makes the batch norms.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, width, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = norm(width)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != width:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, width, 1, stride, bias=False), norm(width))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, width, H / stride, W / stride]."""
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)), inplace=True)))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


#: Kinds of residual blocks: class, and how many times its width it returns.
BLOCKS: dict[str, tuple[type[BasicBlock] | type[Bottleneck], int]] = {
    "basic": (BasicBlock, 1),
    "bottleneck": (Bottleneck, 4),
}


class ResNetStages(nn.Module):
    """The stem and the stages of a ResNet without its pooling and classifier; the defaults are ResNet-50.

    Args:
        blocks: Residual blocks of each stage, one to four stages; ``(3, 4, 6)`` leaves out the last one.
        block: ``"bottleneck"``, or ``"basic"`` as in ResNet-18 and 34.
        width: Channels of the stem; stage s (from 0) returns 2**s x width channels, four times as many of bottlenecks.
        last_stride: Stride of the fourth stage, 1 or 2.
        norm: Makes the batch norms.

    Raises:
        ConfigError: Not one to four stages, or an unknown block.
    """

    channels: tuple[int, ...]
    """Of the maps that :meth:`forward` returns."""

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        block: str = "bottleneck",
        width: int = 64,
        last_stride: int = 2,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if not 1 <= len(blocks) <= 4 or min(blocks) < 1:
            raise ConfigError("ResNetStages blocks", value=tuple(blocks), expected="one to four numbers of at least 1")
        if block not in BLOCKS:
            raise ConfigError("ResNetStages block", value=block, remedy=did_you_mean(block, BLOCKS))
        make, expansion = BLOCKS[block]
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        channels = [width]
        for stage, count in enumerate(blocks):
            inner = width * 2**stage
            stride = (1, 2, 2, last_stride)[stage]
            first = make(channels[-1], inner, stride, norm)
            others = [make(inner * expansion, inner, 1, norm) for _ in range(count - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *others))
            channels.append(inner * expansion)
        self.channels = tuple(channels)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images [B, 3, H, W], normalised, to the stem's map [B, width, H / 2, W / 2] before its pooling and the map
        behind each stage, the first of them at H / 4."""
        maps = [F.relu(self.bn1(self.conv1(images)))]
        x = F.max_pool2d(maps[0], 3, stride=2, padding=1)
        for stage in range(1, len(self.channels)):
            x = self.get_submodule(f"layer{stage}")(x)
            maps.append(x)
        return tuple(maps)
