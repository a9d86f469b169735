"""The methods as parts of a head: what each adds to the loss, with its state in buffers.

Shapes: B images on this rank, V views, D embedding, W ranks, C_r class rows of this rank. Rows of an output are the
first views, then the second ones. Every term is a local mean or a surrogate of it, so that the averaging of
data-parallel training yields the gradient of the whole batch; state is equal on every rank, by gathers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.core.distributed import gather_equal_rows
from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.insightface.options import AdaFaceOptions, QGFaceOptions, QSDOptions, QUDOptions
from qsd_plugin.hosts.insightface.wrappers import TrainingOutput
from qsd_plugin.methods.margins import arcface_logits
from qsd_plugin.methods.qgface import (
    NormStatistics,
    ProxyQueue,
    QGContrast,
    classification_gate,
    contrast_options,
    image_quality,
    sharded_adaface_logits,
    unit_and_norm,
)
from qsd_plugin.methods.qsd import QSDLoss
from qsd_plugin.methods.qsd import preset as qsd_preset
from qsd_plugin.methods.qud import FeatureQueue, cosine_loss, mse_loss, qud_loss, qud_monitors, soft_target_loss

#: Top of the quality scale.
TOP = 100.0

Stats = dict[str, Tensor]


class ExactArcFace(nn.Module):
    """The host's ArcFace margin with its derivative, which the host leaves out.

    Args:
        scale: s.
        margin: m2, radians.
    """

    def __init__(self, scale: float, margin: float) -> None:
        super().__init__()
        self.scale, self.margin = scale, margin

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cosines [W B, C_r] and local classes [W B, 1], -1 for another rank's, to logits."""
        return arcface_logits(logits, labels[:, 0], margin=self.margin, scale=self.scale, gradient="exact")


class NormMargin(nn.Module):
    """AdaFace's margin, or QGFace's gated form, on the host's logits.

    The host's head computes logits of all ranks' rows; :meth:`observe` comes before and hands it their norms.

    Args:
        options: Margin, scale, statistics.
    """

    def __init__(self, options: AdaFaceOptions | QGFaceOptions) -> None:
        super().__init__()
        self.options = options
        # QGFace's own start, 0 and 0, takes every image for perfect for a hundred steps; AdaFace's is 20 and 100.
        self.statistics = NormStatistics(momentum=options.momentum, debias=isinstance(options, QGFaceOptions))
        self._scaler: Tensor | None = None

    def observe(self, embedding: Tensor) -> tuple[Tensor, Tensor]:
        """Take raw embeddings [V B, D] into the statistics; this rank's unit embeddings and margin scalers [V B, 1]."""
        unit, norm = unit_and_norm(embedding)
        self.statistics.update(norm)
        scaler = self.statistics.scaler(norm, self.options.h)
        self._scaler = gather_equal_rows(scaler)
        return unit, scaler

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Cosines [W V B, C_r] and local classes [W V B, 1], -1 for another rank's, to logits."""
        assert self._scaler is not None, "observe comes first"
        options, gate = self.options, None
        if isinstance(options, QGFaceOptions) and options.threshold:
            gate = classification_gate(self._scaler, options.threshold, options.scale)
        return sharded_adaface_logits(
            logits,
            labels[:, 0],
            self._scaler,
            margin=options.margin,
            scale=options.scale,
            gate=gate,
            gradient=options.gradient,
        )

    def stats(self) -> Stats:
        """``norm_mean`` and ``norm_std``."""
        mean, std = self.statistics.current()
        return {"norm_mean": mean, "norm_std": std}


class QSDTerm(nn.Module):
    """QSD between the two views of each image.

    Args:
        options: Of the config.
        levels: Weight of each level.
    """

    def __init__(self, options: QSDOptions, levels: dict[str, float]) -> None:
        super().__init__()
        self.weight, self.by_norm = options.weight, options.quality == "norm"
        settings: dict[str, Any] = {**qsd_preset(options.preset).options(), "tau": options.tau}
        self.loss = QSDLoss(levels, **settings)
        self.statistics = NormStatistics(debias=True) if self.by_norm else None

    def forward(self, output: TrainingOutput, targets: Tensor) -> tuple[Tensor, Stats]:
        """The weighted term of pairs and its statistics; ``targets`` as in :mod:`.pairs`."""
        first, second = ({name: tap.chunk(2)[view] for name, tap in output.taps.items()} for view in (0, 1))
        if self.statistics is not None:
            norm = torch.linalg.vector_norm(output.embedding.detach().float(), dim=1, keepdim=True)
            self.statistics.update(norm)
            quality = TOP * image_quality(self.statistics.scaler(norm))[:, 0]
            result = self.loss(first, second, *quality.chunk(2))
        else:
            _, quality_1, valid_1, quality_2, valid_2 = targets.unbind(1)
            result = self.loss(first, second, quality_1, quality_2, valid_1 > 0, valid_2 > 0)
        stats = {"qsd": result.total.detach(), **{f"qsd_{name}": result.stats[name] for name in ("kept", "mean_gap")}}
        return self.weight * result.total, stats


class QUDTerm(nn.Module):
    """QUD with the teacher's embeddings of the same images, and their queue.

    Args:
        options: Of the config.
        embedding_size: D.
        seed: Of the queue's random start.
    """

    def __init__(self, options: QUDOptions, embedding_size: int, seed: int) -> None:
        super().__init__()
        self.options = options
        self.queue = FeatureQueue(options.queue_size, embedding_size, seed=seed)

    def forward(self, output: TrainingOutput, views: int) -> tuple[Tensor, Stats]:
        """The weighted term and the embeddings' mean cosine; writes the queue, view by view."""
        student, teacher = output.embedding, output.teacher
        assert teacher is not None
        queue, tau = self.queue.features, self.options.temperature
        if student.shape != teacher.shape:
            raise ConfigError(
                "config.embedding_size",
                value=student.shape[1],
                expected=f"{teacher.shape[1]}, the length of the teacher's embeddings",
                remedy="There is no projection between student and teacher.",
            )
        if self.options.loss == "qud":
            loss = qud_loss(student, teacher, queue, tau)
        elif self.options.loss == "soft":
            loss = soft_target_loss(student, teacher, queue, tau)
        else:
            loss = (mse_loss if self.options.loss == "mse" else cosine_loss)(student, teacher)
        monitors = qud_monitors(student.detach(), teacher, queue, tau)
        for view in teacher.chunk(views):  # the order of one process on the whole batch
            self.queue.enqueue(view)
        stats = {"qud": loss.detach(), **{f"qud_{name}": monitors[name] for name in ("mean_cosine", "top_1")}}
        return self.options.weight * loss, stats


class QGFaceTerm(nn.Module):
    """QGFace's contrast of degraded views (second) with clean ones (first).

    Args:
        options: Of the config.
        embedding_size: D.
    """

    def __init__(self, options: QGFaceOptions, embedding_size: int) -> None:
        super().__init__()
        self.weight = options.contrast_weight
        self.contrast = QGContrast(
            threshold=options.threshold, scale=options.scale, **contrast_options(options.profile)
        )
        self.queue = ProxyQueue(options.queue_size, embedding_size, compensate=options.compensate)

    def forward(
        self, unit: Tensor, scaler: Tensor, labels: Tensor, centres: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Stats]:
        """Unit embeddings [2 B, D] and margin scalers [2 B, 1] of both views, classes [B], and their class centres."""
        clean, poor = unit.chunk(2)
        clean_scaler, poor_scaler = scaler.chunk(2)
        own = self.queue.enqueue(torch.stack([clean, poor]).detach(), labels, centres)
        result = self.contrast(poor, clean, self.queue.negatives(centres), labels, poor_scaler, clean_scaler, own)
        stats = {
            "qgface": result.loss.detach(),
            **{f"qgface_{name}": result.stats[name] for name in ("active", "similarity")},
        }
        return self.weight * result.loss, stats
