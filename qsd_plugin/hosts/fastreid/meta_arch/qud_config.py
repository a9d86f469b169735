"""Which ``QUD`` settings can work together; asked before anything is built."""

from __future__ import annotations

from typing import Any

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.fastreid.compose import in_chain, node
from qsd_plugin.methods.qud.loss import MSE_REDUCTIONS

LOSSES = ("qud", "mse", "cosine", "soft")
PROJECTORS = ("auto", "none", "linear")


def label_free(cfg: Any) -> bool:
    """Whether the architecture of ``cfg`` is a QUD that reads no labels."""
    return in_chain(cfg, "QUD") and not cfg.QUD.HOST_LOSSES


def check_config(cfg: Any) -> None:
    """Refuse ``QUD`` settings that cannot work, before anything is built.

    Raises:
        ConfigError: Names the key, its value and what is accepted.
    """
    qud = cfg.QUD
    choices = {"LOSS": LOSSES, "PROJECTOR": PROJECTORS, "MSE_REDUCTION": MSE_REDUCTIONS}
    for key, allowed in choices.items():
        if qud[key] not in allowed:
            raise ConfigError(f"QUD.{key}", value=qud[key], expected=" or ".join(allowed))
    for key in ("TEMPERATURE", "SOFT_TEMPERATURE"):
        if not 0 < qud[key] < float("inf"):
            raise ConfigError(f"QUD.{key}", value=qud[key], expected="a finite number above 0")
    if not qud.WEIGHT >= 0:
        raise ConfigError("QUD.WEIGHT", value=qud.WEIGHT, expected="a number >= 0")
    if not -1 < qud.MASK_ABOVE <= 1:
        raise ConfigError("QUD.MASK_ABOVE", value=qud.MASK_ABOVE, expected="a cosine above -1, at most 1 (no mask)")
    if qud.MASK_ABOVE < 1 and qud.LOSS != "qud":
        raise ConfigError("QUD.MASK_ABOVE", value=qud.MASK_ABOVE, expected=f"1 (no mask) with QUD.LOSS {qud.LOSS}")
    if cfg.SOLVER.IMS_PER_BATCH > qud.QUEUE_SIZE:
        raise ConfigError(
            "QUD.QUEUE_SIZE",
            value=qud.QUEUE_SIZE,
            expected=f"at least SOLVER.IMS_PER_BATCH {cfg.SOLVER.IMS_PER_BATCH}, the images of a step on all GPUs",
            remedy="Make the queue larger or the batch smaller.",
        )
    if qud.TEACHER.DIM < 0:
        raise ConfigError("QUD.TEACHER.DIM", value=qud.TEACHER.DIM, expected="an integer >= 0")
    _check_base(cfg)
    if in_chain(cfg, "QSD"):
        _check_with_qsd(cfg)


def _check_base(cfg: Any) -> None:
    base = str(cfg.QUD.BASE)
    if base == "QSD":
        raise ConfigError(
            "QUD.BASE",
            value=base,
            expected="the student's architecture",
            remedy="QSD goes on top: MODEL.META_ARCHITECTURE QSD with QSD.BASE QUD.",
        )
    if label_free(cfg) and (base in ("MoCo", "Distiller") or "BASE" in cfg.get(node(base), {})):
        raise ConfigError(
            "QUD.BASE",
            value=base,
            expected="Baseline with QUD.HOST_LOSSES False, because all that it adds to Baseline are losses",
            remedy="Set QUD.HOST_LOSSES True to train with them.",
        )


def _check_with_qsd(cfg: Any) -> None:
    if cfg.QSD.PAIRING == "partner" and cfg.QSD.PARTNER_FORWARD == "joint":
        raise ConfigError(
            "QSD.PARTNER_FORWARD",
            value="joint",
            expected="separate over QUD, whose teacher embeds the anchors and not their partners",
        )
    if cfg.QSD.EMA.ENABLED and label_free(cfg):
        raise ConfigError(
            "QSD.EMA.ENABLED",
            value=True,
            expected="False over QUD without the host's losses, because the average needs class layers",
            remedy="Set QUD.HOST_LOSSES True, or leave the average out.",
        )
