"""What DIL's three architectures share: normalised images, and random numbers that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.core.distributed import rank, world_size
from qsd_plugin.core.streams import torch_stream
from qsd_plugin.hosts.fastreid.meta_arch.dil_config import check_config

Batch = dict[str, Any]
Losses = dict[str, Tensor]


class DILArchitecture(nn.Module):
    """Base of the three.

    Args:
        cfg: The host's config.

    Raises:
        ConfigError: Settings of ``DIL`` that cannot work.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, cfg: Any) -> None:
        super().__init__()
        check_config(cfg)
        for name in ("mean", "std"):
            values = torch.tensor(cfg.MODEL[f"PIXEL_{name.upper()}"]).view(1, -1, 1, 1)
            self.register_buffer(f"pixel_{name}", values, persistent=False)
        self._seed = max(cfg.SEED, 0)

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.pixel_mean.device

    def normalised(self, images: Tensor) -> Tensor:
        """RGB [B, 3, H, W] from 0 to 255 to what DIL's networks see."""
        return (images.to(self.device) - self.pixel_mean) / self.pixel_std

    @contextmanager
    def repeatable(self, purpose: str, step: int) -> Iterator[None]:
        """Inside, torch's global generators (dropout) depend on seed, rank, purpose and step only."""
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(torch_stream(self._seed, purpose, rank(), step).initial_seed())
            yield

    def reached(self, losses: Losses) -> Losses:
        """The losses, across ranks with a zero added that every trained parameter has a part in.

        Data-parallel training waits for the gradients of all parameters, and a phase or a loss that is off leaves some
        without. In a single process, and without gradients, nothing changes.
        """
        if world_size() == 1 or not torch.is_grad_enabled():
            return losses
        zero = torch.stack([part.sum() for part in self.parameters() if part.requires_grad]).sum() * 0.0
        first, *_ = losses
        return {**losses, first: losses[first] + zero}


def images_of(batch: Batch | Tensor) -> Tensor:
    """The images of what the host feeds to evaluate."""
    return batch if isinstance(batch, Tensor) else batch["images"]
