"""Stage 1 with tiny networks on made-up images of 64 x 32 pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qsd_plugin.core.streams import torch_stream
from qsd_plugin.methods.dil import Networks, Pair, PhaseSchedule, Stage1, Stage1Options, Stage1Trainer, dil_networks
from qsd_plugin.networks.resnet_stages import ResNetStages

NUM_CLASSES = 5


def small_networks(*, seed: int = 0, width: float = 1 / 16, **options: Any) -> Networks:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        trunk = ResNetStages(blocks=(1, 1, 1), block="basic", width=8)
        return dil_networks(NUM_CLASSES, trunk=trunk, width=width, **options)


def small_stage(*, seed: int = 0, dropout: float = 0.5, scales: int = 2, **options: Any) -> Stage1:
    networks = small_networks(seed=seed, dropout=dropout, degradation_scales=scales)
    return Stage1(networks, options=Stage1Options(**options))


def small_trainer(schedule: PhaseSchedule | None = None, **options: Any) -> Stage1Trainer:
    return Stage1Trainer(small_stage(**options), PhaseSchedule() if schedule is None else schedule)


def pair(phase: str, count: int = 2, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> Pair:
    """Of a phase; the worse image of a paired one is a blurred copy."""
    better, other = pictures(count, 2 * seed).to(dtype), pictures(count, 2 * seed + 1).to(dtype)
    labels = torch.arange(count) % NUM_CLASSES
    worse = blurred(better) if phase == "paired" else blurred(other)
    return Pair(phase, better, worse, labels, (labels + 2) % NUM_CLASSES)


def pictures(count: int, seed: int) -> Tensor:
    coarse = torch.randn(count, 3, 16, 8, generator=torch_stream(seed, "pictures"))
    fine = torch.randn(count, 3, 64, 32, generator=torch_stream(seed, "grain"))
    return torch.nn.functional.interpolate(coarse, size=(64, 32), mode="nearest") + 0.3 * fine


def blurred(images: Tensor) -> Tensor:
    small = torch.nn.functional.avg_pool2d(images, 4)
    return torch.nn.functional.interpolate(small, size=images.shape[-2:], mode="bilinear", align_corners=False)
