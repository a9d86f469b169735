"""Hooks: evaluation at the end only (S16) or not at all (S30), weight averaging (S17), very short trainings (S26)."""

from __future__ import annotations

import functools
import sys
from typing import Any, NoReturn

from qsd_plugin.core.errors import HostError
from qsd_plugin.hosts.fastreid.compat.patch import Patch, Undo, always, replace, together


def _evaluate_at_the_end_only() -> Undo:
    from fastreid.engine.hooks import EvalHook

    host_init = EvalHook.__init__

    @functools.wraps(host_init)
    def init(self: Any, eval_period: int, eval_function: Any) -> None:
        # A period no run reaches is the host's own way to evaluate once, after the last epoch.
        host_init(self, eval_period if eval_period > 0 else sys.maxsize, eval_function)

    return replace(EvalHook, "__init__", init)


def _refuse_weight_averaging() -> Undo:
    from fastreid.engine.hooks import SWA as SWAHook  # noqa: N811
    from fastreid.solver.optim import SWA as SWAOptimizer  # noqa: N811

    def refuse(self: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise HostError(
            "fast-reid's SWA (stochastic weight averaging) cannot work with torch >= 2: its hook assigns the trainer's "
            "read-only optimizer and its optimizer lacks what torch's optimizers must have",
            remedy="Average weights with torch.optim.swa_utils.AveragedModel in a hook of your own.",
        )

    return together(replace(SWAHook, "__init__", refuse), replace(SWAOptimizer, "__init__", refuse))


def _print_once_per_iteration() -> Undo:
    from fastreid.utils.events import CommonMetricPrinter, get_event_storage

    host_write = CommonMetricPrinter.write

    @functools.wraps(host_write)
    def write(self: Any) -> None:
        # The last iteration is written twice: after the step and after the epoch. While there is no timing yet, the
        # host divides by the number of iterations since the last line.
        if self._last_write is None or self._last_write[0] != get_event_storage().iter:
            host_write(self)

    return replace(CommonMetricPrinter, "write", write)


def _train_without_test_sets() -> Undo:
    from fastreid.engine.hooks import PeriodicCheckpointer

    host_before_train = PeriodicCheckpointer.before_train

    @functools.wraps(host_before_train)
    def before_train(self: Any) -> None:
        if self.trainer.cfg.DATASETS.TESTS:
            host_before_train(self)
        else:
            self.max_epoch = self.trainer.max_epoch
            self.metric_name = "metric"  # which nobody writes

    return replace(PeriodicCheckpointer, "before_train", before_train)


PATCHES: tuple[Patch, ...] = (
    Patch(
        row="S16",
        where="engine/hooks.py:382",
        symptom="TEST.EVAL_PERIOD 0 or less: ZeroDivisionError or AssertionError after the whole training.",
        action="TEST.EVAL_PERIOD 0 or less evaluates once, after the last epoch.",
        needed=always,
        apply=_evaluate_at_the_end_only,
        proof="test_s16_eval_period_zero_evaluates_once_at_the_end",
    ),
    Patch(
        row="S17",
        where="engine/hooks.py:515, solver/optim/swa.py",
        symptom="The SWA hook dies in mid-training (read-only property), the SWA optimizer at its first step.",
        action="Both are refused when built, with a sentence that names torch.optim.swa_utils.",
        needed=always,
        apply=_refuse_weight_averaging,
        proof="test_s17_swa_is_refused_with_the_remedy",
    ),
    Patch(
        row="S26",
        where="utils/events.py:220",
        symptom="A training, or the rest of a resumed one, of one or two iterations ends in ZeroDivisionError.",
        action="The progress line of an iteration is printed once.",
        needed=always,
        apply=_print_once_per_iteration,
        proof="test_s26_a_training_of_two_iterations_ends_well",
    ),
    Patch(
        row="S30",
        where="engine/hooks.py:204",
        symptom="Without a test set (DATASETS.TESTS ()) a training ends in IndexError before its first step.",
        action="It trains, saves its checkpoints and evaluates nothing.",
        needed=always,
        apply=_train_without_test_sets,
        proof="test_s30_without_test_sets_the_last_checkpoint_is_written",
    ),
)
