"""The level losses of QSD: energy maps of intermediate stages and vectors such as the embedding.

Across ranks: reduces statistics. A level's *value* is that of the whole batch on every rank; its *gradient* is this
rank's part times the number of ranks, so that the averaging of data-parallel training yields the gradient of the whole
batch. All statistics enter it as constants, hence no collective is differentiated through.

A step has a few levels with a few scalars each, which cost more to launch than to compute. So the levels of a kind lie
side by side as columns of one matrix, their scalars in one vector, and every gradient is worked out with its value
(:func:`with_known_gradient`).

Shapes: B pairs on this rank, C channels, H x W map, D vector length, L levels of n_l columns each, P kept pairs of the
whole batch (0-d tensor).
Source: Ou et al., IEEE TMM 2024, doi 10.1109/TMM.2024.3358697; formulae as in the authors' program.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

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


def map_levels(
    student: Tensor,
    teacher: Tensor,
    sizes: Sequence[int],
    keep: Tensor,
    pairs: Tensor,
    *,
    distance: str = "l2",
    scale_grad: str = "attached",
    weight: Tensor | None = None,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """``L = (2 / R) E``, with E the mean distance of the maps and R the range of the students' energies.

    E averages ``(A(s) - sg A(t))^2`` (``"l1"``: the absolute value) over kept pairs and pixels; R = max A(s) - min A(s)
    over all kept student maps of the whole batch, at least ``RANGE_EPS`` times the largest energy. With S the sum of
    distances and N their number, this rank back-propagates

        2/(N R) S_rank - 2 S/(N R^2) (sum of A(s) at the maximum / ties - the same at the minimum)

    with S, N, R constant. The second part, d L / d R, is dropped by ``scale_grad="detached"``; equal extreme values
    share it evenly, like :func:`torch.amax`. It acts on single pixels, yet dominates the map gradient.

    Args:
        student: Energy maps of the student images, >= 0, a level's H W pixels beside those of the one before, [B, sum
            of sizes].
        teacher: Energy maps of the teacher images, likewise.
        sizes: H W of each level, L of them, at least one.
        keep: [B] bool.
        pairs: P.
        distance: ``"l2"`` or ``"l1"``.
        scale_grad: ``"attached"`` (authors') or ``"detached"``.
        weight: Weight of each pair in E, [B], of mean 1 over the kept pairs of the whole batch; R ignores it.

    Returns:
        The levels [L] float64 (0 if P = 0), the gradient of each by its columns of ``student`` [B, n_l] (this rank's
        part times the number of ranks; 0 if P = 0), and R of each [L] float64 (0 if P = 0). Detached.
    """
    with torch.no_grad():
        dropped = ~keep[:, None]
        difference = (student - teacher).masked_fill(dropped, 0.0)
        error = difference.square() if distance == "l2" else difference.abs()
        slope_of_error = 2 * difference if distance == "l2" else difference.sign()
        if weight is not None:
            weights = weight.to(error.dtype)[:, None]
            error, slope_of_error = error * weights, slope_of_error * weights
        error_sum = all_reduce_sum(torch.stack([part.sum() for part in error.split_with_sizes(sizes, 1)]).double())

        # Largest and smallest student energy and largest teacher energy of each level; -inf, inf, -inf if P = 0.
        signed = torch.stack([student, -student, teacher]).masked_fill(dropped, -torch.inf)
        extremes = all_reduce_max(_maxima(signed, sizes))
        peak, negative_floor, teacher_peak = extremes.double().unbind()

        # Scalars in float64: 1 / R^2 of nearly constant maps leaves the range of float32. Any R will do when P = 0.
        spread = (peak + negative_floor).clamp(min=0)
        smallest = torch.where(pairs > 0, RANGE_EPS * torch.maximum(peak, teacher_peak), 1.0)
        smallest = smallest.clamp(min=torch.finfo(torch.float32).tiny)
        scale = torch.maximum(spread, smallest)
        at_least_one = pairs.clamp(min=1)
        number = torch.stack([at_least_one * size for size in sizes])
        per_error = 2 / (number * scale)
        value = per_error * error_sum
        factors = [per_error]
        if scale_grad == "attached":
            slope = torch.where(spread > smallest, value / scale, 0.0)
            extreme = signed[:2] == _columns(extremes[:2], sizes)[:, None]
            ties = torch.stack([at.sum((1, 2)) for at in extreme.split_with_sizes(sizes, 2)], 1)
            factors += (slope / all_reduce_sum(ties).clamp(min=1)).unbind()
        columns = _columns(torch.stack(factors) * world_size(), sizes).to(error.dtype)
        gradient = slope_of_error * columns[0]
        if scale_grad == "attached":
            at_peak, at_floor = extreme * columns[1:, None]
            gradient = gradient - at_peak + at_floor
    return value, list(gradient.split_with_sizes(sizes, 1)), spread


def vector_levels(
    student: Tensor, teacher: Tensor, sizes: Sequence[int], keep: Tensor, pairs: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, list[Tensor]]:
    """``L = (1/P) sum (1 - cos(sg t, s))`` over kept pairs; a zero vector has cosine 0.

    The gradient of a pair's cosine ``c = t.s / (|t| |s|)`` is ``t / (|t| |s|) - s c / |s|^2``. Lengths are at least
    ``COSINE_EPS``; where that acts on the student, c is linear in s and the second part is missing.

    Args:
        student: Vectors of the student images, a level's D entries beside those of the one before, [B, sum of sizes].
        teacher: Vectors of the teacher images, likewise.
        sizes: D of each level, L of them, at least one.
        keep: [B] bool.
        pairs: P.
        weight: Weight of each pair, [B], of mean 1 over the kept pairs of the whole batch.

    Returns:
        The levels [L] float64 (0 if P = 0) and the gradient of each by its columns of ``student`` [B, n_l] (this rank's
        part times the number of ranks; 0 if P = 0). Detached.
    """
    with torch.no_grad():
        both = list(zip(student.split_with_sizes(sizes, 1), teacher.split_with_sizes(sizes, 1), strict=True))
        length = torch.stack([torch.linalg.vector_norm(s, dim=1) for s, _ in both], 1)
        floored = length.clamp(min=COSINE_EPS)
        product = floored * torch.stack([torch.linalg.vector_norm(t, dim=1) for _, t in both], 1).clamp(min=COSINE_EPS)
        cosine = torch.stack([torch.linalg.vecdot(t, s, dim=1) for s, t in both], 1) / product

        at_least_one = pairs.clamp(min=1).double()
        share = (keep if weight is None else torch.where(keep, weight, 0.0)) / at_least_one
        error = (1 - cosine).masked_fill(~keep[:, None], 0.0)
        if weight is not None:
            error = error * weight.to(error.dtype)[:, None]
        value = all_reduce_sum(error.sum(0).double()) / at_least_one

        per_cosine = (share * -world_size()).to(student.dtype)[:, None]
        of_teacher = (per_cosine / product).unsqueeze(2).unbind(1)
        bent = torch.where(length > COSINE_EPS, cosine, 0.0)
        of_student = (per_cosine * bent / floored.square()).unsqueeze(2).unbind(1)
        gradients = [t * a - s * b for (s, t), a, b in zip(both, of_teacher, of_student, strict=True)]
    return value, gradients


def with_known_gradient(values: Tensor, student: Tensor, gradients: Sequence[Tensor]) -> Tensor:
    """Put levels on the graph: one multiplication each way back, instead of a graph of many small steps.

    Args:
        values: The levels [L], detached.
        student: What they are a function of, [B, sum of n_l].
        gradients: Of each level by its columns of ``student``, [B, n_l].

    Returns:
        ``values``, in the precision of ``student``.
    """
    known: Tensor = _KnownGradient.apply(values.to(student.dtype), student, *gradients)  # type: ignore[no-untyped-call]
    return known


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


class _KnownGradient(torch.autograd.Function):
    """Values whose gradients have been worked out with them, as numbers: there is no second derivative."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, student: Tensor, *gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*gradients)
        return values.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        gradients = ctx.saved_tensors
        scaled = [gradient * factor for gradient, factor in zip(gradients, upstream.unbind(), strict=True)]
        return None, torch.cat(scaled, 1), *(None for _ in gradients)


def _columns(values: Tensor, sizes: Sequence[int]) -> Tensor:
    """Each level's value at each of its columns, [..., L] to [..., sum of sizes]."""
    return torch.cat(
        [x.expand(*x.shape[:-1], n) for x, n in zip(values.split_with_sizes([1] * len(sizes), -1), sizes, strict=True)],
        -1,
    )


def _maxima(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """Largest entry of each level, [K, B, sum of sizes] to [K, L]; -inf if B = 0, a shape that is known on the host."""
    if rows.numel() == 0:
        return rows.new_full((rows.shape[0], len(sizes)), -torch.inf)
    return torch.stack([part.amax((1, 2)) for part in rows.split_with_sizes(sizes, 2)], 1)
