"""The generator: an image from a content map and a degradation code.

Shapes: B images, K numbers of a code, C channels of a content map, h x w its grid. Source: Huang et al., CVPR 2020.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.dil.cheap import channels_last
from qsd_plugin.methods.dil.layers import (
    SLOPE,
    ConvLayer,
    LayerNorm,
    LinearLayer,
    Stack,
    UpConv,
    adaptive_instance_norm,
    kaiming,
)


class AdaptiveBlock(nn.Module):
    """Residual block whose two instance norms get scale and shift from outside, as arguments.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(ConvLayer(channels, channels, 3), ConvLayer(channels, channels, 3))

    def forward(self, x: Tensor, scales: Tensor, shifts: Tensor) -> Tensor:
        """[B, C, h, w] with scales and shifts [B, 2 C], the first halves for the first norm, to [B, C, h, w]."""
        (scale_1, scale_2), (shift_1, shift_2) = scales.chunk(2, dim=1), shifts.chunk(2, dim=1)
        first, second = self.model
        inner = adaptive_instance_norm(first(x), scale_1, shift_1, slope=SLOPE)
        return x + adaptive_instance_norm(second(inner), scale_2, shift_2)


class _Decoder(nn.Module):
    """Residual blocks at the content's size, two enlargements, three convolutions."""

    def __init__(self, channels: int, blocks: int, ln_scope: str) -> None:
        super().__init__()
        self.res = Stack(*(AdaptiveBlock(channels) for _ in range(blocks)))
        half, quarter = channels // 2, channels // 4
        self.up = nn.Sequential(
            *(
                UpConv(2, ConvLayer(a, b, 5, norm=LayerNorm(b, scope=ln_scope), activation="lrelu"))
                for a, b in ((channels, half), (half, quarter))
            )
        )
        self.convs = nn.Sequential(
            ConvLayer(quarter, quarter, 3, activation="lrelu"),
            ConvLayer(quarter, quarter, 3, activation="lrelu"),
            ConvLayer(quarter, 3, 1),
        )


class Generator(nn.Module):
    """Renders a content map with a degradation code; a pure function of its inputs, without batch statistics.

    Args:
        content_dim: C, a multiple of 4.
        code_dim: K.
        hidden: Width of the eight small networks that turn a code into scales and shifts.
        blocks: Residual blocks.
        ln_scope: As :class:`~.layers.LayerNorm`; ``"batch"`` for the authors' weights as they were trained.

    Raises:
        ConfigError: ``content_dim`` is no multiple of 4, or an unknown scope.
    """

    def __init__(
        self,
        *,
        content_dim: int = 128,
        code_dim: int = 128,
        hidden: int = 512,
        blocks: int = 4,
        ln_scope: str = "sample",
    ) -> None:
        super().__init__()
        if content_dim % 4:
            raise ConfigError("DIL content_dim", value=content_dim, expected="a multiple of 4")
        self.blocks = blocks
        self.dec = _Decoder(content_dim, blocks, ln_scope)
        for kind in "wb":
            for number in range(1, blocks + 1):
                network = Stack(
                    LinearLayer(code_dim, hidden, activation="lrelu"),
                    LinearLayer(hidden, hidden, activation="lrelu"),
                    LinearLayer(hidden, 2 * content_dim),
                )
                setattr(self, f"mlp_{kind}{number}", network)
        self.apply(kaiming)

    def styles(self, codes: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and shifts of all blocks, [B, blocks x 2 C] each, from codes [B, K]."""
        scales, shifts = (
            torch.cat([self.get_submodule(f"mlp_{kind}{number + 1}")(codes) for number in range(self.blocks)], dim=1)
            for kind in "wb"
        )
        return scales, shifts

    def forward(self, content: Tensor, codes: Tensor) -> Tensor:
        """Content maps [B, C, h, w] and codes [B, K] to images [B, 3, 4 h, 4 w], in ImageNet's normalisation.

        The values are not bounded.
        """
        scales, shifts = self.styles(codes)
        x = channels_last(content)
        parts = zip(self.dec.res.model, scales.chunk(self.blocks, dim=1), shifts.chunk(self.blocks, dim=1), strict=True)
        for block, scale, shift in parts:
            x = block(x, scale, shift)
        images: Tensor = self.dec.convs(self.dec.up(x))
        return images
