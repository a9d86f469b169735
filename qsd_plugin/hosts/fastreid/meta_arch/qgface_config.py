"""Which ``QGFACE`` settings can work together, asked before anything is built, and what they come to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from qsd_plugin.core.distributed import world_size
from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.hosts.fastreid.compose import in_chain
from qsd_plugin.hosts.fastreid.training_views import check_config as check_views
from qsd_plugin.methods.qgface import (
    PROFILES,
    QGContrast,
    contrast_options,
    contrast_weight_at,
    queue_limit_at,
    threshold_at,
)

QUEUES = ("proxy", "fifo", "moco", "none")
#: Config key of each setting that a profile has.
_PROFILE_KEYS = {
    "coupling": "COUPLING",
    "detach_positive": "POSITIVE",
    "mask": "MASK",
    "weighting": "WEIGHTING",
    "weight_range": "RANGE",
    "select": "SELECT",
    "margin_method": "MARGIN_METHOD",
}
_POSITIVE = {"detached": True, "attached": False}


@dataclass(frozen=True)
class Schedule:
    """What changes from epoch to epoch.

    Args:
        weight: Lambda.
        threshold: b of the contrastive branch.
        head_threshold: b of the classification branch.
        start_epoch: First epoch in which the contrastive loss counts.
        stop_epoch: First one in which it no longer does; ``None``: never.
        warmup_epochs: Over which both thresholds grow from 0.
        queue_size: Slots of the queue.
        smallest: Entries that count in epoch 0; ``None``: always all.
        epochs: Of the training.
    """

    weight: float
    threshold: float
    head_threshold: float
    start_epoch: int
    stop_epoch: int | None
    warmup_epochs: int
    queue_size: int
    smallest: int | None
    epochs: int

    def weight_at(self, epoch: int) -> float:
        """Lambda in an epoch, from 0."""
        return contrast_weight_at(epoch, weight=self.weight, start_epoch=self.start_epoch, stop_epoch=self.stop_epoch)

    def thresholds_at(self, epoch: int) -> tuple[float, float]:
        """b of the contrastive and of the classification branch in an epoch."""
        contrast, head = (
            threshold_at(epoch, threshold=value, warmup_epochs=self.warmup_epochs)
            for value in (self.threshold, self.head_threshold)
        )
        return contrast, head

    def queue_limit_at(self, epoch: int) -> int:
        """Entries of the queue that count in an epoch."""
        if self.smallest is None:
            return self.queue_size
        epoch = min(epoch, self.epochs - 1)
        return queue_limit_at(epoch, size=self.queue_size, smallest=self.smallest, epochs=self.epochs)


def check_config(cfg: Any) -> None:
    """Refuse ``QGFACE`` settings that cannot work, before anything is built.

    Raises:
        ConfigError: Names the key, its value and what is accepted.
    """
    check_views(cfg)
    options = cfg.QGFACE.CONTRAST
    for key, value, known in (
        ("PROFILE", cfg.QGFACE.PROFILE, PROFILES),
        ("CONTRAST.QUEUE", options.QUEUE, QUEUES),
        ("CONTRAST.POSITIVE", options.POSITIVE, ("", *_POSITIVE)),
    ):
        if value not in known:
            raise ConfigError(f"QGFACE.{key}", value=value, remedy=did_you_mean(str(value), filter(None, known)))
    if cfg.QGFACE.VIEWS.MODE == "single":
        raise ConfigError(
            "QGFACE.VIEWS.MODE",
            value="single",
            expected="pair with MODEL.META_ARCHITECTURE QGFace, which contrasts two views of an image",
            remedy="For one view set MODEL.META_ARCHITECTURE to the base, such as Baseline.",
        )
    if not options.WEIGHT >= 0:
        raise ConfigError("QGFACE.CONTRAST.WEIGHT", value=options.WEIGHT, expected="a number >= 0")
    for key, value, otherwise in (
        ("THRESHOLD", cfg.QGFACE.THRESHOLD, ""),
        ("CONTRAST.THRESHOLD", options.THRESHOLD, ", or -1: QGFACE.THRESHOLD"),
    ):
        if not 0 <= value <= 1 and not (otherwise and value == -1):
            raise ConfigError(f"QGFACE.{key}", value=value, expected=f"a number in [0, 1]{otherwise}")
    if not 0 <= options.KEY_MOMENTUM <= 1:
        raise ConfigError("QGFACE.CONTRAST.KEY_MOMENTUM", value=options.KEY_MOMENTUM, expected="a number in [0, 1]")
    _check_chain(cfg)
    _check_schedules(cfg)
    if options.QUEUE != "none":
        _check_queue(cfg)
        build_contrast(cfg)


def build_contrast(cfg: Any) -> QGContrast:
    """The contrastive branch of ``QGFACE.PROFILE`` with the keys of ``QGFACE.CONTRAST`` that are not empty.

    Raises:
        ConfigError: An unknown choice, or a number out of range.
    """
    options = cfg.QGFACE.CONTRAST
    settings: dict[str, Any] = dict(contrast_options(cfg.QGFACE.PROFILE))
    for name, key in _PROFILE_KEYS.items():
        if options[key]:
            settings[name] = _POSITIVE[options[key]] if key == "POSITIVE" else options[key]
    settings["rescale"] = options.RESCALE
    return QGContrast(
        threshold=contrast_threshold(cfg),
        mask_fill=options.MASK_FILL,
        margin=options.MARGIN,
        momentum=cfg.QGFACE.MOMENTUM,
        reduction=options.REDUCTION,
        scale=cfg.MODEL.HEADS.SCALE,
        **settings,
    )


def contrast_threshold(cfg: Any) -> float:
    """b of the contrastive branch."""
    own = cfg.QGFACE.CONTRAST.THRESHOLD
    return float(cfg.QGFACE.THRESHOLD if own == -1 else own)


def views_per_image(cfg: Any) -> int:
    """Embeddings of an image that enter the queue."""
    return 1 if cfg.QGFACE.CONTRAST.QUEUE == "moco" else 2


def build_schedule(cfg: Any) -> Schedule:
    """The schedules of ``QGFACE.CONTRAST``."""
    options = cfg.QGFACE.CONTRAST
    return Schedule(
        weight=float(options.WEIGHT),
        threshold=contrast_threshold(cfg),
        head_threshold=float(cfg.QGFACE.THRESHOLD),
        start_epoch=options.START_EPOCH,
        stop_epoch=options.STOP_EPOCH or None,
        warmup_epochs=options.WARMUP_EPOCHS,
        queue_size=options.QUEUE_SIZE,
        smallest=views_per_image(cfg) * cfg.SOLVER.IMS_PER_BATCH if options.PROGRESSIVE else None,
        epochs=cfg.SOLVER.MAX_EPOCH,
    )


def _check_queue(cfg: Any) -> None:
    views, images, ranks = views_per_image(cfg), cfg.SOLVER.IMS_PER_BATCH, world_size()
    size = cfg.QGFACE.CONTRAST.QUEUE_SIZE
    if size < views * images:
        raise ConfigError(
            "QGFACE.CONTRAST.QUEUE_SIZE",
            value=size,
            expected=f"at least {views * images} = {views} views x {images // ranks} images x {ranks} ranks, what one "
            "step puts in",
            remedy="Make the queue larger or SOLVER.IMS_PER_BATCH smaller.",
        )


def _check_schedules(cfg: Any) -> None:
    options, epochs = cfg.QGFACE.CONTRAST, cfg.SOLVER.MAX_EPOCH
    start, stop, warmup = options.START_EPOCH, options.STOP_EPOCH, options.WARMUP_EPOCHS
    for key, value, fits, expected in (
        ("START_EPOCH", start, 0 <= start < max(epochs, 1), f"0 to {epochs - 1}, an epoch of SOLVER.MAX_EPOCH"),
        ("STOP_EPOCH", stop, stop == 0 or stop > start, f"above START_EPOCH {start}, or 0: never"),
        ("WARMUP_EPOCHS", warmup, 0 <= warmup <= epochs, f"0 to SOLVER.MAX_EPOCH {epochs}"),
    ):
        if not fits:
            raise ConfigError(f"QGFACE.CONTRAST.{key}", value=value, expected=expected)


def _check_chain(cfg: Any) -> None:
    if in_chain(cfg, "QUD"):
        raise ConfigError(
            "MODEL.META_ARCHITECTURE",
            value=cfg.MODEL.META_ARCHITECTURE,
            expected="QUD or QGFace: QUD learns one view without labels, QGFace classifies two",
            remedy="Train a QGFace network and let QUD distil it: KD.MODEL_CONFIG, KD.MODEL_WEIGHTS.",
        )
    if cfg.QGFACE.BASE == "QSD":
        raise ConfigError(
            "QGFACE.BASE",
            value="QSD",
            expected="the network's architecture",
            remedy="QSD goes on top: MODEL.META_ARCHITECTURE QSD with QSD.BASE QGFace.",
        )
    if in_chain(cfg, "QSD") and cfg.QSD.PAIRING == "partner":
        raise ConfigError(
            "QSD.PAIRING",
            value="partner",
            expected="inbatch over QGFace, whose queue takes the views of one image once a step",
            remedy="Use QSD.PAIRING inbatch with NaiveIdentitySampler: QSD then pairs the clean views.",
        )
