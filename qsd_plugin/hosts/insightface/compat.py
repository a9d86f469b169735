"""What an unmodified arcface_torch needs to run on current stacks, and without a GPU: one named shim per failure.

Every shim has a probe that looks at this environment (never at a version), changes names in the host's own modules
where that is enough, and can be undone. Nothing is applied on import. What had to be put into torch itself, because the
trainer's script takes it from there, is applied only where there is no CUDA device, where it could not work anyway; and
for the script's checkpoints, whose files alone are treated in another way.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from scipy import interpolate

from qsd_plugin.core.errors import ConfigError
from qsd_plugin.data.verification_bin import load_bin
from qsd_plugin.evaluation.verification import threshold_at
from qsd_plugin.hosts.insightface import checkpoints, mxnet_standin
from qsd_plugin.hosts.insightface.checkout import host_module
from qsd_plugin.hosts.insightface.shims import Shim, Undo, replace, together
from qsd_plugin.hosts.insightface.shims_cpu import CPU_SHIMS


def apply_shims(phase: Literal["import", "run"], announce: Callable[[str], None]) -> Undo:
    """Apply what is needed of a phase, tell which and why, and return the function that undoes it."""
    undos: list[Undo] = []
    for shim in SHIMS:
        if shim.phase == phase and shim.needed():
            undos.append(shim.apply())
            announce(f"shim {shim.name} for {shim.where}: {shim.symptom}")
    return together(undos)


def _always() -> bool:
    return True


# --- mxnet ---------------------------------------------------------------------------------------------------------


def _mxnet_missing() -> bool:
    if "mxnet" in sys.modules:
        return False
    if importlib.util.find_spec("mxnet") is None:
        return True
    try:
        importlib.import_module("mxnet")
    except Exception:  # an mxnet that is there dies on current NumPy in many ways
        for name in [name for name in sys.modules if name.partition(".")[0] == "mxnet"]:
            del sys.modules[name]
        return True
    return False


def _stand_in_for_mxnet() -> Undo:
    standin = mxnet_standin.modules()
    sys.modules.update(standin)

    def undo() -> None:
        for name in standin:
            sys.modules.pop(name, None)

    return undo


# --- learning-rate schedule ----------------------------------------------------------------------------------------


def _schedule_takes_no_verbose() -> bool:
    return "verbose" not in inspect.signature(torch.optim.lr_scheduler.LRScheduler.__init__).parameters


def _tolerate_verbose() -> Undo:
    host = host_module("lr_scheduler").PolynomialLRWarmup

    class Tolerant(torch.optim.lr_scheduler.LRScheduler):
        """torch's schedule with the argument that it used to have."""

        def __init__(self, optimizer: torch.optim.Optimizer, last_epoch: int = -1, verbose: object = False) -> None:
            super().__init__(optimizer, last_epoch)

    before = host.__bases__
    host.__bases__ = tuple(
        Tolerant if issubclass(base, torch.optim.lr_scheduler.LRScheduler) else base for base in before
    )

    def undo() -> None:
        host.__bases__ = before

    return undo


# --- verification --------------------------------------------------------------------------------------------------


def _interpolation_refuses_duplicates() -> bool:
    try:
        interpolate.interp1d([0.0, 0.0, 1.0], [0.0, 1.0, 2.0], kind="slinear")(0.5)
    except ValueError:
        return True
    return False


class _OldInterpolation:
    """``scipy.interpolate`` as far as the host uses it, with the rule that SciPy had up to 1.8."""

    @staticmethod
    def interp1d(far: Any, thresholds: Any, kind: str = "slinear") -> Callable[[float], float]:
        """The threshold at a false acceptance rate, see :func:`~qsd_plugin.evaluation.verification.threshold_at`."""
        if kind != "slinear":
            raise ConfigError("interp1d of arcface_torch's verification: kind", value=kind, expected="'slinear'")
        return lambda target: threshold_at(np.asarray(far), np.asarray(thresholds), target)


def _interpolate_as_before() -> Undo:
    return replace(host_module("eval.verification"), interpolate=_OldInterpolation)


class _PlainPickle:
    """``pickle`` as far as the host's verification uses it for reading: nothing in the file is run."""

    HIGHEST_PROTOCOL = 4

    @staticmethod
    def load(file: Any, **_: object) -> Any:
        """Images and booleans of a ``.bin`` file of Python 2 or 3; each fold must have both kinds of pairs."""
        return load_bin(file.name)


def _read_bins_plainly() -> Undo:
    return replace(host_module("eval.verification"), pickle=_PlainPickle)


# --- loader --------------------------------------------------------------------------------------------------------


def _pass_on_loader_errors() -> Undo:
    """The thread that prefetches dies with the error, and the trainer waits for its next batch for ever."""
    host = host_module("dataset").BackgroundGenerator
    run, take = host.run, host.next

    def guarded_run(self: Any) -> None:
        try:
            run(self)
        except BaseException as error:
            self.qsd_error = error
            self.queue.put(None)

    def checked_next(self: Any) -> Any:
        try:
            return take(self)
        except StopIteration:
            if getattr(self, "qsd_error", None) is not None:
                raise self.qsd_error from None
            raise

    return replace(host, run=guarded_run, next=checked_next)


# --- checkpoints ---------------------------------------------------------------------------------------------------


def _save_completely() -> Undo:
    return replace(torch, save=checkpoints.saver(torch.save), load=checkpoints.loader(torch.load))


SHIMS: tuple[Shim, ...] = (
    Shim(
        "mxnet",
        "dataset.py and eval/verification.py, import mxnet",
        "mxnet cannot be imported; records and verification sets are read by the plugin",
        _mxnet_missing,
        _stand_in_for_mxnet,
        "import",
    ),
    Shim(
        "schedule",
        "lr_scheduler.py, verbose",
        "TypeError: torch's schedules take no such argument any more",
        _schedule_takes_no_verbose,
        _tolerate_verbose,
    ),
    Shim(
        "interpolation",
        "eval/verification.py, interp1d",
        "ValueError at the first verification: duplicates in x",
        _interpolation_refuses_duplicates,
        _interpolate_as_before,
    ),
    Shim(
        "bins",
        "eval/verification.py, pickle.load",
        "a verification set may run code, and one-sided folds end in ZeroDivisionError",
        _always,
        _read_bins_plainly,
    ),
    Shim(
        "loader errors",
        "dataset.py, BackgroundGenerator",
        "a damaged record makes the trainer wait for ever",
        _always,
        _pass_on_loader_errors,
    ),
    Shim(
        "checkpoints",
        "train_v2.py, torch.save and torch.load",
        "a kill while it saves leaves half a file, or processes of different epochs that resume without a word",
        _always,
        _save_completely,
    ),
    *CPU_SHIMS,
)
