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
    teacher = teacher.detach()
    mask = keep[:, None, None]
    difference = student - teacher
    error = torch.where(mask, difference.square() if distance == "l2" else difference.abs(), 0.0)
    error = error.sum() if weight is None else (error.sum(dim=(1, 2)) * weight.to(error.dtype)).sum()
    error_sum = all_reduce_sum(error.double())
    extremes = torch.stack([_masked_max(x, mask) for x in (student.detach(), -student.detach(), teacher)])
    peak, negative_floor, teacher_peak = all_reduce_max(extremes).unbind()
    floor = -negative_floor

    # Scalars in float64: 1 / R^2 of nearly constant maps leaves the range of float32. Any R will do when P = 0.
    some = pairs > 0
    spread = torch.where(some, peak.double() - floor.double(), 0.0)
    smallest = torch.where(some, RANGE_EPS * torch.maximum(peak, teacher_peak).double(), 1.0)
    smallest = smallest.clamp(min=torch.finfo(torch.float32).tiny)
    scale = torch.maximum(spread, smallest)
    elements = pairs.clamp(min=1) * (student.shape[1] * student.shape[2])
    per_error = 2 / (elements * scale)
    share = per_error.to(error.dtype) * error
    if scale_grad == "attached":
        slope = torch.where(spread > smallest, per_error * error_sum / scale, 0.0).to(error.dtype)
        at_peak, at_floor = mask & (student == peak), mask & (student == floor)
        ties = all_reduce_sum(torch.stack([at_peak.sum(), at_floor.sum()])).clamp(min=1)
        top = torch.where(at_peak, student, 0.0).sum() / ties[0]
        bottom = torch.where(at_floor, student, 0.0).sum() / ties[1]
        share = share - slope * (top - bottom)
    return _with_gradient_of(per_error * error_sum, share), spread


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
    return _with_gradient_of(all_reduce_sum(error.double()) / count, error / count)


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


def _with_gradient_of(value: Tensor, share: Tensor) -> Tensor:
    """A tensor worth ``value`` whose gradient is that of ``share`` times the number of ranks."""
    share = share * world_size()
    return value.to(share.dtype) + (share - share.detach())  # the bracket is exactly 0, unlike share + (value - share)


def _masked_max(values: Tensor, mask: Tensor) -> Tensor:
    """Largest value under the mask, -inf if there is none; shapes are known on the host, so this never waits."""
    if values.numel() == 0:
        return values.new_full((), -torch.inf)
    return values.masked_fill(~mask, -torch.inf).amax()
