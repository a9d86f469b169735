"""``QGFACE.BASE``, ``PROFILE`` and ``CONTRAST``: QGFace's contrastive branch on top of another architecture."""

from __future__ import annotations

from typing import Any


def add_qgface_contrast_config(cfg: Any) -> None:
    """``MODEL.META_ARCHITECTURE: QGFace`` (Song and Wang, arXiv 2312.17494).

    The scale s is ``MODEL.HEADS.SCALE``, the weight of a new batch in the moving gap ``QGFACE.MOMENTUM``.
    """
    if "QGFACE" not in cfg:
        cfg.QGFACE = type(cfg)()
    if "CONTRAST" in cfg.QGFACE:
        return
    # Meta-architecture that QGFace extends: Baseline or any other registered one with a single head.
    cfg.QGFACE.BASE = "Baseline"
    # What CONTRAST's empty keys stand for. figure (as the authors drew it: only the degraded view learns, and from the
    # positive no gradient comes back) | code_default (their program's defaults: both views are anchors, and learn).
    cfg.QGFACE.PROFILE = "figure"
    cfg.QGFACE.CONTRAST = node = type(cfg)()
    # Factor of loss_qgface (lambda). 0 computes and logs it without training on it. >= 0; 1 in a third party's account.
    node.WEIGHT = 1.0
    # Pairs of lower quality (b) are contrasted. 0 to 1; 0: all pairs. -1: QGFACE.THRESHOLD.
    node.THRESHOLD = -1.0
    # Anchors: single (the degraded views) | double (the clean ones, too). Empty: PROFILE's.
    node.COUPLING = ""
    # Gradient through the positive: detached | attached. Empty: PROFILE's.
    node.POSITIVE = ""
    # Negatives that are taken out: of the same identity | of the same instance (image). Empty: PROFILE's.
    node.MASK = ""
    # How they are taken out: zero (cosine 0, as the authors: they still count in the softmax) | exclude.
    node.MASK_FILL = "zero"
    # Weight of a pair below the threshold: sgn (1) | cos | linear (both rise from 0 to 1 at the threshold). Empty:
    # PROFILE's.
    node.WEIGHTING = ""
    # Weight of a pair above it: half (0) | whole (mirrored). Empty: PROFILE's.
    node.RANGE = ""
    # Quality of a pair: low (of the worse image) | mean | high. Empty: PROFILE's.
    node.SELECT = ""
    # Margin on the cosine of the positive: none | static (MARGIN) | dynamic (moving gap between positive and hardest
    # negative). Empty: PROFILE's.
    node.MARGIN_METHOD = ""
    # MARGIN_METHOD static only. A cosine, >= 0.
    node.MARGIN = 0.4
    # True: times ln(129) / ln(K + 1), so that the loss does not grow with the K entries of the queue (authors').
    node.RESCALE = True
    # Mean over all pairs (authors'; one without weight counts with a constant) | over the active ones.
    node.REDUCTION = "all"

    # proxy (entries move along with their class centres) | fifo (they do not) | moco (keys of a momentum encoder that
    # sees the degraded view, anchors are the clean ones, of which alone the base learns) | none (no contrastive branch:
    # both views are classified and that is all).
    node.QUEUE = "proxy"
    # Entries (K). At least 2 x SOLVER.IMS_PER_BATCH, with moco 1 x. Number of identities in a third party's account.
    node.QUEUE_SIZE = 8192
    # QUEUE proxy only. True: moved entries are brought back to unit length (authors' are not).
    node.RENORM = False
    # QUEUE moco only. Share of the momentum encoder that is kept at each step. 0 to 1.
    node.KEY_MOMENTUM = 0.999

    # Schedules of the authors' program, by epoch from 0; their values were never published, so all are off.
    # First epoch in which the loss counts (later_joint); the queue is filled before. 0 to SOLVER.MAX_EPOCH - 1.
    node.START_EPOCH = 0
    # First epoch in which it no longer does (later_detach). Above START_EPOCH; 0: never.
    node.STOP_EPOCH = 0
    # Epochs over which the thresholds of both branches grow from 0 (warmup_scaler). >= 0; 0: none.
    node.WARMUP_EPOCHS = 0
    # True: the queue grows linearly from one step's entries to QUEUE_SIZE in the last epoch (progressive).
    node.PROGRESSIVE = False
