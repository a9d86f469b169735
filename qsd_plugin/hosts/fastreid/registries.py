"""What a config can name: registered parts, and the modules of a model that QSD can distil."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qsd_plugin.hosts.fastreid.taps import default_taps
from qsd_plugin.methods.qsd import level_weights, preset


def registered_names() -> dict[str, dict[str, bool]]:
    """Registered names by the config key that takes them; ``True`` where the plugin registered the name."""
    from fastreid.data.datasets import DATASET_REGISTRY
    from fastreid.layers import any_softmax
    from fastreid.modeling.backbones.build import BACKBONE_REGISTRY
    from fastreid.modeling.heads.build import REID_HEADS_REGISTRY
    from fastreid.modeling.meta_arch.build import META_ARCH_REGISTRY

    from qsd_plugin.hosts.fastreid.samplers import HOST_SAMPLERS, SAMPLERS
    from qsd_plugin.quality.sources import QUALITY_SOURCES

    host = {
        "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
        "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
        "MODEL.HEADS.NAME": REID_HEADS_REGISTRY,
        "DATASETS.NAMES": DATASET_REGISTRY,
    }
    names = {
        key: {name: _module(entry).startswith("qsd_plugin") for name, entry in sorted(registry._obj_map.items())}
        for key, registry in host.items()
    }
    samplers = {name: name in SAMPLERS for name in sorted({*HOST_SAMPLERS, *SAMPLERS})}
    layers = {name: _module(getattr(any_softmax, name)).startswith("qsd_plugin") for name in any_softmax.__all__}
    return names | {
        "MODEL.HEADS.CLS_LAYER": layers,
        "DATALOADER.SAMPLER_TRAIN": samplers,
        "QUALITY.SOURCE": dict.fromkeys(QUALITY_SOURCES, True),
    }


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
    cfg.MODEL.META_ARCHITECTURE = cfg.QSD.BASE if cfg.MODEL.META_ARCHITECTURE == "QSD" else cfg.MODEL.META_ARCHITECTURE
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


def _module(entry: object) -> str:
    return str(getattr(entry, "__module__", type(entry).__module__))
