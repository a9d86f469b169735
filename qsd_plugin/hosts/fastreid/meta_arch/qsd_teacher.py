"""``QSD.EMA``: the network that teaches is an exponential moving average of the one that learns."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qsd_plugin.networks.taps import TapRecorder

logger = logging.getLogger("fastreid.qsd_plugin.qsd")

#: Name of the submodule; the rest of its state-dict keys is the base architecture's.
PREFIX = "qsd_teacher."


class TeacherMixin(nn.Module):
    """Put in front of a host architecture: a network that is only looked at, always in eval mode, without losses."""

    def train(self, mode: bool = True) -> TeacherMixin:
        """Stays in eval mode, whatever ``mode``."""
        return super().train(False)

    def losses(self, *outputs: Any) -> dict[str, torch.Tensor]:
        """None."""
        return {}


class EMATeacher:
    """What the moving average has to say about a batch.

    Args:
        network: From :func:`build_teacher`; registered by the model that owns it.
        names: Of the taps.
    """

    def __init__(self, network: nn.Module, names: Sequence[str]) -> None:
        self._network = network
        self._recorder = TapRecorder(network, names)
        # An architecture goes through its losses, and a head returns the dict that ":key" selects from, in training
        # only. Their own flags do not change what they compute; those of normalisation and dropout stay off.
        paths = {name.partition(":")[0] for name in names if ":" in name}
        self._switched = [network, *(network.get_submodule(path) for path in sorted(paths))]

    @torch.no_grad()
    def __call__(self, batch: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Outputs of the tapped modules by name, without graph."""
        for module in self._switched:
            module.training = True
        try:
            with self._recorder as outputs:
                self._network(batch)
        finally:
            for module in self._switched:
                module.training = False
        return outputs


def build_teacher(
    cfg: Any, student: nn.Module, *, method: str = "QSD", mixin: type[nn.Module] = TeacherMixin
) -> nn.Module:
    """A copy of the student's network, without the mix-ins and losses around it.

    Its state-dict keys are the base architecture's. No parameter requires a gradient, so that neither the optimizer nor
    data-parallel training knows of them; it follows the student by :func:`~qsd_plugin.networks.ema_update`.

    Args:
        cfg: The host's config.
        student: The built model.
        method: Composed architecture of the student.
        mixin: Put in front of the network.
    """
    from fastreid.modeling.meta_arch import Baseline, Distiller
    from fastreid.modeling.meta_arch.build import META_ARCH_REGISTRY
    from fastreid.modeling.meta_arch.moco import MoCo

    network = META_ARCH_REGISTRY.get(method).network_class(cfg)
    if network in (Distiller, MoCo):
        network = Baseline  # they add losses, teachers and queues to it, of which no second set is needed
    own = cfg.clone()
    own.defrost()
    own.MODEL.BACKBONE.PRETRAIN = False
    own.MODEL.LOSSES.NAME = ("CrossEntropyLoss",)  # no class centres
    teacher_class = type(f"Averaged{network.__name__}", (mixin, network), {"__module__": __name__})
    with torch.random.fork_rng(devices=[]):  # its initial values are not used
        teacher: nn.Module = teacher_class(own)
    copy_from_student(teacher, student, list(teacher.state_dict()))
    return teacher.requires_grad_(False).train()


@torch.no_grad()
def copy_from_student(teacher: nn.Module, student: nn.Module, names: Sequence[str]) -> None:
    """Set some parameters and buffers of the teacher to the student's of the same name."""
    target, source = teacher.state_dict(), student.state_dict()
    for name in names:
        target[name].copy_(source[name])


def fill_missing_teacher(
    student: nn.Module, incompatible: Any, *, prefix: str = PREFIX, what: str = "the EMA teacher (QSD.EMA)"
) -> None:
    """After a checkpoint was loaded: what it lacks of the teacher is copied from the student, with one warning.

    A hook for ``register_load_state_dict_post_hook``; a checkpoint of the base architecture has no teacher at all.
    """
    missing = [name for name in incompatible.missing_keys if name.startswith(prefix)]
    if not missing:
        return
    names = [name.removeprefix(prefix) for name in missing]
    teacher = student.get_submodule(prefix.removesuffix("."))
    # Batch norm does not report a missing counter; counters follow the student at every step anyway.
    names += [name for name in teacher.state_dict() if name.endswith(".num_batches_tracked")]
    copy_from_student(teacher, student, names)
    incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in set(missing)]
    logger.warning(
        "The checkpoint lacks %d tensors of %s: they start as copies of the student's.",
        len(missing),
        what,
    )
