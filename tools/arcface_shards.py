#!/usr/bin/env python
"""Turn the checkpoints of an arcface_torch run into those of another number of processes (GPUs).

    python tools/arcface_shards.py work_dirs/my_run --processes 4 --output work_dirs/my_run_4

Then set ``config.output`` to the new folder and ``config.resume = True``. Divide ``config.batch_size`` accordingly: the
schedule counts steps, and the checkpoint brings their number along.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from qsd_plugin.core.errors import QSDPluginError
from qsd_plugin.hosts.insightface.shards import read_shards, reshard, write_shards


def main(arguments: list[str] | None = None) -> None:
    """Entry point; plugin errors end the process with one paragraph and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, metavar="RUN", help="the run's output folder")
    parser.add_argument("--processes", type=int, required=True, metavar="N", help="number to resume with")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder for the new checkpoints")
    options = parser.parse_args(arguments)
    try:
        shards = read_shards(options.run)
        write_shards(reshard(shards, options.processes), options.output)
        print(f"{len(shards)} -> {options.processes} checkpoints, step {shards[0]['global_step']}: {options.output}")
    except QSDPluginError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
