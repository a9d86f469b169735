"""An Adam whose state is buffers, for networks that a host's optimizer must not see.

Source: Kingma and Ba, ICLR 2015; weight decay is added to the gradient, as ``torch.optim.Adam`` does.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qsd_plugin.core.distributed import all_reduce_sum, world_size
from qsd_plugin.core.errors import ConfigError


def stepped_lr(base: float, completed: int, milestones: Sequence[int], gamma: float = 0.1) -> float:
    """``base`` times ``gamma`` for every milestone that the number of completed updates has reached.

    Args:
        base: Learning rate of the first update.
        completed: Updates so far; the update of iteration n (from 1) has n - 1 before it.
        milestones: Ascending.
        gamma: Factor per milestone.
    """
    return base * gamma ** bisect.bisect_right(milestones, completed)


def joined_mean(gradients: Sequence[Tensor]) -> Tensor:
    """Gradients as one vector, averaged over the ranks, [n]."""
    return all_reduce_sum(torch.cat([part.reshape(-1) for part in gradients])) / world_size()


class FlatAdam(nn.Module):
    """Adam over a fixed list of parameters, joined to one vector; steps on gradients that it is given.

    Checkpoints of the module that owns it hold its state, at any number of ranks. Across ranks: averages gradients;
    every rank must step.

    Args:
        size: Numbers in all parameters together, n.
        lr: Learning rate, > 0.
        betas: Decay of the two moments, [0, 1).
        weight_decay: >= 0.
        eps: > 0.
        milestones: Numbers of updates behind which the learning rate falls to a tenth.

    Raises:
        ConfigError: An argument is out of range, or the milestones do not ascend.
    """

    mean: Tensor
    """First moment, [n]."""
    square: Tensor
    """Second moment, [n]."""
    steps: Tensor
    """Updates so far, 0-d int64."""

    def __init__(
        self,
        size: int,
        *,
        lr: float = 1e-4,
        betas: tuple[float, float] = (0.0, 0.999),
        weight_decay: float = 5e-4,
        eps: float = 1e-8,
        milestones: Sequence[int] = (),
    ) -> None:
        super().__init__()
        if not (lr > 0 and eps > 0 and weight_decay >= 0 and all(0 <= beta < 1 for beta in betas)):
            raise ConfigError(
                "Adam lr, betas, weight_decay, eps",
                value=(lr, betas, weight_decay, eps),
                expected="lr and eps > 0, betas in [0, 1), weight_decay >= 0",
            )
        if list(milestones) != sorted(milestones):
            raise ConfigError("Adam milestones", value=tuple(milestones), expected="ascending numbers of updates")
        self.lr, self.betas, self.weight_decay, self.eps = lr, betas, weight_decay, eps
        self.milestones = tuple(milestones)
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("square", torch.zeros(size))
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def step(self, parameters: Sequence[Tensor], gradients: Sequence[Tensor]) -> None:
        """One update, with the gradients averaged over the ranks.

        Args:
            parameters: Always the same ones in the same order; changed in place.
            gradients: One of each.
        """
        gradient = joined_mean(gradients).to(self.mean.dtype)
        if self.weight_decay:
            weights = torch.cat([parameter.reshape(-1) for parameter in parameters])
            gradient.add_(weights, alpha=self.weight_decay)
        lr = stepped_lr(self.lr, int(self.steps), self.milestones)
        first, second = self.betas
        self.mean.lerp_(gradient, 1 - first)
        self.square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
        self.steps.add_(1)
        count = int(self.steps)
        root = self.square.div(1 - second**count).sqrt_().add_(self.eps)
        update = self.mean.div(root).mul_(lr / (1 - first**count))
        start = 0
        for parameter in parameters:
            parameter.sub_(update[start : start + parameter.numel()].view_as(parameter))
            start += parameter.numel()

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        return f"lr={self.lr}, betas={self.betas}, weight_decay={self.weight_decay}, milestones={self.milestones}"
