"""Cross entropy over more classes than one rank holds: every rank has the logits of its own classes only.

Shapes: B rows, the same on every rank; C_r classes of rank r.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsd_plugin.core.distributed import all_reduce_max, all_reduce_sum
from qsd_plugin.core.errors import ConfigError


def sharded_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross entropy of rows whose classes are spread over the ranks.

    Equal to ``torch.nn.functional.cross_entropy`` of all logits side by side; without a process group it is that.
    Across ranks: reduces statistics (the maximum, then the sum, of B numbers), and every rank gets the same loss. The
    gradient of ``logits`` is exact, this rank's columns of the whole gradient, so what lies below them (embeddings
    gathered from all ranks) gets the whole gradient as the **sum** over ranks. Precision: float32 outside autocast
    (float64 stays), shifted by the maximum over all ranks.

    Args:
        logits: Of this rank's classes, margins and scale included, [B, C_r]; C_r may differ between ranks and be 0.
        labels: Index of the row's class among this rank's, -1 where another rank holds it, [B] int64. A row that no
            rank holds is left out of the mean.

    Returns:
        0-d.

    Raises:
        ConfigError: Shapes do not fit.
    """
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise ConfigError(
            "Sharded cross entropy", value=(tuple(logits.shape), tuple(labels.shape)), expected="[B, C_r] and [B]"
        )
    with torch.autocast(logits.device.type, enabled=False):
        precise = logits if logits.dtype == torch.float64 else logits.float()
        loss: Tensor = _ShardedCrossEntropy.apply(precise, labels)  # type: ignore[no-untyped-call]
    return loss


class _ShardedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, logits: Tensor, labels: Tensor) -> Tensor:
        held_here = (labels >= 0).to(logits.dtype)
        index = labels.clamp(min=0)[:, None]
        if logits.shape[1]:
            shift = all_reduce_max(logits.amax(dim=1))
            own = (logits.gather(1, index)[:, 0] - shift) * held_here
        else:
            shift = all_reduce_max(logits.new_full((len(logits),), torch.finfo(logits.dtype).min))
            own = held_here
        probabilities = (logits - shift[:, None]).exp_()
        total, target, held = all_reduce_sum(torch.stack([probabilities.sum(dim=1), own, held_here]))
        count = held.sum().clamp(min=1)
        probabilities.div_(total[:, None])
        ctx.save_for_backward(probabilities, index, held_here / count, held / count)
        loss: Tensor = (held * (total.log() - target)).sum() / count
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None]:
        probabilities, index, own_weight, weight = ctx.saved_tensors
        gradient = probabilities * (weight * upstream)[:, None]
        if gradient.shape[1]:
            gradient.scatter_add_(1, index, -(own_weight * upstream)[:, None])
        return gradient, None
