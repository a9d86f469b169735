"""Face networks recognised by the names in their state dicts, and described by the config that builds them."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

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


def describe_network(weights: Mapping[str, Tensor]) -> str:
    """The values of ``MODEL.BACKBONE`` that build the network of these weights, as KEY VALUE pairs.

    Args:
        weights: State dict for which :func:`is_arcface` or :func:`is_qud` is true.
    """
    if weights.keys() >= _IRESNET:
        blocks = tuple(
            len({name.split(".")[1] for name in weights if name.startswith(f"layer{stage}.")}) for stage in range(1, 5)
        )
        depth = next((f"{depth}x" for depth, known in IRESNET_BLOCKS.items() if known == blocks), f"of blocks {blocks}")
        return _settings("iresnet", depth, len(weights["conv1.weight"]) / 64, len(weights["fc.weight"]))
    if weights.keys() >= _MOBILEFACENET:
        large = any(name.startswith("layers.1.layers.0.layers.") for name in weights)
        channels = len(weights["layers.0.layers.0.weight"]) / (4 if large else 2)
        dim = len(weights["features.layers.2.weight"])
        return _settings("mobilefacenet", "mbf_large" if large else "mbf", channels / 64, dim)
    dim = len(weights["output_layer.linear.weight"])
    return _settings("mobilefacenet", "qud", len(weights["conv1.conv.weight"]) / 64, dim)


def _settings(family: str, depth: str, width: float, dim: int) -> str:
    return f"NAME build_{family}_backbone DEPTH {depth} WIDTH {width:g} FEAT_DIM {dim}"
