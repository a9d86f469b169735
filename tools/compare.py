#!/usr/bin/env python
"""Compare the arms of an experiment: means, spread, paired differences with intervals, verdict.

    python tools/compare.py logs/qsd/real [--reference ARM] [--split SPLIT] [--json FILE] [--markdown FILE]

Prints the Markdown page and writes it as comparison.md, with comparison.json and comparison.png, to the folder; of one
split as comparison_SPLIT.md and so on. Test sets with levels of degradation add comparison_severity.png.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from qsd_plugin.core.errors import QSDPluginError
from qsd_plugin.core.files import write_atomically
from qsd_plugin.report.aggregate import summarise
from qsd_plugin.report.bootstrap import DRAWS
from qsd_plugin.report.comparison import as_markdown, means_over_levels, verdict
from qsd_plugin.report.curve_pictures import draw_over_severity
from qsd_plugin.report.experiment import BASELINE, chosen_arms, load_description, of_split
from qsd_plugin.report.forest import draw_differences


def main() -> None:
    """Entry point; the exit code is 2 for input that cannot be used."""
    arguments = parse_arguments()
    try:
        compare(arguments)
    except QSDPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, metavar="EXPERIMENT_DIR", help="output folder of tools/experiment.py")
    parser.add_argument("--reference", metavar="ARM", help="arm that differences are taken to (default: the file's)")
    parser.add_argument("--split", help="this split only, such as the one with known qualities (default: all)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: comparison.json in the folder")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="default: comparison.md in the folder")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="default: comparison.png in the folder")
    parser.add_argument("--draws", type=int, default=DRAWS, help="of the bootstrap (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default %(default)s)")
    return parser.parse_args()


def compare(arguments: argparse.Namespace) -> None:
    """Write and print the comparison."""
    experiment = load_description(arguments.folder)
    reference = arguments.reference or experiment.reference
    if reference != BASELINE:
        chosen_arms(experiment, [reference])
    if arguments.split:
        experiment = of_split(experiment, arguments.split)
    summary = summarise(experiment, reference=reference, draws=arguments.draws, seed=arguments.seed)
    summary["verdict"] = verdict(summary)
    text = as_markdown(summary)
    stem = f"comparison_{arguments.split}" if arguments.split else "comparison"
    write_atomically(arguments.json or arguments.folder / f"{stem}.json", json.dumps(summary, indent=1).encode())
    write_atomically(arguments.markdown or arguments.folder / f"{stem}.md", text.encode())
    draw_differences(summary, arguments.picture or arguments.folder / f"{stem}.png")
    panels = means_over_levels(summary)
    if panels:
        number = summary["primary"].rpartition("/")[2]
        draw_over_severity(panels, f"{number}, percent", arguments.folder / f"{stem}_severity.png")
    print(text)


if __name__ == "__main__":
    main()
