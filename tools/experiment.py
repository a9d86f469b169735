#!/usr/bin/env python
"""Run an experiment: arms x seeds x splits of one recipe or several; arms of a seed share what they have in common.

    python tools/experiment.py projects/QSD/experiments/real.yml --jobs 2 DATA.LIST /data/images.csv

What has finished is skipped, what was cut off is resumed. Tables are made by tools/compare.py.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys

from tabulate import tabulate

from qsd_plugin.core.errors import ConfigError, QSDPluginError
from qsd_plugin.report.experiment import RESERVED, chosen_arms, read_experiment


def main() -> None:
    """Entry point; the exit code is 1 when a stage failed, 2 for input that cannot be used."""
    arguments = parse_arguments()
    try:
        sys.exit(run(arguments))
    except QSDPluginError as error:
        print(f"\n{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("experiment", metavar="EXPERIMENT.yml")
    parser.add_argument("--jobs", type=int, default=1, help="(split, seed) blocks at the same time (default 1)")
    parser.add_argument("--only", action="append", default=[], metavar="ARM", help="this arm only; may be repeated")
    parser.add_argument("--list", action="store_true", help="print what has finished and stop")
    parser.add_argument(
        "--from-stage",
        metavar="NAME",
        help="run this stage again, and what is made from it: an arm, or a shared one as --list names it",
    )
    parser.add_argument("--accept-stale", action="store_true", help="keep finished stages with other settings")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config values of all arms; OUTPUT_DIR: the results"
    )
    return parser.parse_intermixed_args()  # options may come before and after the KEY VALUE pairs


def run(arguments: argparse.Namespace) -> int:
    """List or run what the command line asks for; the number of failed stages, at most 1."""
    experiment = read_experiment(arguments.experiment)
    arms = chosen_arms(experiment, arguments.only)
    options = list(arguments.opts)
    if len(options) % 2:
        raise ConfigError("Options at the end of the command line", value=options, expected="pairs KEY VALUE")
    if "OUTPUT_DIR" in options[::2]:
        place = 2 * options[::2].index("OUTPUT_DIR")
        experiment = dataclasses.replace(experiment, output=options[place + 1])
        del options[place : place + 2]

    from qsd_plugin.hosts.fastreid import experiments

    plan = experiments.Plan(experiment, arms, options, redo=arguments.from_stage, accept_stale=arguments.accept_stale)
    if arguments.from_stage is not None and arguments.from_stage not in (*RESERVED, *plan.stages):
        chosen_arms(experiment, [arguments.from_stage])
    if arguments.list:
        print(tabulate(experiments.listing(plan), headers=["split", "seed", *plan.stages], tablefmt="simple"))
        return 0
    failures = experiments.run(plan, jobs=arguments.jobs, announce=lambda line: print(line, flush=True))
    for event in failures:
        print(f"Failed: {event.split} seed {event.seed} {event.stage}: {event.error}", file=sys.stderr)
    print(f"Tables: python tools/compare.py {experiment.output}")
    return 1 if failures else 0


if __name__ == "__main__":
    main()
