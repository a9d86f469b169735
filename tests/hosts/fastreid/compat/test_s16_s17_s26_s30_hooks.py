"""S16, S17, S26, S30: evaluation at the end or not at all; weight averaging refused; very short trainings."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

import qsd_plugin.hosts.fastreid  # noqa: F401  (activates)
from qsd_plugin.core.errors import HostError


def evaluations(period: int, epochs: int) -> list[int]:
    """Epochs after which the host's hook evaluates."""
    from fastreid.engine.hooks import EvalHook

    done: list[int] = []
    trainer = SimpleNamespace(epoch=0, max_epoch=epochs, storage=SimpleNamespace(put_scalars=lambda **scalars: None))

    def evaluate() -> dict[str, Any]:
        done.append(trainer.epoch + 1)
        return {"metric": 1.0}

    hook = EvalHook(period, evaluate)
    hook.trainer = trainer
    for trainer.epoch in range(epochs):
        hook.after_epoch()
    hook.after_train()
    return done


@pytest.mark.parametrize("period", [0, -1])
def test_s16_eval_period_zero_evaluates_once_at_the_end(period: int) -> None:
    assert evaluations(period, epochs=5) == [5]


def test_s16_other_periods_are_the_hosts() -> None:
    assert evaluations(2, epochs=5) == [2, 4, 5]
    assert evaluations(5, epochs=5) == [5]


def test_s17_swa_is_refused_with_the_remedy() -> None:
    import torch
    from fastreid.engine.hooks import SWA as Hook  # noqa: N811
    from fastreid.solver.optim import SWA as Optimizer  # noqa: N811

    with pytest.raises(HostError, match=r"SWA.*cannot work.*torch\.optim\.swa_utils"):
        Hook(swa_start=1, swa_freq=1, swa_lr_factor=1.0, eta_min=0.0)
    with pytest.raises(HostError, match=r"SWA.*cannot work.*torch\.optim\.swa_utils"):
        Optimizer(torch.optim.SGD([torch.zeros(1)], lr=0.1), 1, 1.0)


def test_s26_a_training_of_two_iterations_ends_well() -> None:
    from fastreid.utils.events import CommonMetricPrinter, EventStorage

    printer = CommonMetricPrinter(max_iter=2)
    lines: list[str] = []
    printer.logger = SimpleNamespace(info=lines.append)
    with EventStorage(0) as storage:
        storage.epoch = 0
        for storage.iter in (0, 1, 1):  # the last one after the step and after the epoch
            storage.put_scalar("total_loss", 1.5)
            printer.write()
    assert [line.split("epoch/iter: ")[1][:3] for line in lines] == ["0/0", "0/1"]


@pytest.mark.parametrize(
    ("tests", "best"), [((), []), (("One",), ["model_best"]), (("One", "Two"), ["model_best"])], ids=len
)
def test_s30_without_test_sets_the_last_checkpoint_is_written(tests: tuple[str, ...], best: list[str]) -> None:
    from fastreid.engine.hooks import PeriodicCheckpointer
    from fastreid.utils.events import EventStorage

    saved: list[str] = []
    hook = PeriodicCheckpointer(SimpleNamespace(save=lambda name, **state: saved.append(name)), 1)
    hook.trainer = SimpleNamespace(cfg=SimpleNamespace(DATASETS=SimpleNamespace(TESTS=tests)), epoch=1, max_epoch=2)
    with EventStorage(0) as storage:
        if tests:
            storage.put_scalar("metric" if len(tests) == 1 else "One/metric", 50.0)
        hook.before_train()
        hook.after_epoch()
    assert saved == [*best, "model_final"]
