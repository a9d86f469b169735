"""The losses that distil a teacher's embeddings into a student: QUD's, SEED's, and plain regression.

All take raw embeddings and normalise them themselves; a zero row has cosine 0 with everything and gets no gradient.
All are a **local mean**: each rank averages over its own rows. The queue is global, so with equal batches the averaged
gradients of data-parallel training are those of one process on the whole batch. All are fp32 islands (autocast off,
inputs cast to float32, float64 stays), give gradients to the student only, and never wait for the device.

Shapes: B rows, D embedding size, n queue entries. Symbols: q student and k teacher of unit length, tau temperature.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.methods.qud.temperature import check_temperature

#: Rows at most this long count as zero.
EPS = 1e-12
MSE_REDUCTIONS = ("mean", "sum_dim")


def qud_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    temperature: float,
    *,
    margin: float = 0.0,
    mask_above: float | None = None,
) -> Tensor:
    """Tell the teacher's embedding of the same image from its embeddings of earlier images.

    With ``l_i0 = (q_i k_i - m) / tau`` and ``l_ij = q_i Q_j / tau`` this is the cross entropy of the first of 1 + n
    logits, ``L = mean_i -log sigmoid(l_i0 - logsumexp_j l_ij)``. The value depends on temperature and n; compare
    :func:`qud_monitors` instead.

    The gradient is worked out along with the value, so nothing refers to ``queue`` afterwards: it may be overwritten
    before ``backward``, without a copy of it.

    Args:
        student: [B, D], any length.
        teacher: [B, D], any length; receives no gradient.
        queue: Q, [n, D], n >= 1, any length, e.g. ``FeatureQueue.features``; receives no gradient.
        temperature: tau > 0; the paper's is 0.1.
        margin: m, taken off the positive's cosine; 0 in the paper.
        mask_above: Leave an entry out for the rows whose teacher has a cosine above this with it: likely the same
            identity. In (-1, 1); ``None`` (the paper's) leaves none out.

    Returns:
        0-d; 0 for an empty batch.

    Raises:
        ConfigError: Shapes do not fit, or an option is out of range.

    Source: Kolf et al., "QUD: Unsupervised Knowledge Distillation for Deep Face Recognition", BMVC 2024, Eq. 2; the
    normalisation as in the authors' program.
    """
    check_temperature(temperature)
    _check_mask(mask_above)
    with _fp32_island(student):
        rows = _rows(student, teacher, queue)
        with torch.no_grad():
            positive, negatives = _logits(rows, temperature, mask_above)
            positive = positive - margin / temperature
            rest = negatives.logsumexp(dim=1)
            losses = -F.logsigmoid(positive - rest)
            share = (negatives - (positive + losses)[:, None]).exp_()  # p_ij
            pull = torch.sigmoid(rest - positive)  # 1 - p_i0, without cancellation
        return _attach(rows, losses, -pull, share, temperature)


def soft_target_loss(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    temperature: float,
    *,
    target_temperature: float = 0.01,
) -> Tensor:
    """SEED: the student imitates how the teacher itself compares the image with the queue and with its own embedding.

    Cross entropy between ``softmax_j(k_i [k_i, Q]_j / tau_T)`` and ``softmax_j(q_i [k_i, Q]_j / tau)``. For tau_T -> 0
    it is :func:`qud_loss`, as long as no entry equals k_i.

    Args:
        student: [B, D], any length.
        teacher: [B, D], any length; receives no gradient.
        queue: [n, D], n >= 1, any length; receives no gradient.
        temperature: tau > 0; SEED's is 0.2.
        target_temperature: tau_T > 0; SEED's is 0.01.

    Returns:
        0-d; 0 for an empty batch. Never below the entropy of the targets.

    Raises:
        ConfigError: Shapes do not fit, or a temperature is not positive.

    Source: Fang et al., "SEED: Self-supervised Distillation for Visual Representation", ICLR 2021.
    """
    check_temperature(temperature)
    check_temperature(target_temperature, "target temperature")
    with _fp32_island(student):
        rows = _rows(student, teacher, queue)
        with torch.no_grad():
            positive, negatives = _logits(rows, temperature)
            own, others = _logits(rows._replace(query=rows.key), target_temperature)
            total = torch.logaddexp(positive, negatives.logsumexp(dim=1))
            target_total = torch.logaddexp(own, others.logsumexp(dim=1))
            target, targets = (own - target_total).exp(), (others - target_total[:, None]).exp_()
            losses = total - target * positive - (targets * negatives).sum(dim=1)
            share = (negatives - total[:, None]).exp_() - targets
        return _attach(rows, losses, (positive - total).exp() - target, share, temperature)


def mse_loss(student: Tensor, teacher: Tensor, *, reduction: str = "mean") -> Tensor:
    """Squared distance of the unit vectors, the baseline of the paper.

    Args:
        student: [B, D], any length.
        teacher: [B, D], any length; receives no gradient.
        reduction: ``"mean"`` over rows and dimensions, ``mean_i (2 - 2 cos_i) / D``, as in the authors' program: so
            small that weight decay outweighs it at first; or ``"sum_dim"``, D times that.

    Returns:
        0-d; 0 for an empty batch.

    Raises:
        ConfigError: Shapes do not fit, or the reduction is unknown.
    """
    if reduction not in MSE_REDUCTIONS:
        raise ConfigError(
            "QUD mse reduction",
            value=reduction,
            expected=" or ".join(map(repr, MSE_REDUCTIONS)),
            remedy=did_you_mean(str(reduction), MSE_REDUCTIONS),
        )
    query, key = _unit_pair(student, teacher)
    loss = _mean((query - key).square().sum(dim=1))
    return loss / student.shape[1] if reduction == "mean" else loss


def cosine_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """``mean_i 1 - cos(student_i, teacher_i)``: half of :func:`mse_loss` with ``"sum_dim"`` where no row is zero.

    Args:
        student: [B, D], any length.
        teacher: [B, D], any length; receives no gradient.

    Returns:
        0-d; 0 for an empty batch.

    Raises:
        ConfigError: Shapes do not fit.
    """
    query, key = _unit_pair(student, teacher)
    return _mean(1 - (query * key).sum(dim=1))


@torch.no_grad()
def qud_monitors(
    student: Tensor,
    teacher: Tensor,
    queue: Tensor,
    temperature: float,
    *,
    margin: float = 0.0,
    mask_above: float | None = None,
) -> dict[str, Tensor]:
    """How far the distillation is, in numbers that can be compared between settings; arguments as :func:`qud_loss`.

    Returns:
        Means over the rows of this rank, 0-d: ``mean_cosine`` of student and teacher; ``p_positive``, the probability
        that the loss raises; ``top_1``, the share of rows that are closer to their own teacher embedding than to every
        entry that is not left out. NaN for an empty batch.

    Raises:
        ConfigError: As :func:`qud_loss`.
    """
    check_temperature(temperature)
    _check_mask(mask_above)
    with _fp32_island(student):
        rows = _rows(student, teacher, queue)
        positive, negatives = _logits(rows, temperature, mask_above)
        rest = negatives.logsumexp(dim=1)
        return {
            "mean_cosine": (rows.query * rows.key).sum(dim=1).mean(),
            "p_positive": torch.sigmoid(positive - margin / temperature - rest).mean(),
            "top_1": (positive > negatives.amax(dim=1)).to(positive.dtype).mean(),
        }


class _Rows(NamedTuple):
    """Inputs in one precision; only ``query`` is attached to the graph."""

    query: Tensor
    key: Tensor
    queue: Tensor
    lengths: Tensor
    """Of the queue's entries, [n]: the cosines are divided by them, which saves a normalised copy of the queue."""


class _WithGradient(torch.autograd.Function):
    """A value that was computed without a graph, and its known gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream, None, None


def _rows(student: Tensor, teacher: Tensor, queue: Tensor) -> _Rows:
    query, key = _unit_pair(student, teacher)
    if queue.dim() != 2 or queue.shape[1] != student.shape[1] or not len(queue):
        raise ConfigError(
            "QUD queue",
            value=tuple(queue.shape),
            expected=f"[n, {student.shape[1]}], entries as long as the embeddings and at least one of them",
        )
    entries = queue.detach().to(query.dtype)
    return _Rows(query, key, entries, torch.linalg.vector_norm(entries, dim=1).clamp(min=EPS))


def _unit_pair(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ConfigError(
            "QUD embeddings of student and teacher",
            value=(tuple(student.shape), tuple(teacher.shape)),
            expected="[B, D] both",
            remedy="Give the student the teacher's embedding size: there is no projection between them.",
        )
    with _fp32_island(student):
        precision = torch.float64 if student.dtype == torch.float64 else torch.float32
        return _unit(student.to(precision)), _unit(teacher.detach().to(precision))


def _unit(vectors: Tensor) -> Tensor:
    """Rows of length 1; zero rows stay zero, with a gradient of 0 instead of 1 / EPS."""
    lengths = torch.linalg.vector_norm(vectors, dim=1, keepdim=True)
    return torch.where(lengths > EPS, vectors / lengths.clamp(min=EPS), 0.0)


def _logits(rows: _Rows, temperature: float, mask_above: float | None = None) -> tuple[Tensor, Tensor]:
    """Of the positive, [B], and of the queue's entries, [B, n]."""
    positive = (rows.query * rows.key).sum(dim=1) / temperature
    negatives = (rows.query @ rows.queue.T) / (rows.lengths * temperature)
    if mask_above is not None:
        same = (rows.key @ rows.queue.T) / rows.lengths > mask_above
        negatives = negatives.masked_fill(same, -torch.inf)
    return positive, negatives


def _attach(rows: _Rows, losses: Tensor, to_positive: Tensor, to_negatives: Tensor, temperature: float) -> Tensor:
    """Mean of ``losses`` [B], given their derivatives by the logits, [B] and [B, n]."""
    value = _mean(losses)
    if not (torch.is_grad_enabled() and rows.query.requires_grad):
        return value
    gradient = to_positive[:, None] * rows.key + (to_negatives / rows.lengths) @ rows.queue
    gradient = gradient / (temperature * max(len(losses), 1))
    loss: Tensor = _WithGradient.apply(rows.query, value, gradient)  # type: ignore[no-untyped-call]
    return loss


def _mean(losses: Tensor) -> Tensor:
    return losses.sum() / max(len(losses), 1)


def _check_mask(mask_above: float | None) -> None:
    if mask_above is not None and not -1 < mask_above < 1:
        raise ConfigError("QUD mask_above", value=mask_above, expected="a cosine in (-1, 1), or None")


def _fp32_island(tensor: Tensor) -> torch.autocast:
    return torch.autocast(tensor.device.type, enabled=False)
