"""DIL's networks operation by operation, for :mod:`.dil_plain`: from their parameters, without the code that runs them.

Source: Huang et al., CVPR 2020 and IJCV 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.methods.dil import ContentEncoder, DegradationEncoder, Generator, MultiScaleDiscriminator
from qsd_plugin.methods.dil.layers import LayerNorm


def content(encoder: ContentEncoder, images: Tensor, *, want_identity: bool = True) -> tuple[Any, Any]:
    """Identity and content with the trunk cut off from the gradient, as stage 1 uses them."""
    with torch.no_grad():
        maps = encoder.model(images)
    return read_head(encoder.head, maps, want_identity=want_identity)


def degradation(encoder: DegradationEncoder, images: Tensor, head: str) -> Tensor:
    """The code of images, [B, K]."""
    x = images
    for layer in (encoder.conv1, encoder.conv2, *encoder.block):
        x = layer_of(layer, x)
    code: Tensor = (encoder.conv3_real if head == "real" else encoder.conv3_sync)(F.adaptive_avg_pool2d(x, 1))
    return code.flatten(1)


def render(generator: Generator, contents: Tensor, codes: Tensor) -> Tensor:
    """Images of contents with codes."""
    x, blocks = contents, generator.dec.res.model
    block: Any
    for number, block in enumerate(blocks, 1):
        scale, shift = (generator.get_submodule(f"mlp_{kind}{number}")(codes).chunk(2, dim=1) for kind in "wb")
        first, second = block.model
        inner = F.leaky_relu(_adaptive(first.conv(x), scale[0], shift[0]), 0.2)
        x = x + _adaptive(second.conv(inner), scale[1], shift[1])
    for up in generator.dec.up:
        x = layer_of(up.conv, F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=True))
    for layer in generator.dec.convs:
        x = layer_of(layer, x)
    return x


def scores(network: MultiScaleDiscriminator, images: Tensor) -> list[Tensor]:
    """A map of scores per scale."""
    maps = []
    net: Any
    for number, net in enumerate(network.nets):
        if number:
            images = F.avg_pool2d(images, 3, stride=2, padding=1, count_include_pad=False)
        x = images
        for layer in net:
            if isinstance(layer, nn.Conv2d):
                x = layer(x)
            elif hasattr(layer, "model"):
                x = x + layer_of(layer.model[1], layer_of(layer.model[0], x))
            else:
                x = layer_of(layer, x)
        maps.append(x)
    return maps


def layer_of(layer: Any, x: Tensor) -> Tensor:
    """Convolution, norm and activation one after the other, from a ``ConvLayer``."""
    x = layer.conv(x)
    if isinstance(layer.norm, LayerNorm):
        rows = x.flatten(1)
        mean, deviation = (part[:, None, None, None] for part in (rows.mean(dim=1), rows.std(dim=1)))
        x = (x - mean) / (deviation + 1e-5) * layer.norm.gamma[:, None, None] + layer.norm.beta[:, None, None]
    elif layer.norm is not None:
        x = layer.norm(x)
    return _activate(x, layer.activation)


def _activate(x: Tensor, name: str) -> Tensor:
    return F.relu(x) if name == "relu" else F.leaky_relu(x, 0.2) if name == "lrelu" else x


def _adaptive(x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    return scale[:, :, None, None] * F.instance_norm(x) + shift[:, :, None, None]


def _lite(block: Any, x: Tensor) -> Tensor:
    inner = x
    for part in block.model:
        inner = _activate(part.norm(part.conv_dw(part.conv_1x1(inner))), part.activation)
    return F.relu(x + inner)


def read_head(
    head: Any, maps: Sequence[Tensor], *, want_identity: bool = True, want_content: bool = True
) -> tuple[Any, Any]:
    stem, pyramid = maps[0], head.aspp
    branches = [layer_of(pyramid.conv1, stem)]
    for name in ("conv6", "conv12", "conv18"):
        reduce, look = pyramid.get_submodule(name)
        branches.append(layer_of(look, layer_of(reduce, stem)))
    first = F.max_pool2d(layer_of(pyramid.fuse, torch.cat(branches, dim=1)), 2)
    robust = [_lite(block, x) for block, x in zip(head.invariance, (first, *maps[1:]), strict=True)]
    identity = found = None
    if want_content:
        *shrink, fuse = head.content
        parts = []
        for block, x in zip(shrink, robust, strict=True):
            if block.factor > 1:
                x = F.interpolate(x, scale_factor=block.factor, mode="bilinear", align_corners=True)
            parts.append(layer_of(block.conv, x))
        found = layer_of(fuse, torch.cat(parts, dim=1))
    if want_identity:
        *look, join = head.identity
        pooled = []
        for block, x in zip(look, robust, strict=True):
            for lite in block[0]:
                x = _lite(lite, x)
            pooled.append(F.adaptive_avg_pool2d(x, 1))
        identity = layer_of(join, torch.cat(pooled, dim=1)).flatten(1)
    return identity, found
