"""``MODEL.META_ARCHITECTURE: QGFace``: good images by margin, poor ones by contrast with the clean view of themselves.

Shapes: N images of this rank, each with a clean view H and a degraded view L; D embedding.
"""

from __future__ import annotations

import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from qsd_plugin.core.errors import DataError
from qsd_plugin.hosts.fastreid.meta_arch.qgface_config import (
    build_contrast,
    build_schedule,
    check_config,
    contrast_threshold,
)
from qsd_plugin.hosts.fastreid.meta_arch.qgface_keys import PREFIX, KeyEncoder, KeyMixin
from qsd_plugin.hosts.fastreid.meta_arch.qsd_teacher import build_teacher, fill_missing_teacher
from qsd_plugin.hosts.fastreid.quality_margin_heads import EMBEDDING, SCALER, AdaFaceHead, QGFaceHead, quality_head
from qsd_plugin.hosts.fastreid.statistics import Statistics
from qsd_plugin.hosts.fastreid.training_views import PREFIX as DEGRADED
from qsd_plugin.methods.qgface import ContrastResult, NormStatistics, ProxyQueue, QGContrast, image_quality
from qsd_plugin.networks import TapRecorder, ema_update

logger = logging.getLogger("fastreid.qsd_plugin.qgface")

#: Batch key of the degraded views, [N, C, H, W] as ``images``.
DEGRADED_IMAGES = f"{DEGRADED}images"
#: Names of the state beside the base's. It is equal on every rank and no broadcast is needed.
STATE = ("qgface_queue.", "qgface_contrast.", "qgface_key_statistics.")

Batch = dict[str, Any]
Losses = dict[str, Tensor]


class QGFaceMixin(nn.Module):
    """Put in front of an architecture: it learns both views of every image, and the contrastive branch is added.

    One forward over the clean views, then the degraded ones, in one batch: the base's losses are those of 2 N images.
    The head (``QGFaceHead`` or ``AdaFaceHead``) judges each; pairs of low quality add ``loss_qgface``. With
    ``QGFACE.CONTRAST.QUEUE moco`` the base sees the clean views only. Evaluation is the base's.

    The state dict is the base's and :data:`STATE`; with ``moco`` also the momentum encoder, under ``qgface_momentum.``.

    Across ranks: norm statistics and moving gap are reduced, the queue gathers, the loss is a local mean.
    """

    qgface_contrast: QGContrast | None
    qgface_queue: ProxyQueue | None
    qgface_momentum: nn.Module
    qgface_key_statistics: NormStatistics

    def __init__(self, cfg: Any) -> None:
        check_config(cfg)
        super().__init__(cfg)
        head = quality_head(self)
        options = cfg.QGFACE.CONTRAST
        self._qgface_head: list[AdaFaceHead] = [head]  # in a list: it is registered as the base's
        self._qgface_gated = isinstance(head, QGFaceHead)
        self._qgface_schedule = build_schedule(cfg)
        self._qgface_recorder = TapRecorder(self, [f"heads:{EMBEDDING}", f"heads:{SCALER}"])
        self._qgface_keys: KeyEncoder | None = None
        self.qgface_contrast = self.qgface_queue = None
        if options.QUEUE != "none":
            self.qgface_contrast = build_contrast(cfg)
            self.qgface_queue = ProxyQueue(
                options.QUEUE_SIZE,
                head.weight.shape[1],
                compensate=options.QUEUE == "proxy",
                renormalise=bool(options.RENORM),
            )
        if options.QUEUE == "moco":
            self._add_key_encoder(cfg, head)
        self._qgface_stats = Statistics("qgface")
        self._qgface_shares: dict[str, Tensor] = {}
        self._qgface_steps = 0
        self._leave_state_out_of_broadcasts()
        self.start_qgface_epoch(0)
        logger.info(
            "QGFace: profile %s, threshold %g, queue %s%s",
            cfg.QGFACE.PROFILE,
            contrast_threshold(cfg),
            options.QUEUE,
            "" if self.qgface_queue is None else f" ({self.qgface_queue.extra_repr()}), {self.qgface_contrast}",
        )

    def forward(self, batched_inputs: Batch) -> Any:
        """The base's losses and ``loss_qgface`` in training; the base's output otherwise.

        Under ``no_grad`` (the host's precise-BN pass) nothing but batch norm changes.
        """
        if not self.training:
            return super().forward(batched_inputs)
        learns = torch.is_grad_enabled()
        if DEGRADED_IMAGES not in batched_inputs:
            if not learns:
                return super().forward(batched_inputs)
            raise DataError(
                "Training batch with a single view of its images",
                value=sorted(batched_inputs),
                expected=f"the key {DEGRADED_IMAGES} beside images, for MODEL.META_ARCHITECTURE QGFace",
                remedy="Let the plugin's train loader make both: QGFACE.VIEWS.MODE pair.",
            )
        shown = batched_inputs if self._qgface_keys is not None else _both_views(batched_inputs)
        if not learns:
            return super().forward(shown)
        with self._qgface_recorder as outputs:
            losses: Losses = super().forward(shown)
        unit, scaler = outputs[f"heads:{EMBEDDING}"], outputs[f"heads:{SCALER}"]
        contrast = self._qgface_views(batched_inputs, unit, scaler)
        if contrast is not None:
            losses["loss_qgface"] = contrast.loss * self._qgface_weight
        return losses

    def start_qgface_epoch(self, epoch: int) -> None:
        """Set what the schedules say about an epoch, from 0, and begin to count its shares anew."""
        schedule = self._qgface_schedule
        self._qgface_weight = schedule.weight_at(epoch)
        threshold, head_threshold = schedule.thresholds_at(epoch)
        if self._qgface_gated:
            self._qgface_head[0].threshold = head_threshold
        if self.qgface_contrast is not None and self.qgface_queue is not None:
            self.qgface_contrast.threshold = threshold
            self.qgface_queue.limit = schedule.queue_limit_at(epoch)
        self._qgface_shares, self._qgface_steps = {}, 0

    def qgface_shares(self) -> dict[str, Tensor]:
        """Means over this rank's steps of the epoch so far, 0-d float32; empty before the first step.

        ``low_quality_clean`` and ``low_quality_degraded``: share of views below the contrastive branch's threshold;
        ``low_quality``: of both; ``contrasted``: share of pairs with a weight.
        """
        return {name: total / self._qgface_steps for name, total in self._qgface_shares.items()}

    @property
    def qgface_threshold(self) -> float:
        """b of the contrastive branch in this epoch, without one that of the head."""
        return self._qgface_head[0].threshold if self.qgface_contrast is None else self.qgface_contrast.threshold

    def _qgface_views(self, batch: Batch, unit: Tensor, scaler: Tensor) -> ContrastResult | None:
        """What the contrastive branch makes of a step; the shares of the epoch are brought up to date."""
        if self._qgface_keys is not None:
            key, degraded = self._key(batch)
            self._count_shares(scaler, degraded)
            return self._contrast(unit, key, batch["targets"], scaler, degraded, key[None])
        images = len(batch["targets"])
        (clean, poor), (clean_scaler, degraded) = ((rows[:images], rows[images:]) for rows in (unit, scaler))
        self._count_shares(clean_scaler, degraded)
        views = torch.stack([clean.detach(), poor.detach()])
        return self._contrast(poor, clean, batch["targets"], degraded, clean_scaler, views)

    def _contrast(
        self, anchor: Tensor, positive: Tensor, labels: Tensor, own: Tensor, other: Tensor, entries: Tensor
    ) -> ContrastResult | None:
        """The step's entries go into the queue, then its pairs are contrasted with it."""
        queue, contrast = self.qgface_queue, self.qgface_contrast
        if queue is None or contrast is None:
            return None
        weight = self._qgface_head[0].weight if queue.compensate else None
        slots = queue.enqueue(entries, labels, weight)
        result: ContrastResult = contrast(anchor, positive, queue.negatives(weight), labels, own, other, slots)
        figures = {name: result.stats[name] for name in ("similarity", "gap", "negatives")}
        self._qgface_stats.add(figures)
        self._add_shares({"contrasted": result.stats["active"]})
        return result

    @torch.no_grad()
    def _key(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Keys of the degraded views and their margin scalers; afterwards the momentum encoder follows."""
        assert self._qgface_keys is not None
        key, norm = self._qgface_keys({**batch, "images": batch[DEGRADED_IMAGES].clone()})  # normalised in place
        self.qgface_key_statistics.update(norm)
        scaler = self.qgface_key_statistics.scaler(norm, self._qgface_h)
        ema_update(self.qgface_momentum, self, self._qgface_key_momentum)
        return key, scaler

    def _add_key_encoder(self, cfg: Any, head: AdaFaceHead) -> None:
        self._qgface_h = float(cfg.QGFACE.H)
        self._qgface_key_momentum = float(cfg.QGFACE.CONTRAST.KEY_MOMENTUM)
        self.qgface_momentum = build_teacher(cfg, self, method="QGFace", mixin=KeyMixin)
        own = head.statistics
        self.qgface_key_statistics = NormStatistics(
            momentum=own.momentum, mean_init=float(own.mean), std_init=float(own.std), debias=own.debias
        )
        self._qgface_keys = KeyEncoder(self.qgface_momentum)
        fill = partial(fill_missing_teacher, prefix=PREFIX, what="the momentum encoder (QGFACE.CONTRAST.QUEUE moco)")
        self.register_load_state_dict_post_hook(fill)  # type: ignore[no-untyped-call]

    def _count_shares(self, clean: Tensor, degraded: Tensor) -> None:
        threshold = self.qgface_threshold
        low = [(image_quality(scaler) < threshold).float().mean() for scaler in (clean, degraded)]
        self._qgface_steps += 1
        self._add_shares({"low_quality": sum(low) / 2, "low_quality_clean": low[0], "low_quality_degraded": low[1]})

    def _add_shares(self, values: dict[str, Any]) -> None:
        for name, value in values.items():
            self._qgface_shares[name] = self._qgface_shares.get(name, 0.0) + value.detach().float()

    def _leave_state_out_of_broadcasts(self) -> None:
        """``DistributedDataParallel`` does not send this state around, also where buffers are broadcast."""
        names = [name for name, _ in self.named_buffers() if name.startswith(STATE)]
        names += [f"heads.statistics.{name}" for name, _ in self._qgface_head[0].statistics.named_buffers()]
        nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)  # type: ignore[no-untyped-call]


def _both_views(batch: Batch) -> Batch:
    """The batch of 2 N images, clean views first, for the base."""
    images = torch.cat([batch["images"], batch[DEGRADED_IMAGES]])
    return {**batch, "images": images, "targets": batch["targets"].repeat(2)}
