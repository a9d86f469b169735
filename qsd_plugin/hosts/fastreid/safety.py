"""Nothing that was computed is lost: a training that stops on an error leaves a checkpoint, and damage is listed."""

from __future__ import annotations

import functools
import logging
import sys
from typing import Any

from fastreid.engine.train_loop import HookBase
from fastreid.utils import comm

from qsd_plugin.core.errors import QSDPluginError
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace
from qsd_plugin.hosts.fastreid.loaders import corrupt_images

logger = logging.getLogger("fastreid.qsd_plugin.safety")

CHECKPOINT = "model_interrupted"


class SafetyHook(HookBase):  # type: ignore[misc]
    """Saves ``model_interrupted.pth`` when training stops on an error, and lists damaged images at the end.

    ``--resume`` continues from that checkpoint with the epoch that was interrupted.

    Args:
        cfg: The host's config.
    """

    def __init__(self, cfg: Any) -> None:
        self._cfg = cfg

    def after_train(self) -> None:
        """Called by the host in a ``finally`` block: an exception on its way out is visible here."""
        summary = corrupt_images(self._cfg).summary()
        if summary:
            logger.warning(summary)
        error = sys.exc_info()[1]
        if error is None or not comm.is_main_process():
            return
        try:
            # The host resumes behind the stored epoch; the one that was interrupted is to be repeated.
            self.trainer.checkpointer.save(CHECKPOINT, epoch=self.trainer.epoch - 1)
        except (OSError, RuntimeError, QSDPluginError) as failure:
            logger.error("Could not save %s.pth: %s", CHECKPOINT, failure)
        else:
            logger.error("Training stopped (%s). --resume continues from %s.pth.", type(error).__name__, CHECKPOINT)


def install() -> Undo:
    """Add the hook to every ``DefaultTrainer``."""
    from fastreid.engine.defaults import DefaultTrainer

    host_build = DefaultTrainer.build_hooks

    @functools.wraps(host_build)
    def build_hooks(self: Any) -> list[Any]:
        return [*host_build(self), SafetyHook(self.cfg)]

    return replace(DefaultTrainer, "build_hooks", build_hooks)
