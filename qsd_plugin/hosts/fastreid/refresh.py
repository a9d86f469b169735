"""``QUALITY.REFRESH_EPOCHS``: the training images are labelled again with the network as it is now.

After every N epochs each training set gets a new label file in ``OUTPUT_DIR``, which all ranks use from then on. The
file is written before the epoch's checkpoint, so a checkpoint of N epochs or more always has its labels beside it, and
a resumed training takes those that were in force.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from fastreid.engine.train_loop import HookBase
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from qsd_plugin.core.distributed import on_main
from qsd_plugin.core.errors import LabelError
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace
from qsd_plugin.hosts.fastreid.datasets import training_set
from qsd_plugin.hosts.fastreid.labelling import label_with
from qsd_plugin.hosts.fastreid.quality import ImageQuality

logger = logging.getLogger("fastreid.qsd_plugin.quality")


class RefreshHook(HookBase):  # type: ignore[misc]
    """Labels the training images with the current network after every ``QUALITY.REFRESH_EPOCHS`` epochs.

    The network labels in eval mode and is then as it was: no parameter, batch statistic, mode or global random stream
    changes. Rank 0 labels, the others wait.

    Args:
        cfg: The host's config.
        model: The network in training, without a data-parallel wrapper.
        qualities: The modules in it that look labels up.
    """

    def __init__(self, cfg: Any, model: nn.Module, qualities: Sequence[ImageQuality]) -> None:
        self._cfg, self._model, self._qualities = cfg, model, qualities
        self._period = cfg.QUALITY.REFRESH_EPOCHS

    def before_epoch(self) -> None:
        """Take up the labels in force when training was interrupted.

        Raises:
            LabelError: Their files are gone, and the network that made them has moved on.
        """
        start = self.trainer.start_epoch
        made = start // self._period * self._period
        if self.trainer.epoch != start or not made:
            return
        missing = on_main(lambda: [str(file) for file in refreshed_files(self._cfg, made) if not file.is_file()])
        if missing and made != start:
            raise LabelError(
                f"Labels refreshed after epoch {made}",
                value=missing[0],
                expected=f"an existing file, because training goes on at epoch {start}",
                remedy="Put it back, or train again from the start (without --resume).",
            )
        if missing:
            self._refresh(made)
        else:
            self._use(made)

    def after_epoch(self) -> None:
        """Label again when it is time, but not after the last epoch."""
        finished = self.trainer.epoch + 1
        if finished % self._period == 0 and finished < self.trainer.max_epoch:
            self._refresh(finished)

    def _refresh(self, finished: int) -> None:
        on_main(partial(self._label, finished))
        self._use(finished)

    def _use(self, finished: int) -> None:
        for quality in self._qualities:
            quality.use_files(refreshed_files(self._cfg, finished))
        logger.info("Quality labels in use: those of the network after %d epochs", finished)

    def _label(self, finished: int) -> None:
        with evaluating(self._model):
            for name, file in zip(self._cfg.DATASETS.NAMES, refreshed_files(self._cfg, finished), strict=True):
                items = training_set(self._cfg, name, combineall=self._cfg.DATASETS.COMBINEALL)[1]
                extractor = f"the network in training after {finished} epochs"
                label_with(self._cfg, self._model, name, items, extractor=extractor).save(file)


def refreshed_files(cfg: Any, finished: int) -> list[Path]:
    """Where the labels made after ``finished`` epochs lie, one file per training set."""
    names = cfg.DATASETS.NAMES
    stem = f"labels_epoch_{finished:03d}"
    return [Path(cfg.OUTPUT_DIR) / (f"{stem}.npz" if len(names) == 1 else f"{stem}_{name}.npz") for name in names]


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """``model`` in eval mode; afterwards every module is in the mode it had, frozen ones included."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def install() -> Undo:
    """Add the hook to every ``DefaultTrainer`` whose model takes its image quality from label files."""
    from fastreid.engine.defaults import DefaultTrainer

    host_build = DefaultTrainer.build_hooks

    @functools.wraps(host_build)
    def build_hooks(self: Any) -> list[Any]:
        hooks = host_build(self)
        if not self.cfg.QUALITY.REFRESH_EPOCHS:
            return hooks  # type: ignore[no-any-return]
        model = self.model.module if isinstance(self.model, DistributedDataParallel) else self.model
        qualities = [module for module in model.modules() if isinstance(module, ImageQuality)]
        # In front of the host's hooks, so that the labels are there before the epoch's checkpoint is.
        return [RefreshHook(self.cfg, model, qualities), *hooks] if qualities else hooks

    return replace(DefaultTrainer, "build_hooks", build_hooks)
