"""The backbone of AGW and QSD as their authors trained it, so that their published weights can be used.

It differs from fast-reid's ResNet with non-local blocks in two places that the weights depend on: there is no ReLU
behind the first batch norm, and the first pooling pads instead of rounding up. Shapes: B batch, C channels, H x W grid.
Source: Ye et al., "Deep Learning for Person Re-Identification: A Survey and Outlook", TPAMI 2021; He et al., CVPR
2016; Wang et al., "Non-local Neural Networks", CVPR 2018.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError

Norm = Callable[[int], nn.Module]

_EXPANSION = 4


class NonLocal(nn.Module):
    """Residual non-local block, dot-product form with one inner channel: ``x + norm(W (theta (phi . g) / N))``.

    Attention is not normalised by a softmax but divided by the N = H W positions, so the N x N matrix of theirs need
    not be built: each position gets theta times one mean over the image. The norm's scale and shift start at 0, the
    block at the identity.

    Args:
        channels: C.
        norm: Makes the batch norm.
    """

    def __init__(self, channels: int, norm: Norm = nn.BatchNorm2d) -> None:
        super().__init__()
        self.g = nn.Conv2d(channels, 1, 1)
        self.theta = nn.Conv2d(channels, 1, 1)
        self.phi = nn.Conv2d(channels, 1, 1)
        self.W = nn.Sequential(nn.Conv2d(1, channels, 1), norm(channels))
        for parameter in self.W[1].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        gathered = (self.phi(x) * self.g(x)).mean(dim=(2, 3), keepdim=True)
        out: Tensor = x + self.W(self.theta(x) * gathered)
        return out


class Bottleneck(nn.Module):
    """Residual block 1x1, 3x3, 1x1 with the stride in the 3x3.

    Args:
        in_channels: Channels of the input.
        width: Channels inside; the output has four times as many.
        stride: 1 or 2.
        norm: Makes the batch norms.
    """

    def __init__(self, in_channels: int, width: int, stride: int, norm: Norm) -> None:
        super().__init__()
        channels = width * _EXPANSION
        self.conv1 = nn.Conv2d(in_channels, width, 1, bias=False)
        self.bn1 = norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(width)
        self.conv3 = nn.Conv2d(width, channels, 1, bias=False)
        self.bn3 = norm(channels)
        self.downsample: nn.Module | None = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(nn.Conv2d(in_channels, channels, 1, stride, bias=False), norm(channels))

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, 4 width, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        return F.relu(out + (x if self.downsample is None else self.downsample(x)), inplace=True)


class AGWResNet(nn.Module):
    """ResNet with non-local blocks behind the last blocks of its stages; the defaults are AGW's ResNet-50.

    State-dict keys are those behind ``base.`` in the authors' checkpoints. Across ranks: plain (a synchronised batch
    norm can be passed as ``norm``).

    Args:
        blocks: Residual blocks of the four stages.
        non_local: Non-local blocks of the four stages, each behind one of the stage's last residual blocks.
        width: Channels of the stem; stage s returns 4 x 2**s x width channels.
        last_stride: Stride of stage 4, 1 or 2.
        norm: Makes the batch norms.

    Raises:
        ConfigError: A stage has fewer residual than non-local blocks, or a stage count is not four.
    """

    def __init__(
        self,
        *,
        blocks: Sequence[int] = (3, 4, 6, 3),
        non_local: Sequence[int] = (0, 2, 3, 0),
        width: int = 64,
        last_stride: int = 1,
        norm: Norm = nn.BatchNorm2d,
    ) -> None:
        super().__init__()
        if len(blocks) != 4 or len(non_local) != 4 or any(n > b for n, b in zip(non_local, blocks, strict=True)):
            raise ConfigError(
                "AGWResNet blocks and non-local blocks",
                value=(tuple(blocks), tuple(non_local)),
                expected="four numbers each, of non-local blocks no more than of blocks",
            )
        self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.bn1 = norm(width)
        in_channels = width
        for stage, (count, stride) in enumerate(zip(blocks, (1, 2, 2, last_stride), strict=True)):
            inner = width * 2**stage
            first = Bottleneck(in_channels, inner, stride, norm)
            in_channels = inner * _EXPANSION
            others = [Bottleneck(in_channels, inner, 1, norm) for _ in range(count - 1)]
            setattr(self, f"layer{stage + 1}", nn.Sequential(first, *others))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        # After the initialisation, which is for residual blocks.
        for stage, count in enumerate(non_local):
            channels = width * 2**stage * _EXPANSION
            setattr(self, f"NL_{stage + 1}", nn.ModuleList(NonLocal(channels, norm) for _ in range(count)))
        self.num_features = in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, 3, H, W], normalised, to maps [B, 32 width, H / 16, W / 16] (with ``last_stride`` 1)."""
        x = F.max_pool2d(self.bn1(self.conv1(x)), 3, stride=2, padding=1)
        for stage in range(1, 5):
            blocks, non_local = self.get_submodule(f"layer{stage}"), self.get_submodule(f"NL_{stage}")
            x = _run_stage(x, list(blocks.children()), list(non_local.children()))
        return x


def _run_stage(x: Tensor, blocks: list[nn.Module], non_local: list[nn.Module]) -> Tensor:
    first = len(blocks) - len(non_local)
    for index, block in enumerate(blocks):
        x = block(x)
        if index >= first:
            x = non_local[index - first](x)
    return x
