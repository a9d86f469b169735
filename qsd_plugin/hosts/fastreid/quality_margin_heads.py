"""``MODEL.HEADS.NAME: AdaFaceHead`` and ``QGFaceHead``: the margin follows the norm of the feature, on any backbone.

Shapes: B rows of this rank, D embedding, C classes.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

import torch
import torch.nn.functional as F
from fastreid.config import configurable
from fastreid.modeling.heads.embedding_head import EmbeddingHead
from torch import Tensor, nn

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace
from qsd_plugin.hosts.fastreid.quality_margin_settings import check_config, checked_reduction, checked_threshold
from qsd_plugin.hosts.fastreid.statistics import Statistics
from qsd_plugin.methods.qgface import (
    NormStatistics,
    adaface_logits,
    check_labels,
    classification_gate,
    image_quality,
    unit_and_norm,
)
from qsd_plugin.methods.qgface.head import STARTS, mean_over
from qsd_plugin.methods.qgface.statistics import NORM_RANGE

logger = logging.getLogger("fastreid.qsd_plugin.qgface")

#: Further entries of the heads' training output, see :meth:`AdaFaceHead.forward`.
EMBEDDING, NORM, SCALER, ACTIVE = "unit_embedding", "norm", "margin_scaler", "active"


class AdaptiveMargin(nn.Module):
    """What the heads have as ``cls_layer``: cosines and margin scalers to logits.

    Args:
        num_classes: C.
        scale: s > 0.
        margin: m >= 0.
        threshold: b in [0, 1]; below this quality a row of logits is gated towards 0. 0: no gate.
    """

    def __init__(self, num_classes: int, scale: float, margin: float, threshold: float) -> None:
        super().__init__()
        self.num_classes, self.s, self.m, self.threshold = num_classes, scale, margin, threshold

    def forward(self, cosine: Tensor, targets: Tensor, scaler: Tensor) -> Tensor:
        """Cosines [B, C], targets [B] and margin scalers [B, 1] to logits [B, C]."""
        gate = classification_gate(scaler, self.threshold, self.s) if self.threshold else None
        return adaface_logits(cosine, targets, scaler, margin=self.m, scale=self.s, gate=gate)

    def extra_repr(self) -> str:
        """The settings, for ``print(model)``."""
        return f"num_classes={self.num_classes}, scale={self.s}, margin={self.m}, threshold={self.threshold}"


class AdaFaceHead(EmbeddingHead):  # type: ignore[misc]
    """``EmbeddingHead`` with AdaFace's margin: hard on sharp images, lenient with poor ones, told apart by their norms.

    Parameters and evaluation are the host's; the state dict gains ``statistics.*``. While training, the norms of a
    batch enter the statistics before they are used, unless gradients are off (precise batch norm, teachers).
    ``MODEL.HEADS.CLS_LAYER`` is not read. ``loss_cls`` is the mean over all rows, where the host's own leaves rows of
    loss 0 out.

    Across ranks: the norm statistics are reduced and equal on every rank, so they need no broadcast (the host's
    data-parallel training makes none); the loss is a local mean. Precision: an fp32 island (float64 stays).

    Args:
        norm_from: ``"neck_in"`` or ``"neck_out"``: the feature whose length is taken.
        h: Concentration of the margin scaler, > 0.
        momentum: Of the norm statistics, in (0, 1].
        start: Of the norm statistics: ``"debiased"``, ``"adaface"`` or ``"zeros"``.
        threshold: b in [0, 1]; 0 without a gate.
        reduction: Of the classification loss: ``"all"`` rows or the ``"active"`` ones, of quality >= threshold.
        arguments: Of ``EmbeddingHead``.

    Raises:
        ConfigError: From ``from_config``, a key is out of range; in training, the head was built without classes.
        DataError: In training on the CPU, labels beyond the head.

    Source: Kim et al., "AdaFace: Quality Adaptive Margin for Face Recognition", CVPR 2022.
    """

    #: Start of the statistics where ``QGFACE.START`` is empty.
    default_start = "adaface"

    @configurable  # type: ignore[untyped-decorator]
    def __init__(
        self,
        *,
        norm_from: str,
        h: float,
        momentum: float,
        start: str,
        threshold: float,
        reduction: str,
        **arguments: Any,
    ) -> None:
        super().__init__(**arguments)
        if norm_from == "neck_out" and arguments["with_bnneck"]:
            _warn_of_norms_behind_the_neck()
        self._before_norm = bool(arguments["with_bnneck"]) and norm_from == "neck_in"
        self._reduced = arguments["embedding_dim"] > 0
        self._h, self.reduction = h, reduction
        self.cls_layer = AdaptiveMargin(
            arguments["num_classes"], float(arguments["scale"]), float(arguments["margin"]), threshold
        )
        mean, std = STARTS[start] or (0.0, 0.0)
        self.statistics = NormStatistics(momentum=momentum, mean_init=mean, std_init=std, debias=STARTS[start] is None)
        self._logged = Statistics("norms")

    @classmethod
    def from_config(cls, cfg: Any) -> dict[str, Any]:
        """The host's arguments and those of this head."""
        check_config(cfg)
        return {
            **super().from_config(cfg),
            "norm_from": cfg.QGFACE.NORM_FROM,
            "h": cfg.QGFACE.H,
            "momentum": cfg.QGFACE.MOMENTUM,
            "start": cfg.QGFACE.START or cls.default_start,
            **cls._gate(cfg),
        }

    @classmethod
    def _gate(cls, cfg: Any) -> dict[str, Any]:
        return {"threshold": 0.0, "reduction": "all"}

    def reset_parameters(self) -> None:
        """The host's initial neck, and class centres of unit length in random directions."""
        super().reset_parameters()
        with torch.no_grad():
            self.weight.copy_(F.normalize(self.weight.uniform_(-1, 1), dim=1))

    @property
    def threshold(self) -> float:
        """b, the quality below which an image is not classified; may be changed between steps."""
        return float(self.cls_layer.threshold)

    @threshold.setter
    def threshold(self, value: float) -> None:
        self.cls_layer.threshold = checked_threshold(value)

    def proxies(self, labels: Tensor) -> Tensor:
        """The class centres of labels [B] int64 as they are, of any length: [B, D], without gradient."""
        centres: Tensor = self.weight.detach()[labels]
        return centres

    def forward(self, features: Tensor, targets: Tensor | None = None) -> Any:
        """Maps [B, C', H, W] to embeddings [B, D]; in training to the dict that the host's losses take.

        Beside the host's entries it holds ``unit_embedding`` [B, D], ``norm`` [B, 1] (of the feature that
        ``QGFACE.NORM_FROM`` names) and ``margin_scaler`` [B, 1] in [-1, 1], whose ``(k + 1) / 2`` is the quality; the
        last two are without gradient. ``active`` [B] bool, quality >= threshold, comes with the reduction of that name.
        """
        if not self.training:
            return super().forward(features)
        pooled = self.pool_layer(features)
        neck = self.bottleneck(pooled)
        embedding = neck[..., 0, 0]
        targets = self._checked_targets(targets)
        judged = self._neck_input(pooled.detach()) if self._before_norm else embedding.detach()
        with torch.autocast(embedding.device.type, enabled=False):
            unit, norm = unit_and_norm(embedding)[0], unit_and_norm(judged)[1]
            if torch.is_grad_enabled():
                self.statistics.update(norm)
            scaler = self.statistics.scaler(norm.to(self.weight.dtype), self._h)
            cosine = F.linear(unit.to(self.weight.dtype), F.normalize(self.weight, dim=1))
            logits = self.cls_layer(cosine, targets, scaler)
        if torch.is_grad_enabled():
            self._logged.add(self._figures(norm, scaler))
        outputs = {
            "cls_outputs": logits,
            "pred_class_logits": cosine * self.cls_layer.s,
            "features": pooled[..., 0, 0] if self.neck_feat == "before" else embedding,
            EMBEDDING: unit,
            NORM: norm,
            SCALER: scaler,
        }
        return outputs | ({ACTIVE: ~self._low(scaler)} if self.reduction == "active" else {})

    def _neck_input(self, pooled: Tensor) -> Tensor:
        """What the batch norm of the neck gets, [B, D]; past the modules, whose hooks are to see one pass only."""
        return (F.conv2d(pooled, self.bottleneck[0].weight.detach()) if self._reduced else pooled)[..., 0, 0]

    def _checked_targets(self, targets: Tensor | None) -> Tensor:
        classes = len(self.weight)
        if targets is None or not classes:
            raise ConfigError(
                "MODEL.HEADS.NUM_CLASSES", value=classes, expected="the number of identities, in training"
            )
        if targets.device.type == "cpu":
            check_labels(targets, classes)
        return targets

    def _figures(self, norm: Tensor, scaler: Tensor) -> dict[str, Tensor]:
        mean, std = self.statistics.current()
        clipped = (norm <= NORM_RANGE[0]) | (norm >= NORM_RANGE[1])
        figures = {"mean": mean, "std": std, "clipped": clipped.double().mean()}
        return figures | ({"low_quality": self._low(scaler).double().mean()} if self.threshold else {})

    def _low(self, scaler: Tensor) -> Tensor:
        return image_quality(scaler[:, 0]) < self.threshold


class QGFaceHead(AdaFaceHead):
    """QGFace's form of :class:`AdaFaceHead`: logits vanish for images of a quality below ``QGFACE.THRESHOLD``.

    Source: Song and Wang, "Quality-Guided Joint Training for Mixed-Quality Face Recognition", arXiv 2312.17494.
    """

    default_start = "debiased"

    @classmethod
    def _gate(cls, cfg: Any) -> dict[str, Any]:
        return {"threshold": checked_threshold(cfg.QGFACE.THRESHOLD), "reduction": checked_reduction(cfg)}


def quality_head(model: Any) -> AdaFaceHead:
    """The head of a model that tells quality by norms, with or without a data-parallel wrapper.

    Raises:
        ConfigError: Its head keeps no statistics of norms.
    """
    head: object = getattr(getattr(model, "module", model), "heads", None)
    if not isinstance(head, AdaFaceHead):
        raise ConfigError(
            "MODEL.HEADS.NAME",
            value=type(head).__name__,
            expected="a head with norm statistics, by which images are gated",
            remedy="Use QGFaceHead, or AdaFaceHead.",
        )
    found: AdaFaceHead = head
    return found


def install() -> Undo:
    """Register the heads, and let ``Baseline`` take their classification loss over all or over the active rows."""
    from fastreid.modeling.heads.build import REID_HEADS_REGISTRY
    from fastreid.modeling.meta_arch import Baseline

    for head in (AdaFaceHead, QGFaceHead):
        REID_HEADS_REGISTRY.register(head)
    host_losses = Baseline.losses

    @functools.wraps(host_losses)
    def losses(self: Any, outputs: dict[str, Tensor], gt_labels: Tensor) -> dict[str, Tensor]:
        settings = self.loss_kwargs
        if SCALER not in outputs or "CrossEntropyLoss" not in settings["loss_names"]:
            return host_losses(self, outputs, gt_labels)  # type: ignore[no-any-return]
        others = tuple(name for name in settings["loss_names"] if name != "CrossEntropyLoss")
        self.loss_kwargs = {**settings, "loss_names": others}
        try:
            terms = host_losses(self, outputs, gt_labels)
        finally:
            self.loss_kwargs = settings
        rows = smoothed_cross_entropy(outputs["cls_outputs"], gt_labels, settings["ce"]["eps"])
        return {"loss_cls": mean_over(rows, outputs.get(ACTIVE)) * settings["ce"]["scale"], **terms}

    return replace(Baseline, "losses", losses)


def smoothed_cross_entropy(logits: Tensor, targets: Tensor, epsilon: float) -> Tensor:
    """Cross entropy of each row, [B, C] to [B]; as the host smooths, the other classes share ``epsilon``.

    Args:
        logits: [B, C], C >= 2 with smoothing.
        targets: [B] int64.
        epsilon: In [0, 1).
    """
    if not epsilon:
        return F.cross_entropy(logits, targets, reduction="none")
    log = logits.log_softmax(dim=1)
    others = epsilon / (logits.shape[1] - 1)
    true = log.gather(1, targets[:, None])[:, 0]
    return -(others * log.sum(dim=1) + (1 - epsilon - others) * true)


@functools.cache
def _warn_of_norms_behind_the_neck() -> None:
    logger.warning(
        "QGFACE.NORM_FROM neck_out: batch norm has brought the features to one scale, so their length hardly tells "
        "quality any more, and the margin follows little but chance. Use neck_in."
    )
