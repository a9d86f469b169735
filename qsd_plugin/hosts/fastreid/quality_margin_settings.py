"""Settings of ``AdaFaceHead`` and ``QGFaceHead`` that cannot work, refused when a head is built."""

from __future__ import annotations

from typing import Any

from qsd_plugin.core.errors import ConfigError, did_you_mean
from qsd_plugin.hosts.fastreid.compose import base_architecture
from qsd_plugin.methods.qgface.head import REDUCTIONS, STARTS

NORM_SOURCES = ("neck_in", "neck_out")


def check_config(cfg: Any) -> None:
    """Refuse ``QGFACE`` settings with which the heads cannot work.

    Raises:
        ConfigError: Names the key.
    """
    options, heads = cfg.QGFACE, cfg.MODEL.HEADS
    choices = {"NORM_FROM": NORM_SOURCES, "START": ("", *STARTS), "REDUCTION": REDUCTIONS}
    for key, known in choices.items():
        if options[key] not in known:
            raise ConfigError(
                f"QGFACE.{key}", value=options[key], remedy=did_you_mean(str(options[key]), filter(None, known))
            )
    for name, value, fits, expected in (
        ("QGFACE.H", options.H, options.H > 0, "a number > 0"),
        ("QGFACE.MOMENTUM", options.MOMENTUM, 0 < options.MOMENTUM <= 1, "above 0, up to 1"),
        ("MODEL.HEADS.SCALE", heads.SCALE, heads.SCALE > 0, "a number > 0; the paper's is 64"),
        ("MODEL.HEADS.MARGIN", heads.MARGIN, heads.MARGIN >= 0, "a number >= 0; the paper's is 0.4"),
        ("MODEL.HEADS.NECK_FEAT", heads.NECK_FEAT, heads.NECK_FEAT in ("before", "after"), "before or after"),
    ):
        if not fits:
            raise ConfigError(name, value=value, expected=expected)
    epsilon = cfg.MODEL.LOSSES.CE.EPSILON
    if not 0 <= epsilon < 1:
        raise ConfigError(
            "MODEL.LOSSES.CE.EPSILON", value=epsilon, expected=f"at least 0 and below 1 with {heads.NAME}"
        )


def checked_threshold(value: float) -> float:
    """``QGFACE.THRESHOLD`` itself.

    Raises:
        ConfigError: It lies outside [0, 1].
    """
    if not 0 <= value <= 1:
        raise ConfigError(
            "QGFACE.THRESHOLD",
            value=value,
            expected="a number in [0, 1]",
            remedy="Quality is (margin scaler + 1) / 2; 0 switches the gate off.",
        )
    return value


def checked_reduction(cfg: Any) -> str:
    """``QGFACE.REDUCTION`` itself.

    Raises:
        ConfigError: ``active`` with an architecture that does not take its losses from ``Baseline``.
    """
    from fastreid.modeling.meta_arch import Baseline
    from fastreid.modeling.meta_arch.build import META_ARCH_REGISTRY

    reduction, name = str(cfg.QGFACE.REDUCTION), base_architecture(cfg)
    entry: Any = META_ARCH_REGISTRY.get(name)
    if reduction == "active" and not (isinstance(entry, type) and issubclass(entry, Baseline)):
        raise ConfigError("QGFACE.REDUCTION", value=reduction, expected=f"all with {name}, which has losses of its own")
    return reduction
