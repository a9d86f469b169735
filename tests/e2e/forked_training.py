"""Runs tools/train_net.py again and again, each time in a new process forked off one that has imported the host.

A line of JSON on standard input is a training, the line that answers it is how its process ended: an exit code, or
minus the number of the signal. Keys: ``arguments`` of the command line; ``log``, the file for its output; ``losses``,
a file to which every step appends its architecture, its number and its total loss in hexadecimal, behind the backward
pass; ``kill_at``, a step that ends there by SIGKILL, ``kill_in``, the architecture of that training if there are
several, or ``bank`` for that number of batches of DIL's codes; ``forget``, a buffer that checkpoints are not to hold,
as ``FeatureQueue.features``.
"""

from __future__ import annotations

import itertools
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import Any

from qsd_plugin.hosts import fastreid as host
from qsd_plugin.hosts.fastreid import recipes_dil
from qsd_plugin.methods.dil.adam import FlatAdam
from qsd_plugin.methods.qud import FeatureQueue

SCRIPT = str(Path(__file__).parents[2] / "tools" / "train_net.py")


def watch_steps(losses: str, kill_at: int | None, kill_in: str | None) -> None:
    """Write the losses down, and end the process in the step ``kill_at`` before its weights are updated."""
    from fastreid.engine.train_loop import SimpleTrainer
    from fastreid.utils.events import get_event_storage

    host_write = SimpleTrainer._write_metrics

    def write_metrics(self: Any, loss_dict: dict[str, Any], data_time: float) -> None:
        step, architecture = get_event_storage().iter, type(self.model).__name__
        if step == kill_at and kill_in in (None, architecture):
            os.kill(os.getpid(), signal.SIGKILL)
        total = sum(loss_dict.values())
        with open(losses, "a") as file:
            file.write(f"{architecture} {step} {total.item().hex()}\n")
        host_write(self, loss_dict, data_time)

    SimpleTrainer._write_metrics = write_metrics


def watch_bank(kill_at: int) -> None:
    """End the process behind ``kill_at`` batches of codes."""
    made, calls = recipes_dil.flip_averaged_codes, itertools.count(1)

    def flip_averaged_codes(*args: Any) -> Any:
        if next(calls) > kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return made(*args)

    recipes_dil.flip_averaged_codes = flip_averaged_codes


def forget_buffer(name: str) -> None:
    """Leave a buffer of a module, as ``FeatureQueue.features``, out of every state dict."""
    owner, buffer = name.split(".")
    module: Any = {"FeatureQueue": FeatureQueue, "FlatAdam": FlatAdam}[owner]
    init = module.__init__

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self._non_persistent_buffers_set.add(buffer)

    module.__init__ = forgetful


def train(job: dict[str, Any]) -> None:
    """What the forked process does."""
    output = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for descriptor in (1, 2):  # nothing of a killed training, such as its loader's workers, keeps the pipes open
        os.dup2(output, descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    watch_steps(job["losses"], job.get("kill_at"), job.get("kill_in"))
    if job.get("kill_in") == "bank":
        watch_bank(job["kill_at"])
    if job.get("forget"):
        forget_buffer(job["forget"])
    sys.argv = [SCRIPT, *job["arguments"]]
    runpy.run_path(SCRIPT, run_name="__main__")


def main() -> None:
    """Entry point."""
    host.activate()
    import fastreid.engine  # noqa: F401  what takes long is done once

    for line in sys.stdin:
        child = os.fork()
        if not child:
            train(json.loads(line))
            return
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
