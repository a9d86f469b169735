"""The margin softmax of ArcFace and its relatives as one function: logits ``s (cos(m1 theta + m2) - m3)``.

Shapes: B rows, C classes (of this rank, where classes are spread over ranks).
Source: Deng et al., "ArcFace", CVPR 2019, Equation 4; CosFace (m3 alone): Wang et al., CVPR 2018; SphereFace (m1
alone): Liu et al., CVPR 2017. Straight-through gradients are those of InsightFace's arcface_torch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qsd_plugin.core.errors import ConfigError, did_you_mean

#: What :func:`combined_margin_logits` can do with the derivative of the angular margin.
GRADIENTS = ("straight_through", "exact")

# The derivative of the angle is infinite at a cosine of 1: at most 1 / sqrt(2 x 1e-6) = 707 is let through.
_EDGE = 1e-6


def combined_margin_logits(
    cosine: Tensor,
    labels: Tensor,
    *,
    m1: float = 1.0,
    m2: float = 0.0,
    m3: float = 0.0,
    scale: float = 64.0,
    gradient: str = "straight_through",
) -> Tensor:
    """``s (cos(m1 theta + m2) - m3)`` at the true class, ``s cos(theta)`` at the others, for a cross entropy.

    ``straight_through`` takes the margin for a constant in the backward pass: the gradient of a cross entropy with
    respect to the cosine is ``s (p - onehot)``, what arcface_torch trains with. ``exact`` multiplies it at the true
    class by the derivative ``m1 sin(m1 theta + m2) / sin(theta)``, what fast-reid's ``ArcSoftmax`` and the paper's
    equation amount to. It grows for small angles, is cut to 0 where the cosine is within 1e-6 of 1 or -1, and changes
    its sign beyond ``m1 theta + m2 = pi``, where the margin makes the task easier: no easy margin is built in, as in
    both hosts. Without an angular margin (m1 1, m2 0) both are the same.

    arcface_torch ignores m1 and m2 wherever m3 > 0; here all three count. Across ranks: no communication; labels of -1
    leave a row without a true class, as :func:`~qsd_plugin.core.sharded_cross_entropy.sharded_cross_entropy` wants it.
    Precision: float32 outside autocast (float64 stays). Nothing waits for the device, and nothing is changed in place.

    Args:
        cosine: Between embeddings and class centres, [B, C]; values beyond -1 to 1 by rounding count as -1 and 1.
        labels: True class, 0 to C - 1 or -1, [B] int64.
        m1: Factor on the angle, > 0.
        m2: Added to the angle, radians, >= 0.
        m3: Taken from the cosine, >= 0.
        scale: s, > 0.
        gradient: ``"straight_through"`` or ``"exact"``.

    Returns:
        [B, C].

    Raises:
        ConfigError: Shapes do not fit, or a margin, the scale or the gradient's name is impossible.
    """
    check_margins(m1, m2, m3, scale, gradient)
    if cosine.dim() != 2 or labels.shape != cosine.shape[:1]:
        raise ConfigError(
            "Margin softmax", value=(tuple(cosine.shape), tuple(labels.shape)), expected="cosines [B, C] and labels [B]"
        )
    with torch.autocast(cosine.device.type, enabled=False):
        precise = cosine if cosine.dtype == torch.float64 else cosine.float()
        if precise.shape[1] == 0:
            return precise * scale
        index = labels.clamp(min=0)[:, None]
        target = precise.gather(1, index)
        with_margin = target - m3 if (m1, m2) == (1.0, 0.0) else _angular(target, m1, m2, m3, gradient)
        return precise.scatter(1, index, torch.where(labels[:, None] >= 0, with_margin, target)) * scale


def arcface_logits(
    cosine: Tensor, labels: Tensor, *, margin: float = 0.5, scale: float = 64.0, gradient: str = "straight_through"
) -> Tensor:
    """ArcFace: ``margin`` radians on the angle. See :func:`combined_margin_logits`."""
    return combined_margin_logits(cosine, labels, m2=margin, scale=scale, gradient=gradient)


def cosface_logits(cosine: Tensor, labels: Tensor, *, margin: float = 0.4, scale: float = 64.0) -> Tensor:
    """CosFace: ``margin`` taken from the cosine, with its exact gradient. See :func:`combined_margin_logits`."""
    return combined_margin_logits(cosine, labels, m3=margin, scale=scale)


def check_margins(m1: float, m2: float, m3: float, scale: float, gradient: str) -> None:
    """Refuse impossible settings of :func:`combined_margin_logits`.

    Raises:
        ConfigError: Names the one that is impossible.
    """
    for name, value in (("m1", m1), ("scale", scale)):
        if not value > 0:
            raise ConfigError(f"Margin softmax {name}", value=value, expected="> 0")
    for name, value in (("m2", m2), ("m3", m3)):
        if not value >= 0:
            raise ConfigError(f"Margin softmax {name}", value=value, expected=">= 0")
    if gradient not in GRADIENTS:
        raise ConfigError("Gradient of the margin", value=gradient, remedy=did_you_mean(gradient, GRADIENTS))


def _angular(target: Tensor, m1: float, m2: float, m3: float, gradient: str) -> Tensor:
    if gradient == "exact":
        return torch.cos(m1 * target.clamp(-1 + _EDGE, 1 - _EDGE).acos() + m2) - m3
    fixed = target.detach()
    return target + (torch.cos(m1 * fixed.clamp(-1, 1).acos() + m2) - m3 - fixed)
