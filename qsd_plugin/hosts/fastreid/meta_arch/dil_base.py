"""What DIL's three architectures share: normalised images, and random numbers that a resumed run repeats."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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
        self._untouched: list[nn.Parameter] = []

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
        without; :meth:`untouched` has these. In a single process, and without gradients, nothing changes.
        """
        self._untouched = []
        if world_size() == 1 or not torch.is_grad_enabled():
            return losses
        leaves = leaves_of(losses.values())
        trained = [part for part in self.parameters() if part.requires_grad]
        self._untouched = [part for part in trained if part not in leaves]
        first, *_ = losses
        return {**losses, first: losses[first] + torch.stack([part.sum() for part in trained]).sum() * 0.0}

    def untouched(self) -> list[nn.Parameter]:
        """Parameters that the last step's losses do not depend on but have a gradient of zero, for :meth:`reached`."""
        return self._untouched


def leaves_of(losses: Iterable[Tensor]) -> set[Tensor]:
    """Every leaf that a backward pass from ``losses`` would give a gradient."""
    waiting = [loss.grad_fn for loss in losses if loss.grad_fn is not None]
    seen, leaves = set(waiting), set()
    while waiting:
        node = waiting.pop()
        variable = getattr(node, "variable", None)  # of the nodes that accumulate
        if variable is not None:
            leaves.add(variable)
        for following, _ in node.next_functions:
            if following is not None and following not in seen:
                seen.add(following)
                waiting.append(following)
    return leaves


def images_of(batch: Batch | Tensor) -> Tensor:
    """The images of what the host feeds to evaluate."""
    return batch if isinstance(batch, Tensor) else batch["images"]
