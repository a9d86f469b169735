"""Adds AGW's two losses to the host's ``Baseline``, chosen like the host's own by ``MODEL.LOSSES.NAME``."""

from __future__ import annotations

import functools
from typing import Any

import torch

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.methods.agw.losses import CenterLoss, weighted_regularised_triplet

#: Names in ``MODEL.LOSSES.NAME`` that only the plugin knows.
PLUGIN_LOSSES = ("WeightedTripletLoss", "CenterLoss")


def extend_baseline(baseline: Any) -> None:
    """Teach the host's ``Baseline`` class ``WeightedTripletLoss`` and ``CenterLoss``.

    Every architecture that derives from it (MoCo, Distiller, ours) inherits them; a config that names neither runs
    the host's code unchanged.
    """
    host_from_config = baseline.from_config.__func__
    host_init = baseline.__init__
    host_losses = baseline.losses

    @functools.wraps(host_from_config)
    def from_config(cls: type, cfg: Any) -> dict[str, Any]:
        arguments: dict[str, Any] = host_from_config(cls, cfg)
        arguments["loss_kwargs"].update(loss_arguments(cfg))
        return arguments

    @functools.wraps(host_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        host_init(self, *args, **kwargs)
        # Also reached by the plain keyword construction, which may know nothing of our losses.
        center = (self.loss_kwargs or {}).get("center")
        if center and "CenterLoss" in self.loss_kwargs["loss_names"] and center["num_classes"] > 0:
            self.center_loss = CenterLoss(
                center["num_classes"], center["dim"], weight=center["scale"], lr=center["lr"], seed=center["seed"]
            )

    @functools.wraps(host_losses)
    def losses(self: Any, outputs: dict[str, torch.Tensor], gt_labels: torch.Tensor) -> dict[str, torch.Tensor]:
        terms: dict[str, torch.Tensor] = host_losses(self, outputs, gt_labels)
        names = self.loss_kwargs["loss_names"]
        if "WeightedTripletLoss" in names:
            wtri = self.loss_kwargs["wtri"]
            loss = weighted_regularised_triplet(outputs["features"], gt_labels, stable=wtri["stable"])
            terms["loss_wtri"] = loss * wtri["scale"]
        if "CenterLoss" in names:
            terms["loss_center"] = self.center_loss(outputs["features"], gt_labels)  # carries CENTER.SCALE itself
        return terms

    baseline.from_config = classmethod(from_config)
    baseline.__init__ = init
    baseline.losses = losses


def loss_arguments(cfg: Any) -> dict[str, dict[str, Any]]:
    """Settings of the two losses in the form of the host's ``loss_kwargs``.

    Raises:
        ConfigError: A factor or learning rate is out of range.
    """
    wtri, center = cfg.MODEL.LOSSES.WTRI, cfg.MODEL.LOSSES.CENTER
    for key, value in (("WTRI.SCALE", wtri.SCALE), ("CENTER.SCALE", center.SCALE), ("CENTER.LR", center.LR)):
        if not value >= 0:
            raise ConfigError(f"MODEL.LOSSES.{key}", value=value, expected="a number >= 0")
    heads = cfg.MODEL.HEADS
    after_neck = heads.NECK_FEAT == "after" and heads.EMBEDDING_DIM > 0
    return {
        "wtri": {"scale": wtri.SCALE, "stable": wtri.STABLE},
        "center": {
            "scale": center.SCALE,
            "seed": max(cfg.SEED, 0),
            "lr": center.LR,
            "num_classes": heads.NUM_CLASSES,
            "dim": heads.EMBEDDING_DIM if after_neck else cfg.MODEL.BACKBONE.FEAT_DIM,
        },
    }
