"""``QGFACE.CONTRAST.QUEUE: moco``: keys from a momentum encoder, for comparison with the proxy queue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.hosts.fastreid.quality_margin_heads import EMBEDDING, NORM
from qsd_plugin.networks.taps import TapRecorder

#: Name of the submodule; the rest of its state-dict keys is the base architecture's.
PREFIX = "qgface_momentum."


class KeyMixin(nn.Module):
    """Put in front of a host architecture: a network whose embeddings are keys, without losses.

    Between calls of :class:`KeyEncoder` it is in eval mode, so that nothing of the host looks for statistics in it.
    """

    def train(self, mode: bool = True) -> KeyMixin:
        """Stays in eval mode, whatever ``mode``."""
        return super().train(False)

    def losses(self, *outputs: Any) -> dict[str, Tensor]:
        """None."""
        return {}


class KeyEncoder:
    """Embeddings and norms of a batch by the momentum encoder, which computes as in training.

    As in the authors' program it normalises with the batch's own statistics, and its dropout is on.

    Args:
        network: From :func:`~.qsd_teacher.build_teacher`; registered by the model that owns it.
    """

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._recorder = TapRecorder(network, [f"heads:{EMBEDDING}", f"heads:{NORM}"])

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """Unit embeddings [N, D] and norms [N, 1], without graph."""
        with self._training(), self._recorder as outputs:
            self._network(batch)
        return outputs[f"heads:{EMBEDDING}"], outputs[f"heads:{NORM}"]

    @contextmanager
    def _training(self) -> Iterator[None]:
        modules = list(self._network.modules())
        for module in modules:
            module.training = True
        try:
            yield
        finally:
            for module in modules:
                module.training = False
