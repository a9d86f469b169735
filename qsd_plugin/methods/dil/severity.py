"""How severe a degradation is, read off its code along one direction.

Shapes: N codes of K numbers. Source: the helpers of Huang et al.'s program, which separate the codes of the best and
the worst images by a linear support vector machine; its normal is the direction.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qsd_plugin.core.errors import DataError

_STEPS = 100


class Severity(NamedTuple):
    """A direction in the space of codes along which images get worse."""

    direction: Tensor
    """n, [K], of unit length."""
    accuracy: float
    """Share of the held-out codes on the right side, [0, 1]: whether the direction means anything."""


def fit_severity(
    codes: Tensor,
    quality: Tensor,
    generator: torch.Generator,
    *,
    fraction: float = 0.02,
    held_out: float = 0.3,
    cost: float = 1.0,
) -> Severity:
    """The direction from the codes of the best to those of the worst images.

    Args:
        codes: [N, K].
        quality: Higher is better, [N].
        generator: Decides which codes are held out.
        fraction: Share of the images that count as the best, and as the worst, (0, 0.5].
        held_out: Share of those that only tests the direction, (0, 1).
        cost: C of the support vector machine, > 0.

    Raises:
        DataError: Shapes do not fit, a number is not finite, or there are too few codes to train and to test on.
    """
    if codes.dim() != 2 or quality.shape != codes.shape[:1] or not bool(torch.isfinite(quality).all()):
        raise DataError(
            "DIL severity: codes and quality",
            value=(tuple(codes.shape), tuple(quality.shape)),
            expected="[N, K] and [N] of finite numbers",
        )
    count = math.floor(len(codes) * fraction)
    tests = round(count * held_out)
    if not (0 < fraction <= 0.5 and 1 <= tests < count):
        raise DataError(
            f"DIL severity: {count} best and {count} worst of {len(codes)} codes, {tests} of each held out",
            expected="at least one of each to train and to test on",
            remedy="Give more images, or a larger fraction.",
        )
    order = quality.argsort(stable=True)
    sides = []
    for chosen in (order[:count], order[-count:]):
        shuffled = torch.randperm(count, generator=generator).to(chosen.device)
        sides.append(codes[chosen[shuffled]].double())
    train = torch.cat([side[tests:] for side in sides])
    target = torch.ones(len(train), dtype=train.dtype, device=train.device)
    target[count - tests :] = -1
    weights = linear_svm(train, target, cost)
    right = [side[:tests] @ weights[:-1] + weights[-1] for side in sides]
    accuracy = torch.cat([right[0] > 0, right[1] < 0]).double().mean().item()
    direction = weights[:-1] / weights[:-1].norm()
    return Severity(direction.to(codes.dtype), accuracy)


def linear_svm(points: Tensor, target: Tensor, cost: float) -> Tensor:
    """Minimiser of ``|w|^2 / 2 + cost sum_i max(0, 1 - y_i w [x_i, 1])^2``, by Newton's method.

    Args:
        points: x, [N, K], float64.
        target: y, [N], -1 or 1.
        cost: > 0.

    Returns:
        w, [K + 1]; the last number is the offset, which is penalised like the others.
    """
    rows = torch.cat([points, points.new_ones(len(points), 1)], dim=1)
    weights = rows.new_zeros(rows.shape[1])
    identity = torch.eye(len(weights), dtype=rows.dtype, device=rows.device)

    def objective(candidate: Tensor) -> Tensor:
        slack = (1 - target * (rows @ candidate)).clamp(min=0)
        return candidate.square().sum() / 2 + cost * slack.square().sum()

    value = objective(weights)
    for _ in range(_STEPS):
        active = rows[target * (rows @ weights) < 1]
        goal = target[target * (rows @ weights) < 1]
        minimum = torch.linalg.solve(identity + 2 * cost * active.T @ active, 2 * cost * active.T @ goal)
        step = 1.0
        while step > 1e-6 and objective(weights + step * (minimum - weights)) > value:
            step /= 2  # the quadratic of the active points may overshoot where others become active
        candidate = weights + step * (minimum - weights)
        better = objective(candidate)
        if not better < value:
            break
        weights, value = candidate, better
    return weights


def severity(codes: Tensor, direction: Tensor) -> Tensor:
    """``d n``, [N], of codes [N, K]: larger is worse."""
    return codes @ direction


def with_severity(codes: Tensor, direction: Tensor, values: Tensor) -> Tensor:
    """``d + (s - d n) n``: codes moved along the direction until their severity is s.

    Args:
        codes: d, [N, K].
        direction: n, [K], of unit length.
        values: s, [S].

    Returns:
        [N, S, K].
    """
    shift = values[None, :] - severity(codes, direction)[:, None]
    return codes[:, None, :] + shift[:, :, None] * direction
