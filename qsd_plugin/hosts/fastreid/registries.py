"""What a config can name: registered parts, and the modules of a model that QSD can distil."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qsd_plugin.hosts.fastreid.compose import base_architecture
from qsd_plugin.hosts.fastreid.taps import default_taps
from qsd_plugin.methods.qsd import level_weights, preset


def registered_names() -> dict[str, dict[str, bool]]:
    """Registered names by the config key that takes them; ``True`` where the plugin registered the name."""
    from fastreid.layers import any_softmax

    from qsd_plugin.hosts.fastreid.samplers import HOST_SAMPLERS, SAMPLERS
    from qsd_plugin.quality.sources import QUALITY_SOURCES

    names = {
        key: {name: is_plugins(entry) for name, entry in sorted(entries.items())}
        for key, entries in host_registries().items()
    }
    return names | {
        "MODEL.HEADS.CLS_LAYER": {name: is_plugins(getattr(any_softmax, name)) for name in any_softmax.__all__},
        "DATALOADER.SAMPLER_TRAIN": {name: name in SAMPLERS for name in sorted({*HOST_SAMPLERS, *SAMPLERS})},
        "QUALITY.SOURCE": dict.fromkeys(QUALITY_SOURCES, True),
    }


def host_registries() -> dict[str, dict[str, Any]]:
    """What the host's registries hold by name, by the config key that takes the name."""
    from fastreid.data.datasets import DATASET_REGISTRY
    from fastreid.modeling.backbones.build import BACKBONE_REGISTRY
    from fastreid.modeling.heads.build import REID_HEADS_REGISTRY
    from fastreid.modeling.meta_arch.build import META_ARCH_REGISTRY

    return {
        "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY._obj_map,
        "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY._obj_map,
        "MODEL.HEADS.NAME": REID_HEADS_REGISTRY._obj_map,
        "DATASETS.NAMES": DATASET_REGISTRY._obj_map,
    }


def is_plugins(entry: object) -> bool:
    """Whether a registered class or function is the plugin's own, which the plain host does not know."""
    return str(getattr(entry, "__module__", type(entry).__module__)).startswith("qsd_plugin")


@dataclass(frozen=True)
class ListedTap:
    """A module output that ``QSD.TAPS`` can name."""

    name: str
    shape: tuple[int, ...]
    weight: str


def list_taps(cfg: Any) -> list[ListedTap]:
    """Run one training forward of the base architecture on noise and list every module that returned a usable tensor.

    The default levels come with their weight in the config's preset.
    """
    from fastreid.modeling.meta_arch.build import build_model
    from fastreid.utils.events import EventStorage

    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.META_ARCHITECTURE = base_architecture(cfg)
    cfg.MODEL.BACKBONE.PRETRAIN = False
    cfg.MODEL.HEADS.NUM_CLASSES = cfg.MODEL.HEADS.NUM_CLASSES or 8
    model = build_model(cfg).train()
    shapes: dict[str, tuple[int, ...]] = {}

    def remember(name: str, output: object) -> None:
        if isinstance(output, torch.Tensor) and output.dim() in (2, 3, 4):
            shapes[name] = tuple(output.shape)
        elif isinstance(output, dict):
            for key, value in output.items():
                remember(f"{name}:{key}", value)

    handles = [
        module.register_forward_hook(lambda _module, _inputs, output, name=name: remember(name, output))
        for name, module in model.named_modules()
        if name
    ]
    height, width = cfg.INPUT.SIZE_TRAIN
    images = torch.rand(4, 3, height, width, device=model.device) * 255
    with EventStorage(0), torch.no_grad():
        model({"images": images, "targets": torch.tensor([0, 0, 1, 1], device=model.device)})
    for handle in handles:
        handle.remove()
    weights = level_weights(preset(cfg.QSD.PRESET), {tap.name: tap.role for tap in default_taps(model)})
    return [ListedTap(name, shape, f"{weights[name]:g}" if name in weights else "") for name, shape in shapes.items()]
