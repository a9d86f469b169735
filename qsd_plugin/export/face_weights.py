"""Face networks recognised by the names in their state dicts, and described by the config that builds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from qsd_plugin.export.ir_weights import ir_units, is_bare_ir
from qsd_plugin.networks.iresnet import IRESNET_BLOCKS

_IRESNET = {"conv1.weight", "prelu.weight", "layer1.0.prelu.weight", "fc.weight", "features.running_mean"}
_MOBILEFACENET = {"layers.0.layers.0.weight", "conv_sep.layers.0.weight", "features.layers.2.weight"}
_MOBILEFACENET_QUD = {"conv1.conv.weight", "conv_6_sep.conv.weight", "output_layer.linear.weight"}


def is_arcface(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of arcface_torch's IResNet or MobileFaceNet."""
    return weights.keys() >= _IRESNET or weights.keys() >= _MOBILEFACENET


def is_qud(weights: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of QUD's networks; its IResNets are named as arcface_torch's."""
    return weights.keys() >= _IRESNET or weights.keys() >= _MOBILEFACENET_QUD


@dataclass(frozen=True)
class FaceShape:
    """What the shapes of a face network's weights say about it.

    Args:
        family: ``iresnet``, ``ir`` (AdaFace's and QGFace's) or ``mobilefacenet``.
        blocks: Residual blocks of the four stages of an IResNet or IR, empty for others.
        variant: A MobileFaceNet's ``mbf``, ``mbf_large`` or ``qud``, an IR's ``se`` (squeeze-excite) or nothing.
        width: Factor on the channels of the published network.
        dimension: Length of the embedding.
        pooled: Positions of the last map that the embedding is computed from, 49 for 112 pixels.
    """

    family: str
    blocks: tuple[int, ...]
    variant: str
    width: float
    dimension: int
    pooled: int


def face_shape(weights: Mapping[str, Tensor]) -> FaceShape:
    """The network that weights belong to.

    Args:
        weights: State dict for which :func:`is_arcface`, :func:`is_qud` or
            :func:`~qsd_plugin.export.ir_weights.is_bare_ir` is true.
    """
    if is_bare_ir(weights):
        blocks, excite = ir_units(weights)
        channels = len(weights["input_layer.0.weight"])
        dimension, inputs = weights["output_layer.3.weight"].shape
        variant = "se" if excite else ""
        return FaceShape("ir", blocks, variant, channels / 64, dimension, inputs // (8 * channels))
    if weights.keys() >= _IRESNET:
        blocks = tuple(
            len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")}) for stage in range(1, 5)
        )
        channels = len(weights["conv1.weight"])
        dimension, inputs = weights["fc.weight"].shape
        return FaceShape("iresnet", blocks, "", channels / 64, dimension, inputs // (8 * channels))
    if weights.keys() >= _MOBILEFACENET:
        large = any(name.startswith("layers.1.layers.0.layers.") for name in weights)
        channels = len(weights["layers.0.layers.0.weight"]) // (4 if large else 2)
        pooling, dimension = weights["features.layers.0.layers.0.weight"], len(weights["features.layers.2.weight"])
        variant = "mbf_large" if large else "mbf"
        return FaceShape("mobilefacenet", (), variant, channels / 64, dimension, pooling[0, 0].numel())
    pooling, dimension = weights["output_layer.conv_6_dw.conv.weight"], len(weights["output_layer.linear.weight"])
    channels = len(weights["conv1.conv.weight"])
    return FaceShape("mobilefacenet", (), "qud", channels / 64, dimension, pooling[0, 0].numel())


def describe_network(weights: Mapping[str, Tensor]) -> str:
    """The values of ``MODEL.BACKBONE`` that build the network of these weights, as KEY VALUE pairs.

    Args:
        weights: State dict for which :func:`is_arcface` or :func:`is_qud` is true.
    """
    shape = face_shape(weights)
    depth = shape.variant or next(
        (f"{depth}x" for depth, blocks in IRESNET_BLOCKS.items() if blocks == shape.blocks),
        f"of blocks {shape.blocks}",
    )
    return f"NAME build_{shape.family}_backbone DEPTH {depth} WIDTH {shape.width:g} FEAT_DIM {shape.dimension}"
