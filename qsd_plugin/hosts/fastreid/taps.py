"""Which tensors of a host model QSD distils: the default levels per backbone family, and the ``QSD.TAPS`` syntax."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal

import torch
from torch import nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.networks.ir import IR
from qsd_plugin.networks.iresnet import IResNet
from qsd_plugin.networks.mobilefacenet import MobileFaceNet
from qsd_plugin.networks.mobilefacenet_qud import MobileFaceNetQUD
from qsd_plugin.networks.taps import tokens_to_map

Role = Literal["map", "vector", "logits"]


@dataclass(frozen=True)
class Tap:
    """One level.

    Args:
        name: Module path, with ``:key`` behind it when the module returns a dict.
        role: What kind of tensor it is; decides its weight in the preset. Taps from a config are classed by name.
        weight: Weight given in ``QSD.TAPS``, or ``None`` for the preset's.
    """

    name: str
    role: Role
    weight: float | None = None


def parse_taps(entries: Sequence[str]) -> list[Tap]:
    """Taps written in a config as ``path``, ``path:key``, ``path=weight`` or ``path:key=weight``.

    Raises:
        ConfigError: A weight is not a number >= 0, or a level is listed twice.
    """
    taps: list[Tap] = []
    for entry in entries:
        name, _, weight = entry.partition("=")
        try:
            value = float(weight) if weight else None
        except ValueError:
            value = -1.0
        if value is not None and not value >= 0:
            raise ConfigError("Weight in QSD.TAPS", value=entry, expected="module.path=number, number >= 0")
        if any(tap.name == name for tap in taps):
            raise ConfigError("QSD.TAPS", value=name, expected="each level once")
        taps.append(Tap(name, _role_by_name(name), value))
    return taps


def default_taps(model: nn.Module) -> list[Tap]:
    """The default levels of a built host model: three feature maps, the embedding and the margin-free logits.

    For the residual networks these are the levels of Ou et al. (Section 3.2 of our specification): the outputs of
    stages 2, 3 and 4 after their non-local blocks, the output of the BN neck and the logits. For the face networks,
    where nothing was published, they are the maps of all four resolutions and the embedding: logits with a margin
    depend on the label (Section 3.3).

    Raises:
        ConfigError: The backbone belongs to no known family.
    """
    head = head_name(model)
    if head == "b1_head":
        maps = ["backbone", "b1", "b2", "b3"]
        return [*(Tap(name, "map") for name in maps), *_head_taps(head)]
    backbone: Any = model.backbone
    stages = _face_stages(backbone)
    if stages:
        return [*(Tap(f"backbone.{name}", "map") for name in stages), Tap(f"{head}.bottleneck", "vector")]
    for recognise in (_residual_stages, _omni_scale_stages, _inverted_residual_stages, _transformer_stages):
        names = recognise(backbone)
        if names:
            return [*(Tap(f"backbone.{name}", "map") for name in names), *_head_taps(head)]
    raise ConfigError(
        "QSD.TAPS is empty and there are no default levels for this backbone",
        value=type(backbone).__name__,
        remedy="List the levels yourself, for example QSD.TAPS \"['backbone', 'heads.bottleneck']\".",
    )


def head_name(model: nn.Module) -> str:
    """Module path of the head whose embedding stands for the image: MGN's global branch, or the only head."""
    return "b1_head" if hasattr(model, "b1_head") else "heads"


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Every head of a host model by module path; a head in eval mode returns its embedding, without any class."""
    from fastreid.modeling.heads.build import REID_HEADS_REGISTRY

    classes: Any = tuple(entry for entry in REID_HEADS_REGISTRY._obj_map.values() if isinstance(entry, type))
    return {name: module for name, module in model.named_modules() if isinstance(module, classes)}


def to_level(output: torch.Tensor, model: nn.Module, name: str, role: Role) -> torch.Tensor:
    """A recorded output as a level: maps [B, C, H, W], vectors [B, D].

    A pooled map [B, D, 1, 1] becomes a vector; the tokens of a transformer become the map of their patch grid.
    """
    if output.dim() == 4 and (role in ("vector", "logits") or output.shape[2:] == (1, 1)):
        return output.flatten(1)
    if output.dim() == 3:
        grid: Any = model.get_submodule("backbone.patch_embed")
        return tokens_to_map(output, (grid.num_y, grid.num_x), num_prefix=1)
    if output.dim() not in (2, 4):
        raise ConfigError(
            f"QSD level {name!r}", value=tuple(output.shape), expected="a map [B, C, H, W] or a vector [B, D]"
        )
    return output


def _role_by_name(name: str) -> Role:
    if name.endswith((":pred_class_logits", ":cls_outputs")):
        return "logits"
    return "vector" if name.endswith((".bottleneck", ":features")) else "map"


def _head_taps(head: str) -> list[Tap]:
    return [Tap(f"{head}.bottleneck", "vector"), Tap(f"{head}:pred_class_logits", "logits")]


def _face_stages(backbone: Any) -> list[str]:
    """The last map of each resolution; of the smallest the one that the embedding is computed from."""
    if isinstance(backbone, IResNet):
        return ["layer1", "layer2", "layer3", "layer4"]
    if isinstance(backbone, IR):
        return [f"body.{end - 1}" for end in accumulate(backbone.units)]
    if isinstance(backbone, MobileFaceNet):
        return ["layers.1", "layers.3", "layers.5", "conv_sep"]
    return ["conv2_dw", "conv_3", "conv_4", "conv_6_sep"] if isinstance(backbone, MobileFaceNetQUD) else []


def _residual_stages(backbone: Any) -> list[str]:
    if not all(isinstance(getattr(backbone, f"layer{stage}", None), nn.Sequential) for stage in (2, 3, 4)):
        return []
    names = []
    for stage in (2, 3, 4):
        # The host's ResNet calls the blocks one by one, so the stage module itself never runs; its last block does,
        # followed by the last non-local block where there is one.
        non_local = getattr(backbone, f"NL_{stage}", ())
        blocks = getattr(backbone, f"layer{stage}")
        names.append(f"NL_{stage}.{len(non_local) - 1}" if len(non_local) else f"layer{stage}.{len(blocks) - 1}")
    return names


def _omni_scale_stages(backbone: Any) -> list[str]:
    return ["conv3", "conv4", "conv5"] if all(hasattr(backbone, f"conv{i}") for i in (2, 3, 4, 5)) else []


def _inverted_residual_stages(backbone: Any) -> list[str]:
    features = getattr(backbone, "features", None)
    if not isinstance(features, nn.Sequential):
        return []
    # The last block before each of the two deepest reductions of resolution, and the last block.
    reducing = [index for index, block in enumerate(features) if _stride(block) == 2]
    ends = [reducing[-2] - 1, reducing[-1] - 1, len(features) - 1]
    return [f"features.{index}" for index in ends]


def _stride(block: nn.Module) -> int:
    return max((module.stride[0] for module in block.modules() if isinstance(module, nn.Conv2d)), default=1)


def _transformer_stages(backbone: Any) -> list[str]:
    if not (hasattr(backbone, "patch_embed") and hasattr(backbone, "blocks")):
        return []
    depth = len(backbone.blocks)
    return [f"blocks.{index - 1}" for index in (depth // 2, depth * 3 // 4, depth)]
