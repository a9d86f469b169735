"""The statistics of embedding norms that tell how good an image is: AdaFace's moving mean and deviation.

Shapes: B rows of this rank.
Source: Kim et al., "AdaFace", CVPR 2022, Equations 14 and 15; Song and Wang, "QGFace", arXiv 2312.17494.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.distributed import all_reduce_sum
from qsd_plugin.core.errors import ConfigError

#: Norms are clipped to this range before anything is computed from them.
NORM_RANGE = (1e-3, 100.0)
#: Added to the deviation before it divides.
EPS = 1e-3


def unit_and_norm(embedding: Tensor) -> tuple[Tensor, Tensor]:
    """Direction and length of raw embeddings: [B, D] to ([B, D] unit, [B, 1]), float32 outside autocast.

    The norm is that in front of the normalisation: behind a batch norm it no longer tells quality.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        precise = embedding if embedding.dtype == torch.float64 else embedding.float()
        return F.normalize(precise, dim=1), torch.linalg.vector_norm(precise, dim=1, keepdim=True)


def norm_moments(norm: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and unbiased standard deviation of the clipped norms of all ranks together.

    Across ranks: reduces statistics (count, sum and sum of squares in float64); the numbers of rows may differ. Every
    rank must make the call.

    Args:
        norm: [B, 1]; receives no gradient.

    Returns:
        Two 0-d float64; the deviation of a single row is 0.
    """
    clipped = norm.detach().double().clamp(*NORM_RANGE)
    local = torch.stack([torch.ones_like(clipped).sum(), clipped.sum(), clipped.square().sum()])
    count, total, squares = all_reduce_sum(local).unbind()
    mean = total / count.clamp(min=1)
    variance = (squares - total * mean) / (count - 1).clamp(min=1)
    return mean, variance.clamp(min=0).sqrt()


def margin_scaler(norm: Tensor, mean: Tensor, std: Tensor, h: float = 0.333) -> Tensor:
    """``clip(h (norm - mean) / (std + 1e-3), -1, 1)``: -1 for the worst images, 1 for the best; without gradient.

    Args:
        norm: [B, 1], clipped here.
        mean: 0-d.
        std: 0-d, >= 0.
        h: Concentration: a norm 1 / h deviations from the mean is at the end of the range.

    Returns:
        [B, 1].
    """
    clipped = norm.detach().clamp(*NORM_RANGE)
    return (h * (clipped - mean) / (std + EPS)).clamp(-1, 1)


class NormStatistics(nn.Module):
    """Moving mean and deviation of the embedding norms, ``new = momentum x batch + (1 - momentum) x old``.

    A start far from the norms of the network takes ``1 / momentum`` steps and more to forget. From 0 and 0, as QGFace's
    program starts, every image counts as perfect for about the first hundred steps. ``debias`` starts there too, but
    divides by ``1 - (1 - momentum)^updates``, which makes the first batch's moments the first statistics.

    State: three buffers, so a resumed run goes on exactly. Across ranks: reduces statistics; the buffers are the same
    on every rank, and data-parallel training need not broadcast them. Nothing waits for the device.

    Args:
        momentum: Weight of the new batch, in (0, 1] (AdaFace's t_alpha).
        mean_init: Start of the mean.
        std_init: Start of the deviation, >= 0.
        debias: Start from nothing instead; ``mean_init`` and ``std_init`` are not used.

    Raises:
        ConfigError: An argument is out of range.
    """

    mean: Tensor
    """0-d: moving mean, before the correction of ``debias``."""
    std: Tensor
    """0-d: moving deviation, likewise."""
    updates: Tensor
    """0-d int64: batches seen."""

    def __init__(
        self, *, momentum: float = 0.01, mean_init: float = 20.0, std_init: float = 100.0, debias: bool = False
    ) -> None:
        super().__init__()
        if not 0 < momentum <= 1:
            raise ConfigError("Norm statistics: momentum", value=momentum, expected="a number in (0, 1]")
        if not std_init >= 0:
            raise ConfigError("Norm statistics: std_init", value=std_init, expected=">= 0")
        self.momentum, self.debias = momentum, debias
        self.register_buffer("mean", torch.tensor(0.0 if debias else float(mean_init)))
        self.register_buffer("std", torch.tensor(0.0 if debias else float(std_init)))
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, norm: Tensor) -> None:
        """Take the norms [B, 1] of a batch into the statistics; every rank must make the call."""
        for buffer, moment in zip((self.mean, self.std), norm_moments(norm), strict=True):
            buffer.lerp_(moment.to(buffer.dtype), self.momentum)
        self.updates.add_(1)

    def current(self) -> tuple[Tensor, Tensor]:
        """Mean and deviation to judge norms by, 0-d each."""
        if not self.debias:
            return self.mean, self.std
        seen = 1 - (1 - self.momentum) ** self.updates.double()
        seen = seen.clamp(min=torch.finfo(torch.float32).tiny).to(self.mean.dtype)  # 0 / tiny before the first batch
        return self.mean / seen, self.std / seen

    @torch.no_grad()
    def scaler(self, norm: Tensor, h: float = 0.333) -> Tensor:
        """:func:`margin_scaler` of the norms [B, 1] under the current statistics, [B, 1]."""
        return margin_scaler(norm, *self.current(), h)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return f"momentum={self.momentum}, debias={self.debias}"
