"""Classification heads whose margin follows the norm of the embedding: AdaFace, and QGFace's gated form of it.

Shapes: B rows of this rank, D embedding, C classes.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qsd_plugin.core.distributed import all_reduce_sum, world_size
from qsd_plugin.core.errors import ConfigError, DataError
from qsd_plugin.methods.qgface.gates import check_choice, check_threshold, classification_gate, image_quality
from qsd_plugin.methods.qgface.statistics import EPS, NormStatistics

#: Where a head's statistics start: ``None`` is from the first batch.
STARTS: dict[str, tuple[float, float] | None] = {"debiased": None, "zeros": (0.0, 0.0), "adaface": (20.0, 100.0)}
#: Rows that the mean of a loss goes over.
REDUCTIONS = ("all", "active")


class HeadResult(NamedTuple):
    """What the heads return."""

    loss: Tensor
    """0-d: this rank's loss; its mean over ranks is that of the whole batch."""
    logits: Tensor
    """[B, C]: what the softmax is taken of, with margin, scale and gate."""
    scaler: Tensor
    """[B, 1] in [-1, 1]: margin scaler, without gradient; quality is ``(scaler + 1) / 2``."""
    stats: dict[str, Tensor]
    """Detached, 0-d: ``norm_mean`` and ``norm_std``, of all ranks; QGFace adds ``low_quality``, the share of this
    rank's rows below the threshold."""


def adaface_logits(
    cosine: Tensor,
    labels: Tensor,
    scaler: Tensor,
    *,
    margin: float = 0.4,
    scale: float = 64.0,
    gate: Tensor | None = None,
) -> Tensor:
    """``s (cos(clip(theta - m k, e, pi - e)) - m (1 + k))`` at the true class, ``s cos(theta)`` at the others.

    With scaler k = -1 it is ``cos(theta + m)``, an angular margin; with 0 ``cos(theta) - m``; with 1
    ``cos(theta - m) - 2 m``, the hardest. Cosines are clamped to 1 - e in absolute value, beyond which they have no
    gradient; e is 1e-3. Across ranks: no communication. Precision: that of ``cosine``.

    Args:
        cosine: Between embeddings and class centres, [B, C].
        labels: True class, 0 to C - 1, [B] int64.
        scaler: k in [-1, 1], [B, 1].
        margin: m >= 0.
        scale: s > 0.
        gate: Factor on each row, [B, 1]; none is 1.

    Returns:
        [B, C].

    Source: Kim et al., "AdaFace", CVPR 2022, Equations 16 and 17; the gate: QGFace, arXiv 2312.17494.
    """
    clamped = cosine.clamp(-1 + EPS, 1 - EPS)
    index = labels[:, None]
    angle = clamped.gather(1, index).acos() - margin * scaler
    target = angle.clamp(EPS, math.pi - EPS).cos() - margin * (1 + scaler)
    return clamped.scatter(1, index, target) * (scale if gate is None else scale * gate)


def mean_over(loss: Tensor, active: Tensor | None) -> Tensor:
    """Mean of the losses of rows, [B], over all of them or over the active ones of all ranks.

    Without ``active`` it is the local mean. With it, [B] bool, the sum of the active rows times the number of ranks is
    divided by their number on all ranks (at least 1), so that the mean over ranks is that of the whole batch.
    """
    if active is None:
        return loss.mean()
    count = all_reduce_sum(active.sum()).clamp(min=1)
    return torch.where(active, loss, 0.0).sum() * world_size() / count


def check_labels(labels: Tensor, num_classes: int) -> None:
    """Refuse labels that a head has no class for. Reads values, so it waits for the device.

    Raises:
        DataError: A label is negative, or ``num_classes`` or more.
    """
    wrong = labels[(labels < 0) | (labels >= num_classes)]
    if wrong.numel():
        shown = ", ".join(str(label) for label in wrong[:5].tolist())
        raise DataError(
            f"Labels of a head of {num_classes} classes: {wrong.numel()} of {labels.numel()} beyond it, e.g. {shown}",
            expected=f"0 to {num_classes - 1}",
            remedy="Build the head with the number of identities of the training data.",
        )


class AdaFaceHead(nn.Module):
    """AdaFace: a margin softmax that is hard on sharp images and lenient with poor ones, told apart by their norms.

    While training, the norms of a batch enter the statistics before they are used, unless gradients are off. Labels are
    checked on the CPU only; elsewhere call :func:`check_labels` on the data set's labels once.

    Across ranks: the norm statistics are reduced and equal on every rank; the loss is a local mean, so with equal
    batches averaged gradients are those of one process on the whole batch. Every rank must make the call. Precision: an
    fp32 island (float64 stays). Nothing waits for the device.

    Args:
        embedding_dim: D >= 1.
        num_classes: C >= 1.
        scale: s > 0.
        margin: m >= 0.
        h: Concentration of the margin scaler, > 0.
        momentum: Of the norm statistics, weight of the new batch in (0, 1] (t_alpha).
        mean_init: Start of the mean norm.
        std_init: Start of the deviation of the norms.

    Raises:
        ConfigError: An argument is out of range; on call, shapes do not fit.
        DataError: On call, labels beyond the head.

    Source: Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022.

    Example:
        >>> head = AdaFaceHead(512, 1000)
        >>> result = head(*unit_and_norm(backbone(images)), labels)
        >>> result.loss.backward()
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        scale: float = 64.0,
        margin: float = 0.4,
        h: float = 0.333,
        momentum: float = 0.01,
        mean_init: float = 20.0,
        std_init: float = 100.0,
    ) -> None:
        super().__init__()
        if embedding_dim < 1 or num_classes < 1:
            raise ConfigError(
                "AdaFace embedding_dim and num_classes", value=(embedding_dim, num_classes), expected="at least 1 each"
            )
        for name, value in (("scale", scale), ("h", h)):
            if not 0 < value < math.inf:
                raise ConfigError(f"AdaFace {name}", value=value, expected="a finite number > 0")
        if not 0 <= margin < math.inf:
            raise ConfigError("AdaFace margin", value=margin, expected="a finite number >= 0")
        self.scale, self.margin, self.h = scale, margin, h
        #: [C, D]: class centres (proxies), of any length; AdaFace's ``kernel`` is the transpose.
        self.weight = nn.Parameter(F.normalize(torch.empty(num_classes, embedding_dim).uniform_(-1, 1), dim=1))
        self.statistics = NormStatistics(momentum=momentum, mean_init=mean_init, std_init=std_init)

    def forward(self, embedding: Tensor, norm: Tensor, labels: Tensor) -> HeadResult:
        """Loss of unit embeddings [B, D] that had the norms [B, 1], with labels [B] int64."""
        self._check(embedding, norm, labels)
        with torch.autocast(embedding.device.type, enabled=False):
            if self.training and torch.is_grad_enabled():
                self.statistics.update(norm)
            scaler = self.statistics.scaler(norm.to(self.weight.dtype), self.h)
            cosine = F.linear(embedding.to(self.weight.dtype), F.normalize(self.weight, dim=1))
            logits = adaface_logits(
                cosine, labels, scaler, margin=self.margin, scale=self.scale, gate=self._gate(scaler)
            )
            loss = self._reduce(F.cross_entropy(logits, labels, reduction="none"), scaler)
        return HeadResult(loss, logits, scaler, self._stats(scaler))

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        classes, dim = self.weight.shape
        return f"embedding_dim={dim}, num_classes={classes}, scale={self.scale}, margin={self.margin}, h={self.h}"

    def _gate(self, scaler: Tensor) -> Tensor | None:
        return None

    def _reduce(self, loss: Tensor, scaler: Tensor) -> Tensor:
        return mean_over(loss, None)

    def _stats(self, scaler: Tensor) -> dict[str, Tensor]:
        mean, std = self.statistics.current()
        return {"norm_mean": mean.clone(), "norm_std": std.clone()}

    def _check(self, embedding: Tensor, norm: Tensor, labels: Tensor) -> None:
        classes, dim = self.weight.shape
        rows = embedding.shape[:1]
        if embedding.shape != (*rows, dim) or norm.shape != (*rows, 1) or labels.shape != rows:
            raise ConfigError(
                f"{type(self).__name__}: embedding, norm and labels",
                value=(tuple(embedding.shape), tuple(norm.shape), tuple(labels.shape)),
                expected=f"[B, {dim}], [B, 1] and [B]",
            )
        if labels.device.type == "cpu":
            check_labels(labels, classes)


class QGFaceHead(AdaFaceHead):
    """QGFace's classification branch: AdaFace whose logits vanish for images of low quality.

    A gated row has all logits near 0, so its loss is ln C and its gradient about 0. In the authors' program such rows
    count in the mean (``reduction="all"``): the loss jumps with the share of low-quality images. ``"active"`` averages
    over the rows of quality >= threshold of all ranks.

    For everything else see :class:`AdaFaceHead`, to which threshold 0 and the same start are equal.

    Args:
        embedding_dim: D >= 1.
        num_classes: C >= 1.
        threshold: b in [0, 1], may be changed between steps; 0 switches the gate off.
        start: Of the norm statistics: ``"debiased"`` (ours, from the first batch), ``"zeros"`` (authors': for about the
            first hundred steps every image counts as perfect), ``"adaface"`` (20 and 100), or (mean, deviation).
        reduction: ``"all"`` (authors') or ``"active"``.
        scale: s > 0.
        margin: m >= 0.
        h: Concentration of the margin scaler, > 0.
        momentum: Of the norm statistics, weight of the new batch in (0, 1] (t_alpha).

    Source: Song and Wang, "Quality-Guided Joint Training for Mixed-Quality Face Recognition", arXiv 2312.17494.
    """

    def __init__(
        self,
        embedding_dim: int,
        num_classes: int,
        *,
        threshold: float = 0.2,
        start: str | tuple[float, float] = "debiased",
        reduction: str = "all",
        scale: float = 64.0,
        margin: float = 0.4,
        h: float = 0.333,
        momentum: float = 0.01,
    ) -> None:
        super().__init__(embedding_dim, num_classes, scale=scale, margin=margin, h=h, momentum=momentum)
        self.threshold = threshold
        self.reduction = check_choice("reduction", reduction, REDUCTIONS)
        begin = (
            STARTS[check_choice("start of the norm statistics", start, tuple(STARTS))]
            if isinstance(start, str)
            else start
        )
        mean, std = begin or (0.0, 0.0)
        self.statistics = NormStatistics(momentum=momentum, mean_init=mean, std_init=std, debias=begin is None)

    @property
    def threshold(self) -> float:
        """b, the quality below which an image is not classified."""
        return self._threshold

    @threshold.setter
    def threshold(self, value: float) -> None:
        self._threshold = check_threshold(value)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return f"{super().extra_repr()}, threshold={self.threshold}, reduction={self.reduction}"

    def _gate(self, scaler: Tensor) -> Tensor | None:
        return classification_gate(scaler, self.threshold, self.scale) if self.threshold else None

    def _reduce(self, loss: Tensor, scaler: Tensor) -> Tensor:
        return mean_over(loss, None if self.reduction == "all" else ~self._low(scaler))

    def _stats(self, scaler: Tensor) -> dict[str, Tensor]:
        return {**super()._stats(scaler), "low_quality": self._low(scaler).double().mean()}

    def _low(self, scaler: Tensor) -> Tensor:
        return image_quality(scaler[:, 0]) < self.threshold
