"""Operations of DIL's networks that keep less for the backward pass than a chain of torch's, and take less time.

Values and gradients are those of the chain; how they are rounded is not. Maps are in channels-last order where the
networks meet them, in which torch's own operations on a CPU are several times faster for everything but instance norm.

Shapes: B images, C channels, H x W grid. Source: ours; the operations are those of Huang et al., CVPR 2020.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def channels_last(x: Tensor) -> Tensor:
    """[B, C, H, W] with the channels of a position beside each other in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def reflect_pad(x: Tensor, width: int) -> Tensor:
    """``F.pad(x, 4 * (width,), mode="reflect")`` that does not keep ``x``; can be differentiated twice."""
    padded: Tensor = _ReflectPad.apply(x, width)  # type: ignore[no-untyped-call]
    return padded


class _ReflectPad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, width: int) -> Tensor:
        ctx.shape, ctx.width = x.shape, width
        return F.pad(x, (width,) * 4, mode="reflect")

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        like = torch.empty(
            ctx.shape, dtype=gradient.dtype, device=gradient.device, memory_format=torch.channels_last
        )  # only its shape is used
        return torch.ops.aten.reflection_pad2d_backward(gradient, like, [ctx.width] * 4), None


def normalise(
    x: Tensor, scale: Tensor | None, shift: Tensor | None, *, over: str, eps: float, slope: float = 1.0
) -> Tensor:
    """Norm, then scale and shift, then a leaky ReLU; of all maps in between it keeps the normalised one only.

    Cannot be differentiated twice.

    Args:
        x: [B, C, H, W].
        scale: Of the normalised maps, [B, C] or [C]; ``None`` for 1, then without shift.
        shift: Of the same shape.
        over: ``"positions"``: instance norm, ``(x - mean) / sqrt(var + eps)`` with the biased variance over H and W.
            ``"sample"``, ``"batch"``: ``(x - mean) / (std + eps)`` with the unbiased deviation over C, H and W, or over
            everything.
        eps: > 0.
        slope: Of negative values; 1 for no activation.
    """
    y: Tensor = _Normalise.apply(x, scale, shift, over, eps, slope)  # type: ignore[no-untyped-call]
    return y


class _Normalise(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor | None, shift: Tensor | None, over: str, eps: float, slope: float
    ) -> Tensor:
        count = x[0, 0].numel()
        normal = x - _whole(_sum(x), over).div_(_count(x, over))
        squares = _whole(_sum(normal.square()), over)
        if over == "positions":
            divisor = (squares / count + eps).sqrt_()
            # What the derivative of the divisor is divided by.
            weight = torch.full_like(divisor, 1 / count)
        else:
            deviation = (squares / (_count(x, over) - 1)).sqrt_()
            divisor = deviation + eps
            weight = divisor / ((_count(x, over) - 1) * deviation)
        normal.div_(divisor)
        ctx.over, ctx.slope = over, slope
        ctx.save_for_backward(normal, divisor, weight, scale, shift)
        if scale is None or shift is None:
            return F.leaky_relu(normal, slope) if slope != 1 else normal
        out = torch.addcmul(_on_maps(shift), _on_maps(scale), normal)
        return F.leaky_relu_(out, slope) if slope != 1 else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normal, divisor, weight, scale, shift = ctx.saved_tensors
        if ctx.slope != 1:
            before = normal if scale is None else torch.addcmul(_on_maps(shift), _on_maps(scale), normal)
            gradient = torch.ops.aten.leaky_relu_backward(gradient, before, ctx.slope, False)
        sums, products = _sum(gradient), _sum(gradient * normal)  # [B, C, 1, 1]
        on_maps = torch.ones_like(sums) if scale is None else _on_maps(scale)
        mean = _whole(sums * on_maps, ctx.over) / _count(normal, ctx.over)
        along = _whole(products * on_maps, ctx.over) * weight
        to_x = torch.addcmul(-mean / divisor, gradient, on_maps / divisor)
        to_x.addcmul_(normal, -along / divisor)
        if scale is None:
            return to_x, None, None, None, None, None
        to_scale, to_shift = (
            part[:, :, 0, 0] if scale.dim() == 2 else part.sum(dim=(0, 2, 3)) for part in (products, sums)
        )
        return to_x, to_scale, to_shift, None, None, None


def _sum(x: Tensor) -> Tensor:
    """Over positions, [B, C, 1, 1]."""
    return x.sum(dim=(2, 3), keepdim=True)


def _whole(sums: Tensor, over: str) -> Tensor:
    """Sums over positions [B, C, 1, 1] to sums over what the norm goes over."""
    if over == "positions":
        return sums
    return sums.sum(dim=1 if over == "sample" else (0, 1), keepdim=True)


def _count(x: Tensor, over: str) -> int:
    """Over how many numbers the norm goes."""
    shape = x.shape[{"positions": 2, "sample": 1, "batch": 0}[over] :]
    return shape.numel()


def _on_maps(vector: Tensor) -> Tensor:
    """[B, C] or [C] beside [B, C, H, W]."""
    return vector[..., None, None]


def padded_depthwise_norm(x: Tensor, conv: nn.Conv2d, norm: nn.BatchNorm2d, *, relu: bool) -> Tensor:
    """Reflection padding, depthwise convolution, batch norm in training, and a ReLU on demand, which keeps ``x`` alone.

    The padded and the convolved map are made again in the backward pass: a depthwise convolution costs little beside
    the 1x1 convolutions around it. Cannot be differentiated twice.

    Args:
        x: [B, C, H, W].
        conv: Depthwise, stride 1, with a bias.
        norm: In training mode, with running statistics and a momentum.
        relu: Whether there is a ReLU behind the norm.
    """
    if norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(1)
    y: Tensor = _PaddedDepthwiseNorm.apply(  # type: ignore[no-untyped-call]
        x, conv.weight, conv.bias, norm.weight, norm.bias, norm, int(conv.padding[0]), relu
    )
    return y


class _PaddedDepthwiseNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        scale: Tensor,
        shift: Tensor,
        norm: nn.BatchNorm2d,
        width: int,
        relu: bool,
    ) -> Tensor:
        inner = F.conv2d(F.pad(x, (width,) * 4, mode="reflect"), weight, bias, groups=len(weight))
        out, mean, inverse = torch.native_batch_norm(
            inner, scale, shift, norm.running_mean, norm.running_var, True, float(norm.momentum or 0.0), norm.eps
        )
        ctx.width, ctx.relu, ctx.eps = width, relu, norm.eps
        ctx.save_for_backward(x, weight, bias, scale, shift, mean, inverse)
        return F.relu_(out) if relu else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias, scale, shift, mean, inverse = ctx.saved_tensors
        padded = F.pad(x, (ctx.width,) * 4, mode="reflect")
        inner = F.conv2d(padded, weight, bias, groups=len(weight))
        if ctx.relu:
            factor = scale * inverse
            out = torch.addcmul(_on_maps(shift - mean * factor), _on_maps(factor), inner)
            gradient = gradient * (out > 0)
        to_inner, to_scale, to_shift = torch.ops.aten.native_batch_norm_backward(
            gradient, inner, scale, None, None, mean, inverse, True, ctx.eps, [True, True, True]
        )
        to_padded, to_weight, to_bias = torch.ops.aten.convolution_backward(
            to_inner, padded, weight, [len(weight)], [1, 1], [0, 0], [1, 1], False, [0, 0], len(weight), [True] * 3
        )
        to_x = torch.ops.aten.reflection_pad2d_backward(to_padded, x, [ctx.width] * 4)
        return to_x, to_weight, to_bias, to_scale, to_shift, None, None, None


def enlarged_conv(x: Tensor, weight: Tensor, bias: Tensor | None, factor: int) -> Tensor:
    """A 3x3 convolution with zero padding of the enlarged map, without convolving at its size.

    Enlarging works on every channel alone and the taps of a convolution on every position alone, so they change places:
    the taps mix the channels of the small map, their nine results are enlarged, moved by a pixel each and added. That
    is ``factor`` squared times fewer multiplications, and the enlarged input, the largest map, is never made.

    Args:
        x: [B, C, H, W].
        weight: [C', C, 3, 3].
        bias: [C'].
        factor: Enlargement, bilinear with aligned corners, > 1.

    Returns:
        [B, C', factor H, factor W].
    """
    taps = weight.permute(2, 3, 0, 1).reshape(-1, weight.shape[1], 1, 1)
    mixed = F.interpolate(F.conv2d(x, taps), scale_factor=factor, mode="bilinear", align_corners=True)
    out: Tensor = _AddTaps.apply(mixed)  # type: ignore[no-untyped-call]
    return out if bias is None else out + bias[:, None, None]


class _AddTaps(torch.autograd.Function):
    """[B, 9 C, H, W], tap by tap, to the sum of the taps where each one looks, [B, C, H, W]."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor) -> Tensor:
        parts = mixed.chunk(9, dim=1)
        out = parts[4].clone()
        for (to, source), part in zip(_tap_slices(mixed.shape), parts, strict=True):
            if part is not parts[4]:
                out[to].add_(part[source])
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        batch, channels, height, width = gradient.shape
        mixed = channels_last(gradient.new_zeros(batch, 9 * channels, height, width))
        for (to, source), part in zip(_tap_slices(gradient.shape), mixed.chunk(9, dim=1), strict=True):
            part[source] = gradient[to]
        return mixed


def _tap_slices(shape: Sequence[int]) -> list[tuple[tuple[slice, ...], tuple[slice, ...]]]:
    """Of each tap of a 3x3 convolution, the positions it adds to, and those it looks at."""
    moves = {
        -1: (slice(1, None), slice(None, -1)),
        0: (slice(None), slice(None)),
        1: (slice(None, -1), slice(1, None)),
    }
    every = slice(None)
    return [
        ((every, every, moves[down][0], moves[right][0]), (every, every, moves[down][1], moves[right][1]))
        for down in moves
        for right in moves
    ]
