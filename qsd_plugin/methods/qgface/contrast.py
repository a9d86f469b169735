"""QGFace's contrastive branch: a poor view must match the clean view of the same image against a queue of others.

Shapes: N pairs of this rank, D embedding, n slots of the queue, K of them valid; M rows, N with single and 2 N with
double coupling.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.distributed import all_reduce_sum
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.qgface.gates import (
    RANGES,
    SELECTIONS,
    WEIGHTINGS,
    check_choice,
    check_threshold,
    contrast_weight,
    image_quality,
    pair_quality,
)
from qsd_plugin.methods.qgface.head import REDUCTIONS, mean_over
from qsd_plugin.methods.qgface.queue import Negatives

COUPLINGS = ("single", "double")
MASKS = ("identity", "instance")
FILLS = ("zero", "exclude")
MARGINS = ("none", "static", "dynamic")
#: With ``rescale`` the loss is that of a queue of this size.
REFERENCE_SIZE = 128


class ContrastResult(NamedTuple):
    """What :class:`QGContrast` returns."""

    loss: Tensor
    """0-d: this rank's loss; its mean over ranks is that of the whole batch."""
    logits: Tensor
    """[M, 1 + n]: what the softmax is taken of, the positive first; minus infinity for what does not count."""
    similarity: Tensor
    """[M]: cosine of the positive pairs, detached."""
    stats: dict[str, Tensor]
    """Detached, 0-d: ``active``, the share of this rank's rows with a weight; ``similarity``, mean cosine of its
    positive pairs; ``gap``, the moving gap of all ranks; ``negatives``, K."""


def contrast_logits(
    positive: Tensor,
    negative: Tensor,
    factor: Tensor,
    *,
    margin: Tensor | float = 0.0,
    masked: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Logits ``[factor (c - margin) | factor c_j]`` of a softmax whose target is column 0.

    Cosines are clamped to [-1, 1]; ``masked`` negatives have cosine 0, so each still counts exp(0) in the softmax;
    ``hidden`` ones count nothing.

    Args:
        positive: c, [M].
        negative: c_j, [M, n].
        factor: Scale times weight of each row, [M].
        margin: Taken from c.
        masked: [M, n] bool.
        hidden: Bool, [M, n] or [n].

    Returns:
        [M, 1 + n].
    """
    if masked is not None:
        negative = negative.masked_fill(masked, 0.0)
    others = negative.clamp(-1, 1) * factor[:, None]
    if hidden is not None:
        others = others.masked_fill(hidden, -math.inf)
    target = (positive.clamp(-1, 1) - margin) * factor
    return torch.cat([target[:, None], others], dim=1)


class QGContrast(nn.Module):
    """Contrastive loss between two views of the same images, gated by their quality.

    The quality of a pair decides its weight (:func:`~.gates.contrast_weight`), by which its row of logits is
    multiplied; a row of weight 0 has the constant loss ln(K + 1) and no gradient. Other images of the same identity are
    never positives. No gradient reaches the queue.

    Across ranks: the moving gap is reduced and equal on every rank; the loss is a local mean, so with equal batches
    averaged gradients are those of one process on the whole batch if the negatives are (:class:`~.queue.ProxyQueue`
    gathers). Every rank must make the call. Precision: an fp32 island (float64 stays). Nothing waits for the device.

    Args:
        threshold: b in [0, 1], may be changed between steps; 0: every pair counts.
        coupling: ``"single"``: only the degraded views are anchors (authors' S2N); ``"double"``: the clean ones too,
            each with the other view as its positive (D2N).
        detach_positive: No gradient through the positive, only to the anchor.
        mask: Which negatives are taken out: of the same ``"identity"``, or only of the same ``"instance"``, for which
            the call is given the slots of its own images.
        mask_fill: What takes them out: cosine ``"zero"`` (authors'), or to ``"exclude"`` them from the softmax. With
            zero they count more than negatives of negative cosine.
        weighting: ``"sgn"``, ``"cos"`` or ``"linear"``.
        weight_range: ``"half"``: pairs from the threshold on have weight 0; ``"whole"``: the mirrored weight.
        select: Quality of a pair: of the image of ``"low"`` or ``"high"`` quality, or the ``"mean"``.
        margin_method: On the cosine of the positive: ``"none"``, ``"static"`` (``margin``), or ``"dynamic"``, the
            moving mean of the gap between the positive and the hardest negative.
        margin: Of ``"static"``, >= 0.
        momentum: Of the moving gap, weight of the new batch in (0, 1].
        rescale: Multiply the loss by ln(129) / ln(K + 1), so that it does not grow with the queue.
        reduction: Mean over ``"all"`` rows (authors'), or over those with a weight (``"active"``).
        scale: s > 0.

    Raises:
        ConfigError: An argument is out of range; on call, shapes do not fit or ``own`` is missing.

    Source: Song and Wang, "Quality-Guided Joint Training for Mixed-Quality Face Recognition", arXiv 2312.17494; the
    dynamic margin: "CoReFace", arXiv 2304.11668.

    Example:
        >>> own = queue.enqueue(torch.stack([clean, poor]), labels, head.weight)
        >>> result = contrast(poor, clean, queue.negatives(head.weight), labels, poor_scaler, clean_scaler)
        >>> (head_result.loss + result.loss).backward()
    """

    gap: Tensor
    """0-d: moving mean of the cosine of the positive minus that of the hardest negative, the latter at least 0."""

    def __init__(
        self,
        *,
        threshold: float = 0.2,
        coupling: str = "single",
        detach_positive: bool = True,
        mask: str = "identity",
        mask_fill: str = "zero",
        weighting: str = "sgn",
        weight_range: str = "half",
        select: str = "low",
        margin_method: str = "none",
        margin: float = 0.4,
        momentum: float = 0.01,
        rescale: bool = True,
        reduction: str = "all",
        scale: float = 64.0,
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.coupling = check_choice("coupling", coupling, COUPLINGS)
        self.detach_positive = detach_positive
        self.mask = check_choice("mask", mask, MASKS)
        self.mask_fill = check_choice("fill of the mask", mask_fill, FILLS)
        self.weighting = check_choice("weighting", weighting, WEIGHTINGS)
        self.weight_range = check_choice("range of the weighting", weight_range, RANGES)
        self.select = check_choice("selection of a pair's quality", select, SELECTIONS)
        self.margin_method = check_choice("margin method", margin_method, MARGINS)
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        if not 0 <= margin < math.inf:
            raise ConfigError("QGFace contrastive margin", value=margin, expected="a finite number >= 0")
        if not 0 < momentum <= 1:
            raise ConfigError("QGFace momentum of the gap", value=momentum, expected="a number in (0, 1]")
        if not 0 < scale < math.inf:
            raise ConfigError("QGFace contrastive scale", value=scale, expected="a finite number > 0")
        self.margin, self.momentum, self.rescale, self.scale = margin, momentum, rescale, scale
        self.register_buffer("gap", torch.zeros(()))

    @property
    def threshold(self) -> float:
        """b, the quality below which a pair is contrasted."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = check_threshold(value)

    def forward(
        self,
        anchor: Tensor,
        positive: Tensor,
        negatives: Negatives,
        labels: Tensor,
        anchor_scaler: Tensor,
        positive_scaler: Tensor,
        own: Tensor | None = None,
    ) -> ContrastResult:
        """Loss of N pairs.

        Args:
            anchor: Embeddings of the degraded view, [N, D], normalised here.
            positive: Embeddings of the clean view, [N, D], normalised here.
            negatives: Of this step, the step's own embeddings included.
            labels: [N] int64.
            anchor_scaler: Margin scalers of the degraded views, [N, 1], from the head.
            positive_scaler: Of the clean views, [N, 1].
            own: Slots that the views of each image went to, [N, V] int64, from :meth:`~.queue.ProxyQueue.enqueue`;
                needed with ``mask="instance"``.
        """
        self._check(anchor, positive, negatives, labels, anchor_scaler, positive_scaler)
        with torch.autocast(anchor.device.type, enabled=False):
            embeddings = [F.normalize(x if x.dtype == torch.float64 else x.float(), dim=1) for x in (anchor, positive)]
            quality = pair_quality(image_quality(anchor_scaler), image_quality(positive_scaler), self.select)
            weight = contrast_weight(
                quality[:, 0], self.threshold, weighting=self.weighting, weight_range=self.weight_range
            ).detach()
            masked = self._masked(negatives, labels, own)
            first, second = embeddings
            if self.coupling == "double":
                first, second = torch.cat(embeddings), torch.cat(embeddings[::-1])
                weight, masked = weight.repeat(2), masked.repeat(2, 1)
            similarity = (first * (second.detach() if self.detach_positive else second)).sum(dim=1)
            cosine = F.linear(first, negatives.embeddings.detach().to(first.dtype))
            if self.training and torch.is_grad_enabled():
                self._update_gap(similarity.detach(), cosine.detach().masked_fill(masked | ~negatives.valid, 0.0))
            logits = contrast_logits(
                similarity,
                cosine,
                self.scale * weight.to(first.dtype),
                margin=self._current_margin(),
                masked=masked if self.mask_fill == "zero" else None,
                hidden=~negatives.valid if self.mask_fill == "zero" else masked | ~negatives.valid,
            )
            target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
            active = weight > 0
            row_loss = F.cross_entropy(logits, target, reduction="none")
            loss = mean_over(row_loss, active if self.reduction == "active" else None)
            count = negatives.valid.sum()
            if self.rescale:
                loss = loss * (math.log(REFERENCE_SIZE + 1) / torch.log1p(count.clamp(min=1).to(loss.dtype)))
        similarity = similarity.detach()
        stats = {
            "active": active.double().mean(),
            "similarity": similarity.mean(),
            "gap": self.gap.clone(),
            "negatives": count,
        }
        return ContrastResult(loss, logits, similarity, stats)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        names = "threshold coupling detach_positive mask weighting weight_range select margin_method rescale reduction"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names.split())

    def _masked(self, negatives: Negatives, labels: Tensor, own: Tensor | None) -> Tensor:
        if self.mask == "identity":
            return labels[:, None] == negatives.labels
        if own is None or own.shape[:1] != labels.shape:
            raise ConfigError(
                "QGFace contrast: own",
                value=None if own is None else tuple(own.shape),
                expected="the slots of the step's own images [N, V], because the mask is by instance",
                remedy="Pass what ProxyQueue.enqueue returned, or use mask='identity'.",
            )
        nothing = torch.zeros(len(labels), len(negatives.labels), dtype=torch.bool, device=labels.device)
        return nothing.scatter(1, own, True)

    def _update_gap(self, similarity: Tensor, counted: Tensor) -> None:
        gap = similarity.clamp(-1, 1) - counted.amax(dim=1).clamp(0, 1)
        total, rows = all_reduce_sum(torch.stack([gap.double().sum(), torch.ones_like(gap).double().sum()])).unbind()
        self.gap.lerp_((total / rows.clamp(min=1)).to(self.gap.dtype), self.momentum)

    def _current_margin(self) -> Tensor | float:
        if self.margin_method == "dynamic":
            return self.gap.clone()  # the next step changes the buffer in place
        return self.margin if self.margin_method == "static" else 0.0

    def _check(self, anchor: Tensor, positive: Tensor, negatives: Negatives, labels: Tensor, *scalers: Tensor) -> None:
        rows = anchor.shape[:1]
        dim = negatives.embeddings.shape[1]
        fits = all(x.shape == (*rows, dim) for x in (anchor, positive)) and labels.shape == rows
        if not fits or any(scaler.shape != (*rows, 1) for scaler in scalers):
            raise ConfigError(
                "QGFace contrast: anchor, positive, labels and scalers",
                value=tuple(tuple(x.shape) for x in (anchor, positive, labels, *scalers)),
                expected=f"[N, {dim}] twice, [N], and [N, 1] twice",
            )
