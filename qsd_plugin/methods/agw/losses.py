"""Losses of the AGW baseline that fast-reid lacks: weighted-regularised triplet and centre loss.

Shapes: B images on this rank, D embedding, C identities (classes).
Source: Ye et al., "Deep Learning for Person Re-Identification: A Survey and Outlook", TPAMI 2021 (AGW); centre loss:
Wen et al., ECCV 2016.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.distributed import all_reduce_sum
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.core.streams import torch_stream

_WEIGHT_EPS = 1e-6
_SQUARED_MIN, _SQUARED_MAX = 1e-12, 1e12


def weighted_regularised_triplet(features: Tensor, identities: Tensor, *, stable: bool = False) -> Tensor:
    """``mean_i log(1 + exp(p_i - n_i))`` with softly mined distances to positives and negatives.

    p is the mean distance to the anchor's positives (itself included, at about 0) with weights proportional to exp(d),
    n the mean distance to its negatives with weights proportional to exp(-d); each sum of weights has 1e-6 added.
    Distances are Euclidean, computed in float32 (float64 stays). Across ranks: local mean, mining within the rank.

    Args:
        features: Embeddings before the neck, not normalised, [B, D].
        identities: [B].
        stable: The authors' program shifts the exponents of the negatives by a maximum that includes masked zeros,
            i.e. not at all: with distances above about 15 the weights drown in the added 1e-6 and n goes to 0.
            ``True`` shifts by the true maximum, which is the definition at any distance. While distances are small
            both agree; at distances around 8 they differ by less than 1e-3.

    Returns:
        0-d. (log(1 + exp(x)) is computed as softplus: equal where the authors' form is finite, and finite where not.)
    """
    with torch.autocast(features.device.type, enabled=False):
        distance = _euclidean(features if features.dtype == torch.float64 else features.float())
        positive = identities[:, None] == identities[None, :]
        furthest = _soft_mean(distance, distance, positive, stable)
        closest = _soft_mean(distance, -distance, ~positive, stable)
        return F.softplus(furthest - closest).mean()


def center_loss(features: Tensor, centers: Tensor, identities: Tensor) -> Tensor:
    """Mean squared distance to the own centre, clamped to [1e-12, 1e12].

    The authors clamp a masked B x C matrix, which adds a constant (C - 1) 1e-12 without gradient; it is left out.

    Args:
        features: [B, D].
        centers: [C, D].
        identities: [B], in [0, C).

    Returns:
        0-d.
    """
    squared = (features - centers[identities]).square().sum(dim=1)
    return squared.clamp(_SQUARED_MIN, _SQUARED_MAX).mean()


class CenterLoss(nn.Module):
    """Centre loss that moves its own centres, so that a host with a single optimizer can use it.

    The authors give the centres an SGD of their own and undo the loss weight in their gradient; one step is
    ``c <- c - lr (2 n_c / B) (c - mean f)`` over the n_c images of class c. Here a training forward with gradients
    enabled makes that step in closed form right after the loss is computed, from the same features and centres as
    theirs, which steps after the backward pass. Under ``no_grad`` and in eval mode nothing moves.

    Centres start from N(0, 1) and live in the buffer ``centers``: no optimizer sees them, checkpoints keep them.
    Across ranks: the loss is a local mean (averaged gradients equal one process for equal batch sizes); the step of
    the centres reduces statistics, so they stay equal on all ranks and equal to one process on the whole batch.
    Precision: float32, outside autocast. Features that are not finite move no centre.

    Args:
        num_classes: C; may be 0 where only evaluation follows.
        dim: D.
        weight: Factor on the returned loss; the centres do not depend on it.
        lr: Step size of the centres, >= 0.
        seed: Seed of the initial centres, the same on every rank.

    Raises:
        ConfigError: A negative or non-finite weight or lr; on call, features of another size.
    """

    centers: Tensor

    def __init__(self, num_classes: int, dim: int, *, weight: float = 5e-4, lr: float = 0.5, seed: int = 0) -> None:
        super().__init__()
        for name, value in (("weight", weight), ("lr", lr)):
            if not 0 <= value < math.inf:
                raise ConfigError(f"Centre loss {name}", value=value, expected="a finite number >= 0")
        self.weight = weight
        self.lr = lr
        generator = torch_stream(seed, "center_loss")
        self.register_buffer("centers", torch.randn(num_classes, dim, generator=generator))

    def forward(self, features: Tensor, identities: Tensor) -> Tensor:
        """``weight`` times the loss of a batch, and one step of the centres while training.

        Args:
            features: [B, D].
            identities: [B], in [0, num_classes).

        Returns:
            0-d.

        Raises:
            ConfigError: D is not the size of the centres.
        """
        if features.dim() != 2 or features.shape[1] != self.centers.shape[1]:
            raise ConfigError(
                "Centre loss features", value=tuple(features.shape), expected=f"[B, {self.centers.shape[1]}]"
            )
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            loss = self.weight * center_loss(features, self.centers, identities)
            if self.training and torch.is_grad_enabled():
                self._step(features.detach(), identities)
        return loss

    @torch.no_grad()
    def _step(self, features: Tensor, identities: Tensor) -> None:
        offset = self.centers[identities] - features
        # Beyond the clamp, and for NaN, the loss has no gradient.
        within = offset.square().sum(dim=1, keepdim=True) <= _SQUARED_MAX
        gradient = torch.zeros_like(self.centers).index_add_(0, identities, torch.where(within, offset, 0.0))
        batch = all_reduce_sum(torch.full((), float(len(features)), device=features.device))
        self.centers.sub_(all_reduce_sum(gradient) * (2 * self.lr / batch))

    def extra_repr(self) -> str:
        """The options, for ``print(model)``."""
        classes, dim = self.centers.shape
        return f"num_classes={classes}, dim={dim}, weight={self.weight}, lr={self.lr}"


def _euclidean(features: Tensor) -> Tensor:
    """All pairwise distances, [B, B]; the clamp keeps the root's gradient finite at 0."""
    norms = features.square().sum(dim=1)
    squared = torch.addmm(norms[:, None] + norms[None, :], features, features.t(), alpha=-2)
    return squared.clamp(min=_SQUARED_MIN).sqrt()


def _soft_mean(distance: Tensor, score: Tensor, mask: Tensor, stable: bool) -> Tensor:
    """Per row, the mean of ``distance`` under the mask with weights proportional to exp(score)."""
    masked = score.masked_fill(~mask, torch.finfo(score.dtype).min if stable else 0.0)
    shift = masked.amax(dim=1, keepdim=True)
    # Zero exponents outside the mask: there the true maximum may be exceeded, and inf * 0 is NaN.
    weights = torch.where(mask, score - shift, 0.0).exp() * mask
    weights = weights / (weights.sum(dim=1, keepdim=True) + _WEIGHT_EPS)
    return (distance * weights).sum(dim=1)
