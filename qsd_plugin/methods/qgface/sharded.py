"""AdaFace's margin over a shard of the classes, for heads whose class rows are spread over the ranks.

Shapes: B rows of the whole batch, C_r classes of this rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qsd_plugin.methods.qgface.gates import check_choice
from qsd_plugin.methods.qgface.statistics import EPS

#: What becomes of the margin's derivative in the backward pass.
GRADIENTS = ("exact", "straight_through")


def sharded_adaface_logits(
    cosine: Tensor,
    labels: Tensor,
    scaler: Tensor,
    *,
    margin: float = 0.4,
    scale: float = 64.0,
    gate: Tensor | None = None,
    gradient: str = "exact",
) -> Tensor:
    """:func:`~.head.adaface_logits` for rows some of which have their class on another rank.

    ``exact`` differentiates the margin, as AdaFace's program and :class:`~.head.AdaFaceHead` do; ``straight_through``
    takes it for a constant, as arcface_torch does with ArcFace's: the gradient of a cross entropy with respect to the
    cosine is then ``s gate (p - onehot)``. Across ranks: no communication. Precision: that of ``cosine``.

    Args:
        cosine: Between embeddings and this rank's class centres, [B, C_r]; C_r may be 0.
        labels: Index of the true class among them, -1 where another rank holds it, [B] int64.
        scaler: k in [-1, 1], [B, 1].
        margin: m >= 0.
        scale: s > 0.
        gate: Factor on each row, [B, 1]; none is 1.
        gradient: One of :data:`GRADIENTS`.

    Returns:
        [B, C_r].

    Raises:
        ConfigError: Unknown gradient.

    Source: Kim et al., "AdaFace", CVPR 2022, Equations 16 and 17.
    """
    check_choice("gradient of the margin", gradient, GRADIENTS)
    factor = scale if gate is None else scale * gate
    clamped = cosine.clamp(-1 + EPS, 1 - EPS)
    if clamped.shape[1] == 0:
        return clamped * factor
    index = labels.clamp(min=0)[:, None]
    own = clamped.gather(1, index)
    angle = (own if gradient == "exact" else own.detach()).acos() - margin * scaler
    target = angle.clamp(EPS, math.pi - EPS).cos() - margin * (1 + scaler)
    if gradient == "straight_through":
        target = own + (target - own.detach())
    return clamped.scatter(1, index, torch.where(labels[:, None] >= 0, target, own)) * factor
