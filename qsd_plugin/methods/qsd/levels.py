"""The level losses of QSD: energy maps of intermediate stages and vectors such as the embedding.

Across ranks: reduces statistics. A level's *value* is that of the whole batch on every rank; its *gradient* is this
rank's part times the number of ranks, so that the averaging of data-parallel training yields the gradient of the whole
batch. All statistics enter it as constants, hence no collective is differentiated through.

Shapes: B pairs on this rank, C channels, H x W map, D vector length, P kept pairs of the whole batch (0-d tensor).
Source: Ou et al., IEEE TMM 2024, doi 10.1109/TMM.2024.3358697; formulae as in the authors' program.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qsd_plugin.core.distributed import all_reduce_max, all_reduce_sum, world_size

#: Floor of the energy range, relative to the largest energy, so that constant maps give a finite loss.
RANGE_EPS = 1e-12
COSINE_EPS = 1e-6
#: Per-image normalisations of energy maps, besides none.
MAP_NORMS = ("l2", "rms")


def energy_map(features: Tensor, norm: str | None = None) -> Tensor:
    """Channel mean of the squared activations, ``A_hw = (1/C) sum_c F_chw^2``.

    Args:
        features: [B, C, H, W], in a precision that can hold the squares.
        norm: ``None`` (authors') leaves the map as it is; ``"l2"`` scales it to unit length, as attention transfer
            does; ``"rms"`` to root mean square 1, which is the former times sqrt(H W).

    Returns:
        [B, H, W].

    With unit length the level shrinks as the map grows: its mean squared distance is ``2 (1 - cos) / (H W)`` and its
    range about ``r / sqrt(H W)``, so ``L = 4 (1 - cos) / (r sqrt(H W))`` with r the range in units of the root mean
    square (a few). At 16 x 8 that is about a tenth of a vector level with the same cosine, at 32 x 16 a twentieth. With
    root mean square 1 it is ``4 (1 - cos) / r`` at every size: the size of a vector level.
    """
    energy: Tensor = _MeanSquare.apply(features)  # type: ignore[no-untyped-call]
    if norm is None:
        return energy
    unit = F.normalize(energy.flatten(1), dim=1).view_as(energy)
    return unit if norm == "l2" else unit * math.sqrt(energy.shape[1] * energy.shape[2])


def map_level(
    student: Tensor,
    teacher: Tensor,
    keep: Tensor,
    pairs: Tensor,
    *,
    distance: str = "l2",
    scale_grad: str = "attached",
    weight: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """``L = (2 / R) E``, with E the mean distance of the maps and R the range of the students' energies.

    E averages ``(A(s) - sg A(t))^2`` (``"l1"``: the absolute value) over kept pairs and pixels; R = max A(s) - min A(s)
    over all kept student maps of the whole batch, at least ``RANGE_EPS`` times the largest energy. With S the sum of
    distances and N their number, this rank back-propagates

        2/(N R) S_rank - 2 S/(N R^2) (sum of A(s) at the maximum / ties - the same at the minimum)

    with S, N, R constant. The second part, d L / d R, is dropped by ``scale_grad="detached"``; equal extreme values
    share it evenly, like :func:`torch.amax`. It acts on single pixels, yet dominates the map gradient.

    Args:
        student: Energy maps of the student images, [B, H, W], >= 0.
        teacher: Energy maps of the teacher images, [B, H, W]; receives no gradient.
        keep: [B] bool.
        pairs: P.
        distance: ``"l2"`` or ``"l1"``.
        scale_grad: ``"attached"`` (authors') or ``"detached"``.
        weight: Weight of each pair in E, [B], of mean 1 over the kept pairs of the whole batch; R ignores it.

    Returns:
        The level (0 with zero gradients if P = 0) and R (0 if P = 0), both 0-d.
    """
    with torch.no_grad():
        mask = keep[:, None, None]
        difference = torch.where(mask, student - teacher, 0.0)
        error = difference.square() if distance == "l2" else difference.abs()
        slope_of_error = 2 * difference if distance == "l2" else difference.sign()
        if weight is not None:
            weights = weight.to(error.dtype)[:, None, None]
            error, slope_of_error = error * weights, slope_of_error * weights
        error_sum = all_reduce_sum(error.sum().double())
        peak, floor, teacher_peak = _extremes(student, teacher, keep)

        # Scalars in float64: 1 / R^2 of nearly constant maps leaves the range of float32. Any R will do when P = 0.
        some = pairs > 0
        spread = torch.where(some, peak.double() - floor.double(), 0.0)
        smallest = torch.where(some, RANGE_EPS * torch.maximum(peak, teacher_peak).double(), 1.0)
        smallest = smallest.clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.maximum(spread, smallest)
        per_error = 2 / (pairs.clamp(min=1) * (student.shape[1] * student.shape[2]) * scale)
        value = per_error * error_sum
        gradient = slope_of_error * per_error.to(error.dtype)
        if scale_grad == "attached":
            slope = torch.where(spread > smallest, value / scale, 0.0).to(error.dtype)
            at_peak, at_floor = mask & (student == peak), mask & (student == floor)
            ties = all_reduce_sum(torch.stack([at_peak.sum(), at_floor.sum()])).clamp(min=1)
            gradient = gradient - at_peak * (slope / ties[0]) + at_floor * (slope / ties[1])
    return _with_known_gradient(value.to(student.dtype), student, gradient * world_size()), spread


def vector_level(student: Tensor, teacher: Tensor, keep: Tensor, pairs: Tensor, weight: Tensor | None = None) -> Tensor:
    """``L = (1/P) sum (1 - cos(sg t, s))`` over kept pairs; a zero vector has cosine 0.

    Args:
        student: [B, D].
        teacher: [B, D]; receives no gradient.
        keep: [B] bool.
        pairs: P.
        weight: Weight of each pair, [B], of mean 1 over the kept pairs of the whole batch.

    Returns:
        0-d; 0 with zero gradients if P = 0.
    """
    cosine = F.cosine_similarity(teacher.detach(), student, dim=1, eps=COSINE_EPS)
    error = torch.where(keep, 1 - cosine, 0.0)
    error = error.sum() if weight is None else (error * weight.to(error.dtype)).sum()
    count = pairs.clamp(min=1)
    share = error / count * world_size()
    value = all_reduce_sum(error.detach().double()) / count
    return value.to(share.dtype) + (share - share.detach())  # the bracket is exactly 0, unlike share + (value - share)


class _MeanSquare(torch.autograd.Function):
    """``features.square().mean(dim=1)`` whose backward pass goes over the features once, not four times."""

    @staticmethod
    def forward(ctx: Any, features: Tensor) -> Tensor:
        ctx.save_for_backward(features)
        return features.square().mean(dim=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        features: Tensor = ctx.saved_tensors[0]
        return features * (gradient * (2 / features.shape[1]))[:, None]


def _extremes(student: Tensor, teacher: Tensor, keep: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Largest and smallest student energy and largest teacher energy of the kept pairs of the whole batch.

    -inf, inf and -inf if there are none; shapes are known on the host, so this never waits.
    """
    if student.numel() == 0:
        rows = student.new_full((3, 1), -torch.inf)
    else:
        low, high = student.flatten(1).aminmax(dim=1)
        rows = torch.stack([high, -low, teacher.flatten(1).amax(dim=1)]).masked_fill(~keep, -torch.inf)
    peak, negative_floor, teacher_peak = all_reduce_max(rows.amax(dim=1)).unbind()
    return peak, -negative_floor, teacher_peak


class _KnownGradient(torch.autograd.Function):
    """A value whose gradient has been worked out with it: one multiplication backwards, instead of a graph."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, student: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, Tensor, None]:
        return None, upstream * ctx.saved_tensors[0], None


def _with_known_gradient(value: Tensor, student: Tensor, gradient: Tensor) -> Tensor:
    known: Tensor = _KnownGradient.apply(value, student, gradient)  # type: ignore[no-untyped-call]
    return known
