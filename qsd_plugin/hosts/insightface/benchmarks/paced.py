"""A training that waits after each step until it is told to go on; a process of :mod:`.steps`.

    python -m qsd_plugin.hosts.insightface.benchmarks.paced plain|plugin ROOT CONFIG

Standard input says when to go on, one line per step; a descriptor that the config hands to :func:`install` says that a
step is done.
"""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path
from typing import Any

from qsd_plugin.hosts.insightface import checkout, compat, launcher
from qsd_plugin.hosts.insightface.shims_cpu import no_cuda
from qsd_plugin.report.benchmarks.paired import freed_memory_kept

#: Besides those for machines without a GPU: without these the script does not get to its first step.
_NEEDED = ("mxnet", "schedule")


def run_script(root: Path, config: Path) -> None:
    """The checkout's script by itself, with what it cannot do without on this machine.

    Args:
        root: The trainer's folder.
        config: A Python file.
    """
    with checkout.on_path(root):
        for shim in compat.SHIMS:
            if (shim.name in _NEEDED or shim.needed is no_cuda) and shim.needed():
                shim.apply()
        checkout.host_module("configs").__path__.append(str(config.parent))
        sys.argv = [checkout.SCRIPT, f"configs/{config.stem}"]
        runpy.run_path(str(root / checkout.SCRIPT), run_name="__main__")


def install(announce: int) -> None:
    """For the config file: let the schedule's step, with which a step of the trainer ends, wait.

    Args:
        announce: Descriptor to which a line is written when a step is done.
    """
    schedule: Any = checkout.host_module("lr_scheduler").PolynomialLRWarmup
    step = schedule.step
    built: list[object] = []

    def paced(self: Any, *args: Any, **kwargs: Any) -> None:
        step(self, *args, **kwargs)
        if self not in built:  # torch takes the first step itself, when the schedule is built
            built.append(self)
            return
        os.write(announce, b"done\n")
        if not sys.stdin.readline():
            os._exit(0)  # nobody is left to go on for

    schedule.step = paced


def main() -> None:
    """Entry point."""
    side, root, config = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    with freed_memory_kept():
        if side == "plugin":
            launcher.train(root, str(config))
        else:
            run_script(root, config)


if __name__ == "__main__":
    main()
