"""Layers that DIL's networks are made of. State-dict names are those of the authors' checkpoints.

Shapes: B images, C channels, H x W grid. Source: Huang et al., "Real-World Person Re-Identification via Degradation
Invariance Learning", CVPR 2020; AdaIN: Huang and Belongie, ICCV 2017; the decoder follows Lee et al. (MUNIT).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.methods.dil.cheap import enlarged_conv, normalise, padded_depthwise_norm, reflect_pad

#: Slope of the leaky ReLUs.
SLOPE = 0.2
#: Over what :class:`LayerNorm` takes its statistics.
NORM_SCOPES = ("sample", "batch")

_EPS = 1e-5


def in_float32(tensor: Tensor) -> Tensor:
    """``tensor`` in the precision of statistics: float32, or float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def no_autocast(tensor: Tensor) -> torch.autocast:
    """A context in which operations on the device of ``tensor`` keep the precision of their inputs."""
    return torch.autocast(tensor.device.type, enabled=False)


def adaptive_instance_norm(x: Tensor, scale: Tensor, shift: Tensor, *, slope: float = 1.0) -> Tensor:
    """``scale * (x - mean) / sqrt(var + 1e-5) + shift``, statistics over H and W, in float32.

    Args:
        x: [B, C, H, W].
        scale: w, [B, C]; used as it is, not as 1 + w.
        shift: b, [B, C].
        slope: Of the leaky ReLU behind it; 1 for none.

    Returns:
        [B, C, H, W], in the precision of the statistics.
    """
    with no_autocast(x):
        return normalise(in_float32(x), in_float32(scale), in_float32(shift), over="positions", eps=_EPS, slope=slope)


class LayerNorm(nn.Module):
    """``gamma_c (x - mean) / (std + 1e-5) + beta_c`` over C, H and W, with the unbiased deviation, in float32.

    Args:
        channels: C.
        scope: ``"sample"``: an image's result does not depend on the others. ``"batch"``: one mean and deviation of
            the whole batch, as the authors' program computes with half-precision tensors on a GPU, i.e. in training.

    Raises:
        ConfigError: Unknown scope.
    """

    def __init__(self, channels: int, *, scope: str = "sample") -> None:
        super().__init__()
        if scope not in NORM_SCOPES:
            raise ConfigError("DIL ln_scope", value=scope, remedy=did_you_mean(scope, NORM_SCOPES))
        self.scope = scope
        self.gamma = nn.Parameter(torch.rand(channels))
        self.beta = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, slope: float = 1.0) -> Tensor:
        """[B, C, H, W] to the same shape; ``slope`` of a leaky ReLU behind it, 1 for none."""
        with no_autocast(x):
            return normalise(in_float32(x), self.gamma, self.beta, over=self.scope, eps=_EPS, slope=slope)


class ConvLayer(nn.Module):
    """Convolution, then a norm, then an activation.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel: Size, odd.
        stride: 1 or 2.
        dilation: 1 or more; the padding keeps the size.
        bias: Whether the convolution has one.
        padding: ``"reflect"`` or ``"zeros"``.
        norm: ``None`` for none.
        activation: ``"lrelu"``, ``"relu"`` or ``"none"``.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int,
        *,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        padding: Literal["reflect", "zeros"] = "reflect",
        norm: nn.Module | None = None,
        activation: str = "none",
    ) -> None:
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel,
            stride=stride,
            padding=dilation * (kernel // 2),
            dilation=dilation,
            bias=bias,
            padding_mode=padding,
        )
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        return self.finish(convolve(self.conv, x))

    def finish(self, x: Tensor) -> Tensor:
        """Norm and activation of what the convolution returned, which is overwritten."""
        slope, remaining = (SLOPE, "none") if self.activation == "lrelu" else (1.0, self.activation)
        if isinstance(self.norm, LayerNorm):
            return activate(self.norm(x, slope), remaining)
        if isinstance(self.norm, nn.InstanceNorm2d):
            with no_autocast(x):
                x = normalise(in_float32(x), None, None, over="positions", eps=self.norm.eps, slope=slope)
            return activate(x, remaining)
        if self.norm is not None:
            x = self.norm(x)
        return activate_in_place(x, self.activation)


class LinearLayer(nn.Module):
    """Linear map, then a batch norm if asked for, then an activation; arguments as :class:`ConvLayer`."""

    def __init__(
        self, in_features: int, out_features: int, *, norm: nn.Module | None = None, activation: str = "none"
    ) -> None:
        super().__init__()
        self.fc = nn.Linear(in_features, out_features)
        self.norm = norm
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_features] to [B, out_features]."""
        x = self.fc(x)
        if self.norm is not None:
            x = self.norm(x)
        return activate(x, self.activation)


class Stack(nn.Module):
    """Modules one after the other, under the name ``model``."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.model = nn.Sequential(*modules)

    def forward(self, x: Tensor) -> Tensor:
        """What the last module returns."""
        out: Tensor = self.model(x)
        return out


class UpConv(nn.Module):
    """Bilinear enlargement (corners aligned), then a :class:`ConvLayer`.

    Args:
        factor: 1 for no enlargement.
        conv: The convolution.
    """

    def __init__(self, factor: int, conv: ConvLayer) -> None:
        super().__init__()
        self.factor = factor
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C', factor H, factor W]."""
        conv = self.conv.conv
        if self.factor > 1 and conv.padding_mode == "zeros" and conv.kernel_size == (3, 3):
            return self.conv.finish(enlarged_conv(x, conv.weight, conv.bias, self.factor))
        if self.factor > 1:
            x = F.interpolate(x, scale_factor=self.factor, mode="bilinear", align_corners=True)
        out: Tensor = self.conv(x)
        return out


class SeparableConv(nn.Module):
    """1x1 convolution, depthwise 3x3 convolution with reflection padding, batch norm; both with a bias.

    Args:
        channels: C, of input and output.
        activation: As for :class:`ConvLayer`.
    """

    def __init__(self, channels: int, activation: str) -> None:
        super().__init__()
        self.conv_1x1 = nn.Conv2d(channels, channels, 1)
        self.conv_dw = nn.Conv2d(channels, channels, 3, padding=1, padding_mode="reflect", groups=channels)
        self.norm = nn.BatchNorm2d(channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        inner = self.conv_1x1(x)
        norm = self.norm
        # Statistics over the ranks, a momentum of None, and mixed precision are torch's own affair.
        own = type(norm) is nn.BatchNorm2d and norm.training and norm.momentum is not None
        if own and torch.is_grad_enabled() and not torch.is_autocast_enabled(x.device.type):
            return padded_depthwise_norm(inner, self.conv_dw, norm, relu=self.activation == "relu")
        return activate_in_place(norm(convolve(self.conv_dw, inner)), self.activation)


class LiteBlock(nn.Module):
    """Residual block of two separable convolutions.

    Args:
        channels: C.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.model = nn.Sequential(SeparableConv(channels, "relu"), SeparableConv(channels, "none"))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same shape."""
        return activate_in_place(x + self.model(x), "relu")


def convolve(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What ``conv`` returns; with reflection padding the map in front of the padding is not kept."""
    if conv.padding_mode != "reflect":
        out: Tensor = conv(x)
        return out
    if width := int(conv.padding[0]):
        x = reflect_pad(x, width)
    return F.conv2d(x, conv.weight, conv.bias, stride=conv.stride, dilation=conv.dilation, groups=conv.groups)


def activate_in_place(x: Tensor, name: str) -> Tensor:
    """As :func:`activate`, over ``x``; for what a convolution, a batch norm or a sum returned, which do not need it."""
    if name == "relu":
        return F.relu_(x)
    return F.leaky_relu_(x, SLOPE) if name == "lrelu" else x


def largest(maps: Tensor) -> Tensor:
    """Maps [B, C, H, W] to the largest value of each, [B, C]; of equal ones the first alone gets the gradient.

    As ``adaptive_max_pool2d`` to one position, which torch's exporter to ONNX does not know.
    """
    return maps.flatten(2).max(dim=2).values


def activate(x: Tensor, name: str) -> Tensor:
    """``x`` through ``"relu"``, ``"lrelu"`` (slope 0.2) or, for ``"none"``, unchanged."""
    if name == "relu":
        return F.relu(x)
    return F.leaky_relu(x, SLOPE) if name == "lrelu" else x


def kaiming(module: nn.Module) -> None:
    """Start convolutions and linear layers from N(0, 2 / fan in) with bias 0; for ``Module.apply``."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.kaiming_normal_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
