#!/usr/bin/env python
"""Train with an arcface_torch checkout's own train_v2.py, unchanged, and the plugin's methods.

    python tools/train_arcface.py --host-root insightface configs/ms1mv3_r50 [--nproc 2]
    torchrun --nproc_per_node=8 tools/train_arcface.py --host-root insightface my_run.py

CONFIG is a config of the checkout, or a Python file of your own with ``config = edict()`` and, for the methods,
``config.qsd_plugin = dict(methods=["QSD"], ...)``: see projects/InsightFace/README.md. Without a GPU it uses the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from qsd_plugin.core.errors import ConfigError, QSDPluginError
from qsd_plugin.hosts.insightface.checkout import find_checkout
from qsd_plugin.hosts.insightface.launcher import run_processes, train


def main(arguments: list[str] | None = None) -> None:
    """Entry point; plugin errors end the process with one paragraph and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", metavar="CONFIG", help="configs/NAME of the checkout, or a Python file")
    parser.add_argument("--host-root", type=Path, required=True, metavar="DIR", help="the arcface_torch checkout")
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help="processes on this machine (default: 1)")
    options = parser.parse_args(arguments)
    try:
        find_checkout(options.host_root)
        if options.nproc < 1:
            raise ConfigError("--nproc", value=options.nproc, expected="at least 1")
        if options.nproc > 1 and "RANK" not in os.environ:
            command = [str(Path(__file__).resolve()), "--host-root", str(options.host_root), options.config]
            sys.exit(run_processes(command, options.nproc))
        train(options.host_root, options.config)
    except QSDPluginError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
