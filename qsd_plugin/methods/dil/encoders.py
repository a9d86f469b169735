"""What DIL takes an image apart with: content and identity on one side, degradation on the other.

Shapes: B images, H x W pixels, K numbers of a degradation code, C classes. Images are normalised with ImageNet's mean
and deviation; the paper's are 256 x 128. Source: Huang et al., CVPR 2020 and IJCV 2022; sizes as in their program.
"""

from __future__ import annotations

import itertools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.dil.cheap import channels_last
from qsd_plugin.methods.dil.identity import ClassBlock
from qsd_plugin.methods.dil.layers import ConvLayer, LiteBlock, UpConv, kaiming
from qsd_plugin.networks.resnet_stages import ResNetStages

#: Two last layers of :class:`DegradationEncoder`, and their names in the authors' checkpoints.
DEGRADATION_HEADS = {"real": "conv3_real", "syn": "conv3_sync"}
#: Smallest height or width of an image: the widest dilated convolution mirrors nine pixels of half of it.
SMALLEST_SIDE = 20

_DILATIONS = {"conv6": 3, "conv12": 6, "conv18": 9}
_IDENTITY_DIM = 2048


class Encoded(NamedTuple):
    """What :class:`ContentEncoder` finds in images."""

    identity: Tensor | None
    """f_inv, [B, identity_dim], before its bottleneck; ``None`` where not asked for."""
    content: Tensor | None
    """c, [B, content_dim, H / 4, W / 4]; ``None`` where not asked for."""


class DegradationEncoder(nn.Module):
    """How bad an image looks, in a code of K numbers; no norm, so that brightness and contrast stay visible.

    Args:
        code_dim: K.
        width: Channels of the first layers; the last ones have four times as many.
    """

    def __init__(self, *, code_dim: int = 128, width: int = 64) -> None:
        super().__init__()
        self.code_dim = code_dim
        self.conv1 = ConvLayer(3, width, 3, stride=2, activation="relu")
        self.conv2 = ConvLayer(width, width, 3, activation="relu")
        sizes = (width, 2 * width, 4 * width, 4 * width, 4 * width)
        self.block = nn.Sequential(
            *(ConvLayer(a, b, 3, stride=2, activation="relu") for a, b in itertools.pairwise(sizes))
        )
        self.conv3_real = nn.Conv2d(4 * width, code_dim, 1)
        self.conv3_sync = nn.Conv2d(4 * width, code_dim, 1)
        self.apply(kaiming)

    def forward(self, images: Tensor, head: str = "real") -> Tensor:
        """Images [B, 3, H, W] to codes [B, K], not normalised.

        Args:
            head: ``"real"``, or ``"syn"`` for the synthetic partner of a pixel-wise pair.

        Raises:
            ConfigError: Unknown head.
        """
        if head not in DEGRADATION_HEADS:
            raise ConfigError("DIL degradation head", value=head, expected=" or ".join(map(repr, DEGRADATION_HEADS)))
        pooled = self.block(self.conv2(self.conv1(channels_last(images)))).mean(dim=(2, 3), keepdim=True)
        code: Tensor = self.get_submodule(DEGRADATION_HEADS[head])(pooled)
        return code.flatten(1)


class _Pyramid(nn.Module):
    """Atrous pyramid on the stem's map: four branches side by side, each convolution with an instance norm."""

    def __init__(self, in_channels: int, branch: int) -> None:
        super().__init__()
        self.conv1 = ConvLayer(in_channels, branch, 1, norm=nn.InstanceNorm2d(branch))
        for name, dilation in _DILATIONS.items():
            reduce = ConvLayer(in_channels, branch, 1, norm=nn.InstanceNorm2d(branch), activation="lrelu")
            look = ConvLayer(branch, branch, 3, dilation=dilation, norm=nn.InstanceNorm2d(branch))
            setattr(self, name, nn.Sequential(reduce, look))
        self.fuse = ConvLayer(4 * branch, 4 * branch, 1, norm=nn.InstanceNorm2d(4 * branch))

    def forward(self, stem: Tensor) -> Tensor:
        branches = [self.conv1(stem), *(self.get_submodule(name)(stem) for name in _DILATIONS)]
        out: Tensor = self.fuse(torch.cat(branches, dim=1))
        return out


class _Head(nn.Module):
    """Content and identity from the trunk's four maps."""

    def __init__(
        self, channels: tuple[int, ...], *, branch: int, scale_dim: int, content_dim: int, identity_dim: int
    ) -> None:
        super().__init__()
        self.aspp = _Pyramid(channels[0], branch)
        scales = (4 * branch, *channels[1:])
        self.invariance = nn.ModuleList(LiteBlock(width) for width in scales)
        shrink = [
            UpConv(
                factor,
                ConvLayer(width, scale_dim, 3, padding="zeros", norm=nn.BatchNorm2d(scale_dim), activation="lrelu"),
            )
            for width, factor in zip(scales, (1, 1, 2, 4), strict=True)
        ]
        fuse = ConvLayer(4 * scale_dim, content_dim, 1, norm=nn.InstanceNorm2d(content_dim), activation="lrelu")
        self.content = nn.ModuleList([*shrink, fuse])
        look = [nn.Sequential(nn.Sequential(LiteBlock(width), LiteBlock(width))) for width in scales]
        join = ConvLayer(sum(scales), identity_dim, 1, norm=nn.BatchNorm2d(identity_dim), activation="lrelu")
        self.identity = nn.ModuleList([*look, join])
        self.apply(kaiming)

    def forward(
        self, maps: tuple[Tensor, ...], want_identity: bool, want_content: bool, identity_grad: bool
    ) -> Encoded:
        scales = (F.max_pool2d(self.aspp(maps[0]), 2), *maps[1:])
        robust = [block(scale) for block, scale in zip(self.invariance, scales, strict=True)]
        identity = content = None
        if want_content:
            *shrink, fuse = self.content
            content = fuse(torch.cat([block(x) for block, x in zip(shrink, robust, strict=True)], dim=1))
        if want_identity:
            *look, join = self.identity
            with torch.set_grad_enabled(identity_grad and torch.is_grad_enabled()):
                pooled = [block(x).mean(dim=(2, 3), keepdim=True) for block, x in zip(look, robust, strict=True)]
                identity = join(torch.cat(pooled, dim=1)).flatten(1)
        return Encoded(identity, content)


class ContentEncoder(nn.Module):
    """What is in an image whatever its quality: a content map and an identity vector, read off four scales of a trunk.

    Use: ``identity, content = encoder(images)``; ``encoder.classifier`` is the bottleneck and classifier behind the
    identity vector. Across ranks: plain; batch statistics are those of the rank.

    Args:
        num_classes: C.
        trunk: Maps images to four maps at H / 2, H / 4, H / 8 and H / 16, as ``ResNetStages(blocks=(3, 4, 6))``, which
            is the default; its ``channels`` names their channels.
        content_dim: Channels of the content map.
        identity_dim: Of the identity vector.
        embedding_dim: Of the bottleneck.
        branch: Channels of each branch of the atrous pyramid on the first map.
        scale_dim: Channels that each scale adds to the content map.
        dropout: In front of the classifier, [0, 1).

    Raises:
        ConfigError: The trunk does not return four maps; on call, images are too small or not a multiple of 16 pixels.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        trunk: nn.Module | None = None,
        content_dim: int = 128,
        identity_dim: int = _IDENTITY_DIM,
        embedding_dim: int = 512,
        branch: int = 32,
        scale_dim: int = 64,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        self.model = ResNetStages(blocks=(3, 4, 6)) if trunk is None else trunk
        channels = getattr(self.model, "channels", ())
        if len(channels) != 4:
            raise ConfigError(
                "DIL trunk: channels",
                value=channels,
                expected="the channels of its four maps",
                remedy="Give the trunk an attribute channels, e.g. (64, 256, 512, 1024).",
            )
        self.content_dim, self.identity_dim = content_dim, identity_dim
        self.head = _Head(
            tuple(channels),
            branch=branch,
            scale_dim=scale_dim,
            content_dim=content_dim,
            identity_dim=identity_dim,
        )
        self.classifier = ClassBlock(identity_dim, num_classes, embedding_dim=embedding_dim, dropout=dropout)

    def forward(
        self,
        images: Tensor,
        *,
        trunk_grad: bool = False,
        want_identity: bool = True,
        want_content: bool = True,
        identity_grad: bool = True,
    ) -> Encoded:
        """Images [B, 3, H, W], H and W multiples of 16, to identity and content.

        Args:
            trunk_grad: Whether gradient passes through the trunk. The authors cut it in stage 1 (``False``), so that
                neither the trunk nor the images get any; stage 2 trains the trunk.
            want_identity: Run the identity branch; its batch statistics move only then.
            want_content: Run the content branch; likewise.
            identity_grad: Whether the identity branch gets gradient; ``False`` where only its batch statistics are
                wanted.
        """
        height, width = images.shape[-2:]
        if height % 16 or width % 16 or min(height, width) < SMALLEST_SIDE:
            raise ConfigError(
                "DIL image size", value=(height, width), expected=f"multiples of 16, at least {SMALLEST_SIDE}"
            )
        maps = self.maps(images, trunk_grad)
        return self.read(maps, want_identity=want_identity, want_content=want_content, identity_grad=identity_grad)

    def maps(self, images: Tensor, trunk_grad: bool) -> tuple[Tensor, ...]:
        """The trunk's four maps of images [B, 3, H, W]."""
        with torch.set_grad_enabled(trunk_grad and torch.is_grad_enabled()):
            maps: tuple[Tensor, ...] = self.model(channels_last(images))
        return maps

    def read(
        self,
        maps: tuple[Tensor, ...],
        *,
        want_identity: bool = True,
        want_content: bool = True,
        identity_grad: bool = True,
    ) -> Encoded:
        """What the head finds in the trunk's maps; arguments as for a call."""
        encoded: Encoded = self.head(maps, want_identity, want_content, identity_grad)
        return encoded
