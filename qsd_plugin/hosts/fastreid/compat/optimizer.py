"""Training that trains: the host's flat gradient buffers must survive ``zero_grad()`` (S01), and a run-time check that
parameters really move (S01-CHECK)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from qsd_plugin.hosts.fastreid.compat.learning_check import LearningCheck
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together


def _zero_grad_drops_gradients() -> bool:
    """Whether ``zero_grad()`` sets ``.grad`` to ``None`` unless told otherwise (torch's default since 2.0)."""
    import torch

    parameter = torch.zeros(1, requires_grad=True)
    parameter.grad = torch.ones(1)
    torch.optim.SGD([parameter], lr=0.1).zero_grad()
    return parameter.grad is None


def _repair_build_optimizer() -> Undo:
    import fastreid.engine.defaults
    import fastreid.solver
    import fastreid.solver.build
    from fastreid.utils.params import ContiguousParams

    host_build = fastreid.solver.build.build_optimizer

    @functools.wraps(host_build)
    def build_optimizer(*args: Any, **kwargs: Any) -> tuple[Any, Any]:
        optimizer, parameters = host_build(*args, **kwargs)
        if isinstance(parameters, ContiguousParams):
            _keep_gradients(optimizer)
        return optimizer, parameters

    owners = (fastreid.solver.build, fastreid.solver, fastreid.engine.defaults)
    return together(*(replace(owner, "build_optimizer", build_optimizer) for owner in owners))


def _keep_gradients(optimizer: Any) -> None:
    """Make this optimizer's ``zero_grad()`` fill gradients with zeros instead of dropping them.

    The host gives the optimizer flat buffers whose ``.grad`` is a flat buffer too; the modules' own gradients are views
    of it. Once the flat ``.grad`` is ``None``, ``backward()`` still fills the views, but ``step()`` finds nothing.
    """
    zero_grad: Callable[..., None] = optimizer.zero_grad

    def zero_grad_in_place(set_to_none: bool = False) -> None:
        zero_grad(set_to_none=set_to_none)

    optimizer.zero_grad = zero_grad_in_place


def _watch_trainers() -> Undo:
    from fastreid.engine.train_loop import AMPTrainer, SimpleTrainer

    return together(
        *(replace(trainer, "run_step", _watched(trainer.run_step)) for trainer in (SimpleTrainer, AMPTrainer))
    )


def _watched(run_step: Callable[[Any], None]) -> Callable[[Any], None]:
    @functools.wraps(run_step)
    def watched(trainer: Any) -> None:
        if not hasattr(trainer, "_learning_check"):
            trainer._learning_check = LearningCheck(trainer.optimizer)
        check: LearningCheck | None = trainer._learning_check
        if check is None:
            run_step(trainer)
        elif check.run(functools.partial(run_step, trainer), getattr(trainer, "grad_scaler", None)):
            trainer._learning_check = None

    return watched


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S01",
        where="engine/train_loop.py:248,346 with utils/params.py",
        symptom="No parameter is ever updated (torch >= 2.0), silently. With AMP: 'No inf checks were recorded'.",
        action="zero_grad() of the built optimizer fills the flat gradient buffers with zeros and keeps them.",
        needed=_zero_grad_drops_gradients,
        apply=_repair_build_optimizer,
        proof="test_s01_every_trainable_module_changes_in_one_epoch",
    ),
    Patch(
        row="S01-CHECK",
        where="engine/train_loop.py:226,334",
        symptom="A training that learns nothing looks like any other: losses are logged, checkpoints are written.",
        action="After the second update the trainer checks once that gradients arrived and parameters moved, or stops.",
        needed=always,
        apply=_watch_trainers,
        proof="test_s01_check_stops_a_training_that_learns_nothing",
    ),
)
