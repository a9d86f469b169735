"""What a resumed training forgets: how long layers have been frozen (S27), and the Distiller's moving average (S28)."""

from __future__ import annotations

import functools
import logging
from typing import Any

from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together

_logger = logging.getLogger("fastreid.qsd_plugin")

FROZEN_STEPS = "frozen_steps"  # in the first parameter group, because checkpoints keep those
EMA_TEACHER = "ema_teacher"  # entry of a checkpoint


def _remember_frozen_steps() -> Undo:
    import fastreid.solver.build as host

    def class_with_freeze_layer(optimizer: type, *, freeze_iters: int = 0) -> type:
        def step(self: Any, closure: Any = None) -> Any:
            first = self.param_groups[0]
            done = first.get(FROZEN_STEPS, 0)
            if done >= freeze_iters:
                return optimizer.step(self, closure)  # type: ignore[attr-defined]
            first[FROZEN_STEPS] = done + 1
            frozen = [group["params"] for group in self.param_groups if group["freeze_status"] == "freeze"]
            gradients = [(parameter, parameter.grad) for parameters in frozen for parameter in parameters]
            for parameter, _ in gradients:
                parameter.grad = None
            try:
                return optimizer.step(self, closure)  # type: ignore[attr-defined]
            finally:
                for parameter, gradient in gradients:  # the flat buffers that zero_grad() fills
                    parameter.grad = gradient

        return type(f"{optimizer.__name__}WithFreezeLayer", (optimizer,), {"step": step})

    return replace(host, "_generate_optimizer_class_with_freeze_layer", class_with_freeze_layer)


def _keep_the_moving_average() -> Undo:
    from fastreid.modeling.meta_arch.distiller import Distiller
    from fastreid.utils.checkpoint import Checkpointer

    host_init, host_load_model = Checkpointer.__init__, Checkpointer._load_model

    @functools.wraps(host_init)
    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        host_init(self, *args, **kwargs)
        # Without classes the model was built for an evaluation, and the teacher with it.
        if isinstance(self.model, Distiller) and self.model.ema_enabled and len(self.model.heads.weight):
            self.checkpointables[EMA_TEACHER] = self.model.model_ts[0]

    @functools.wraps(host_load_model)
    def load_model(self: Any, checkpoint: dict[str, Any]) -> Any:
        incompatible = host_load_model(self, checkpoint)
        if EMA_TEACHER in self.checkpointables and EMA_TEACHER not in checkpoint:
            _logger.warning("The checkpoint holds no moving-average teacher: it starts as a copy of the student.")
            self.checkpointables[EMA_TEACHER].load_state_dict(self.model.state_dict(), strict=False)
        return incompatible

    return together(replace(Checkpointer, "__init__", init), replace(Checkpointer, "_load_model", load_model))


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S27",
        where="solver/build.py:127",
        symptom="After --resume the optimizer freezes MODEL.FREEZE_LAYERS for another SOLVER.FREEZE_ITERS steps, while "
        "batch norm and log say that they train.",
        action="The optimizer counts frozen steps in its state, which checkpoints keep.",
        needed=always,
        apply=_remember_frozen_steps,
        proof="test_s27_frozen_steps_survive_a_resume",
    ),
    Patch(
        row="S28",
        where="modeling/meta_arch/distiller.py:75",
        symptom="After --resume the Distiller's moving-average teacher (KD.EMA) is a fresh random network.",
        action="Checkpoints keep it beside the model, under ema_teacher; a file without it starts it from the student.",
        needed=always,
        apply=_keep_the_moving_average,
        proof="test_s28_moving_average_teacher_survives_a_resume",
    ),
)
