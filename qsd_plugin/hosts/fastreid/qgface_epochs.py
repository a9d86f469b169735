"""QGFace from epoch to epoch: its schedules, and which share of the images is of low quality.

The shares are written to the host's event storage (``metrics.json``) at the end of each epoch, and told in the log with
a warning when a branch has next to nothing to do.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from fastreid.engine.train_loop import HookBase
from torch.nn.parallel import DistributedDataParallel

from qsd_plugin.core.distributed import all_reduce_sum, world_size
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace
from qsd_plugin.hosts.fastreid.meta_arch.qgface import QGFaceMixin

logger = logging.getLogger("fastreid.qsd_plugin.qgface")

#: Share of low-quality views, or of contrasted pairs, below which QGFace is next to its base.
FEW = 0.01


class QGFaceHook(HookBase):  # type: ignore[misc]
    """Tells the model the epoch, and writes its shares at the end.

    Args:
        model: The network in training, without a data-parallel wrapper.
    """

    def __init__(self, model: QGFaceMixin) -> None:
        self._model = model

    def before_epoch(self) -> None:
        """Thresholds, weight and queue of the epoch."""
        self._model.start_qgface_epoch(self.trainer.epoch)

    def after_step(self) -> None:
        """Behind the last step of an epoch, write the shares of all ranks, and warn if there is little to do.

        Not behind the epoch: the host has by then written the training's last figures and takes no more.
        """
        if (self.trainer.iter + 1) % self.trainer.iters_per_epoch:
            return
        shares = shares_of_all_ranks(self._model)
        if not shares:
            return
        written = {f"qgface/{name}": share for name, share in shares.items()}
        self.trainer.storage.put_scalars(smoothing_hint=False, **written)
        epoch, threshold = self.trainer.epoch, self._model.qgface_threshold
        logger.info("Epoch %d: %s", epoch, described(shares, threshold))
        if threshold > 0:
            for warning in warnings(shares, threshold):
                logger.warning("Epoch %d: %s", epoch, warning)


def shares_of_all_ranks(model: QGFaceMixin) -> dict[str, float]:
    """:meth:`~.QGFaceMixin.qgface_shares` averaged over the ranks; every rank must make the call."""
    shares = model.qgface_shares()
    if not shares:
        return {}
    values = all_reduce_sum(torch.stack(list(shares.values()))) / world_size()
    return dict(zip(shares, values.tolist(), strict=True))


def described(shares: Mapping[str, float], threshold: float) -> str:
    """The shares in words."""
    contrasted = f", {shares['contrasted']:.1%} of the pairs are contrasted" if "contrasted" in shares else ""
    return (
        f"{shares['low_quality']:.1%} of the views are of a quality below {threshold:g} (clean "
        f"{shares['low_quality_clean']:.1%}, degraded {shares['low_quality_degraded']:.1%}){contrasted}"
    )


def warnings(shares: Mapping[str, float], threshold: float) -> list[str]:
    """What is to be said about branches that have next to nothing to do."""
    told = []
    step = "Raise QGFACE.THRESHOLD (or QGFACE.CONTRAST.THRESHOLD): 0.4 is about a quarter of a batch, 0.5 half of it."
    if shares["low_quality"] < FEW:
        told.append(
            f"{described(shares, threshold)}: less than {FEW:.0%}, so the gate of the classifier hardly closes. {step}"
        )
    elif shares.get("contrasted", 1.0) < FEW:
        told.append(
            f"{described(shares, threshold)}: less than {FEW:.0%}, so the contrastive branch hardly learns. {step}"
        )
    return told


def install() -> Undo:
    """Add the hook to every ``DefaultTrainer`` of a QGFace model."""
    from fastreid.engine.defaults import DefaultTrainer

    host_build = DefaultTrainer.build_hooks

    @functools.wraps(host_build)
    def build_hooks(self: Any) -> list[Any]:
        hooks = host_build(self)
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        # In front of the host's hooks, so that the shares are there before the epoch's figures are written.
        return [QGFaceHook(model), *hooks] if isinstance(model, QGFaceMixin) else hooks

    return replace(DefaultTrainer, "build_hooks", build_hooks)
