"""Settings with which the host's MoCo and Distiller fail in the first step, refused when they are built (S29)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together


def _refuse_impossible_settings() -> Undo:
    from fastreid.modeling.meta_arch import Distiller, MoCo

    def checked(owner: Any, before: Callable[[Any], None], after: Callable[[Any, Any], None] | None = None) -> Undo:
        host_init = owner.__init__

        @functools.wraps(host_init)
        def init(self: Any, cfg: Any) -> None:
            before(cfg)
            host_init(self, cfg)
            if after is not None:
                after(self, cfg)

        return replace(owner, "__init__", init)

    return together(checked(MoCo, check_queue), checked(Distiller, check_teachers, check_teacher_classes))


def check_queue(cfg: Any) -> None:
    """Refuse a memory bank that batches do not fill exactly.

    Raises:
        ConfigError: ``MODEL.QUEUE_SIZE`` is not a multiple of ``SOLVER.IMS_PER_BATCH``.
    """
    size, batch = cfg.MODEL.QUEUE_SIZE, cfg.SOLVER.IMS_PER_BATCH
    if size < batch or size % batch:
        raise ConfigError(
            "MODEL.QUEUE_SIZE", value=size, expected=f"a multiple of SOLVER.IMS_PER_BATCH {batch} with MoCo"
        )


def check_teachers(cfg: Any) -> None:
    """Refuse a Distiller without a teacher, or with configs and weights that do not go together.

    Raises:
        ConfigError: Names the key.
    """
    configs, weights = list(cfg.KD.MODEL_CONFIG), list(cfg.KD.MODEL_WEIGHTS)
    if not configs and not cfg.KD.EMA.ENABLED:
        raise ConfigError(
            "KD.MODEL_CONFIG",
            value=configs,
            expected="the config of at least one teacher with Distiller",
            remedy="Add its config.yaml here and its checkpoint to KD.MODEL_WEIGHTS, or set KD.EMA.ENABLED True.",
        )
    if len(configs) != len(weights):
        raise ConfigError("KD.MODEL_WEIGHTS", value=weights, expected=f"one checkpoint for each of {configs}")


def check_teacher_classes(model: Any, cfg: Any) -> None:
    """Refuse teachers of another training set, whose logits cannot be compared with the student's.

    Raises:
        ConfigError: A teacher has another number of identities. Models built for evaluation have none and pass.
    """
    classes = cfg.MODEL.HEADS.NUM_CLASSES
    for config, teacher in zip(cfg.KD.MODEL_CONFIG, model.model_ts[int(model.ema_enabled) :], strict=True):
        found = len(teacher.heads.weight)
        if classes and found != classes:
            raise ConfigError(
                f"MODEL.HEADS.NUM_CLASSES of the teacher {config}",
                value=found,
                expected=f"{classes}, the identities of the training set",
                remedy="The host's Distiller compares logits: train the teacher on the same identities.",
            )


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S29",
        where="modeling/meta_arch/moco.py:79, modeling/meta_arch/distiller.py:26-46,127",
        symptom="MoCo: AssertionError without words when the batch does not divide QUEUE_SIZE. Distiller: "
        "ZeroDivisionError without a teacher, IndexError or a shape error when teachers do not fit.",
        action="Refused when the model is built, with the key and what it must be.",
        needed=always,
        apply=_refuse_impossible_settings,
        proof="test_s29_settings_that_fail_in_the_first_step_are_refused",
    ),
)
