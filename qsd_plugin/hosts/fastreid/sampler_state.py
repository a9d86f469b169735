"""``--resume`` for the plugin's samplers: step i of a training sees batch i, however often it was interrupted.

The host starts its loader before it knows where a training begins, so a resumed training draws as a new one does. Its
own samplers stay like that: they draw from the global generators, which the augmentations use too, and cannot be put
anywhere else. Ours depend on (seed, step): the seed is stored in the checkpoint, the step is the trainer's.
"""

from __future__ import annotations

import functools
import logging
from typing import Any

from fastreid.engine.train_loop import HookBase

from qsd_plugin.data.samplers import StepSampler
from qsd_plugin.hosts.fastreid.compat.patch import Undo, replace
from qsd_plugin.hosts.fastreid.samplers import SAMPLERS, SEEDED

logger = logging.getLogger("fastreid.qsd_plugin.data")

#: Name of the sampler's state in a checkpoint.
KEY = "sampler"


class SamplerHook(HookBase):  # type: ignore[misc]
    """Lets a resumed training go on with the batches that the uninterrupted one would have seen.

    Args:
        sampler: The sampler of the trainer's loader, in the state in which the loader was started.
    """

    def __init__(self, sampler: StepSampler) -> None:
        self._sampler = sampler
        self._started = sampler.state_dict()

    def before_train(self) -> None:
        """Start the loader again if the training does not begin where the loader does."""
        self._sampler.step = self.trainer.start_iter
        if self._sampler.state_dict() == self._started:
            return
        logger.info("The training sampler goes on at step %d.", self._sampler.step)
        holder = _loop(self.trainer)
        if hasattr(holder.data_loader, "shutdown"):  # the host's CUDA loader: ends the thread that reads ahead
            holder.data_loader.shutdown()
        holder._data_loader_iter = iter(holder.data_loader)

    def after_step(self) -> None:
        """Keep the state that a checkpoint would store."""
        self._sampler.step = self.trainer.iter + 1


def sampler_of(loader: Any) -> StepSampler | None:
    """The plugin's sampler behind a train loader, ``None`` if it has another one."""
    sampler = getattr(getattr(loader, "batch_sampler", None), "sampler", None)
    while sampler is not None and not isinstance(sampler, StepSampler):
        sampler = getattr(sampler, "sampler", None)
    return sampler


def install() -> Undo:
    """Add the hook and the state to every ``DefaultTrainer`` whose loader has one of the plugin's samplers."""
    from fastreid.engine.defaults import DefaultTrainer

    host_build = DefaultTrainer.build_hooks

    @functools.wraps(host_build)
    def build_hooks(self: Any) -> list[Any]:
        hooks = _without_plugin_sampler(host_build, self)
        sampler = sampler_of(getattr(_loop(self), "data_loader", None))
        if sampler is None:
            return hooks
        self.checkpointer.checkpointables[KEY] = sampler
        return [*hooks, SamplerHook(sampler)]

    return replace(DefaultTrainer, "build_hooks", build_hooks)


def _without_plugin_sampler(host_build: Any, trainer: Any) -> list[Any]:
    """The host's hooks, with plain identity sampling for the loader of precise BN.

    Its data set may be another one than those trained on, for which there are neither labels nor weights. Drawing all
    images in random order needs neither.
    """
    own = trainer.cfg
    name = own.DATALOADER.SAMPLER_TRAIN
    if own.TEST.PRECISE_BN.ENABLED and name in SAMPLERS and name != SEEDED:
        trainer.cfg = own.clone()
        trainer.cfg.defrost()
        trainer.cfg.DATALOADER.SAMPLER_TRAIN = "NaiveIdentitySampler"
        trainer.cfg.freeze()
        logger.info("Precise BN draws its batches with NaiveIdentitySampler.")
    try:
        hooks: list[Any] = host_build(trainer)
    finally:
        trainer.cfg = own
    return hooks


def _loop(trainer: Any) -> Any:
    """What holds the loader: the host's inner trainer, or a trainer with a loop of its own."""
    return getattr(trainer, "_trainer", trainer)
