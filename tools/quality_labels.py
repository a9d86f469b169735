#!/usr/bin/env python
"""Make quality labels of training images, or check a label file against them.

    python tools/quality_labels.py --config-file CONFIG --weights MODEL.pth --output FOLDER [KEY VALUE ...]
    python tools/quality_labels.py --config-file CONFIG --check FILE [FILE ...]

The first embeds the training images of CONFIG with the given checkpoint and writes SDD-FIQA labels, one file per data
set. The second prints how many training images a file covers, and how the labels are spread.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from qsd_plugin.core.errors import QSDPluginError
from qsd_plugin.core.files import check_writable


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--weights", metavar="FILE", help="checkpoint of the network that embeds the images")
    action.add_argument("--check", nargs="+", metavar="FILE", help="label files, in the order of DATASETS.NAMES")
    parser.add_argument("--output", metavar="FOLDER", default="labels")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    arguments = parser.parse_args()
    try:
        cfg = load_config(arguments.config_file, arguments.opts)
        if arguments.weights:
            make(cfg, Path(arguments.weights), Path(arguments.output))
        else:
            check(cfg, arguments.check)
    except QSDPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def load_config(config_file: str, opts: list[str]) -> Any:
    """The host's config with the network that evaluation uses."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from fastreid.config import get_cfg

    from qsd_plugin.hosts.fastreid.recipes import deployed_architecture

    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(opts)
    cfg.MODEL.META_ARCHITECTURE = deployed_architecture(cfg)
    return cfg


def make(cfg: Any, weights: Path, output: Path) -> None:
    """Write one label file per training set."""
    from qsd_plugin.hosts.fastreid.datasets import training_set
    from qsd_plugin.hosts.fastreid.recipes import make_labels

    check_writable(output)
    items = {name: training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1] for name in cfg.DATASETS.NAMES}
    make_labels(cfg, weights, items, output)
    check(cfg, [str(output / f"{name}.npz") for name in items])


def check(cfg: Any, files: list[str]) -> None:
    """Print coverage and spread of label files."""
    from qsd_plugin.hosts.fastreid.datasets import dataset_roots, training_set
    from qsd_plugin.quality.labels import QualityLabels

    rows = []
    for (name, root), file in zip(dataset_roots(cfg).items(), files, strict=True):
        labels = QualityLabels.load(file)
        paths = [path for path, _, _ in training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1]]
        coverage = labels.coverage(paths, root=root)
        low, median, high = np.percentile(labels.score, [5, 50, 95])
        rows.append((name, file, len(paths), f"{coverage:.2%}", f"{low:.1f} / {median:.1f} / {high:.1f}"))
    headers = ["data set", "file", "training images", "covered", "labels at 5 / 50 / 95 %"]
    print(tabulate(rows, headers=headers, tablefmt="simple"))


if __name__ == "__main__":
    main()
