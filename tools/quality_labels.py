#!/usr/bin/env python
"""Make quality labels of training images, check label files, or compare them.

    python tools/quality_labels.py --config-file CONFIG --weights MODEL.pth --output FOLDER [KEY VALUE ...]
    python tools/quality_labels.py --config-file CONFIG --dil-stage1 STAGE1.pth --output FOLDER [KEY VALUE ...]
    python tools/quality_labels.py --config-file CONFIG --folds 5 --output FOLDER [KEY VALUE ...]
    python tools/quality_labels.py --onnx MODEL.onnx --output FOLDER DATASETS.NAMES "('Market1501',)"
    python tools/quality_labels.py --embeddings FILE.npz --output FOLDER [DATASETS.NAMES "('Market1501',)"]
    python tools/quality_labels.py --config-file CONFIG --check FILE [FILE ...]
    python tools/quality_labels.py --config-file CONFIG --compare FILE FILE [FILE ...] [--severity]

Making labels writes FOLDER/<data set>.npz, a report (check.json) and a histogram. --weights embeds the images with one
checkpoint. --folds trains one network per part of the identities on all others (as RECIPE.BASELINE says; finished ones
are kept) and lets each label the part that it never saw. --dil-stage1 reads the severity of its degradation off every
image, by a checkpoint of DIL's stage 1. --onnx runs any model that takes images. --embeddings reads the arrays keys,
embeddings and, where no data set is named, identities.

--check compares label files with the training images, one file per data set. --compare prints rank correlations
between files and, with --severity on SyntheticPedestrians, with the true severity of every degradation.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import ConfigError, QSDPluginError
from qsd_plugin.core.files import check_writable
from qsd_plugin.core.stages import run_recipe

_CONFIG_KEY = re.compile(r"[A-Z][A-Z0-9_]*(\.[A-Z0-9_]+)+|SEED|OUTPUT_DIR")


def main() -> None:
    """Entry point."""
    arguments = parse_arguments()
    try:
        cfg = load_config(arguments)
        if arguments.check:
            check(cfg, arguments)
        elif arguments.compare:
            compare(cfg, arguments)
        else:
            make(cfg, arguments)
    except QSDPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def parse_arguments() -> argparse.Namespace:
    """The command line; ``KEY VALUE`` pairs may follow a list of files."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", default="", metavar="FILE", help="needed for --weights, --folds, --dil-stage1")
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--weights", metavar="FILE", help="checkpoint of the network that embeds the images")
    action.add_argument("--folds", type=int, metavar="K", help="cross-fitting: train K networks, K >= 2")
    action.add_argument("--dil-stage1", metavar="FILE", help="checkpoint of DIL's stage 1, or the authors' folder")
    action.add_argument("--onnx", metavar="FILE", help="ONNX model with one image input [B, 3, H, W]")
    action.add_argument("--embeddings", metavar="FILE", help=".npz with keys, embeddings and perhaps identities")
    action.add_argument("--check", nargs="+", metavar="FILE", help="label files, in the order of DATASETS.NAMES")
    action.add_argument("--compare", nargs="+", metavar="FILE", help="two label files or more of one data set")
    parser.add_argument("--output", metavar="FOLDER", default="labels", help="where labels go (default: labels)")
    parser.add_argument("--method", metavar="NAME", help="sdd_fiqa or norm; instead of QUALITY.METHOD")
    parser.add_argument("--severity", action="store_true", help="compare with the true severities too")
    parser.add_argument("--json", metavar="FILE", help="write the result of --check or --compare there")
    parser.add_argument("--picture", metavar="FILE", help="write the histogram of --check there, as a PNG")
    onnx = parser.add_argument_group("images for --onnx", "Channel order and values are those the model wants.")
    onnx.add_argument(
        "--size", type=int, nargs=2, metavar=("H", "W"), help="default: the model's own, else INPUT.SIZE_TEST"
    )
    onnx.add_argument("--colour", default="RGB", help="RGB or BGR (default: RGB)")
    onnx.add_argument("--mean", type=float, nargs=3, help="of values 0 to 255; default: MODEL.PIXEL_MEAN")
    onnx.add_argument("--std", type=float, nargs=3, help="of values 0 to 255; default: MODEL.PIXEL_STD")
    onnx.add_argument("--batch", type=int, default=64, help="images per run (default: 64)")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    arguments = parser.parse_args()
    for name in ("check", "compare"):
        files = getattr(arguments, name)
        if files:
            # argparse takes everything up to the next option for a file.
            keys = (
                place for place, text in enumerate(files) if _CONFIG_KEY.fullmatch(text) and not Path(text).exists()
            )
            end = next(keys, len(files))
            setattr(arguments, name, [Path(file) for file in files[:end]])
            arguments.opts = files[end:] + arguments.opts
    return arguments


def load_config(arguments: argparse.Namespace) -> Any:
    """The host's config with the network that evaluation uses."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from fastreid.config import get_cfg

    from qsd_plugin.hosts.fastreid.compose import base_architecture
    from qsd_plugin.hosts.fastreid.labelling import check_method

    cfg = get_cfg()
    if arguments.config_file:
        cfg.merge_from_file(arguments.config_file)
    elif arguments.weights or arguments.dil_stage1 or arguments.folds is not None:
        raise ConfigError("--config-file is missing", remedy="The network that labels the images is described there.")
    cfg.merge_from_list(arguments.opts)
    cfg.MODEL.META_ARCHITECTURE = base_architecture(cfg)
    if arguments.method:
        cfg.QUALITY.METHOD = arguments.method
    check_method(cfg)
    return cfg


def make(cfg: Any, arguments: argparse.Namespace) -> None:
    """Write one label file per training set, and print what they are like."""
    from qsd_plugin.hosts.fastreid import labelling
    from qsd_plugin.hosts.fastreid.datasets import training_set
    from qsd_plugin.hosts.fastreid.label_reports import check_files
    from qsd_plugin.quality.embeddings import read_embeddings
    from qsd_plugin.report.label_tables import check_table

    output = Path(arguments.output)
    check_writable(output)
    if arguments.embeddings and not arguments.config_file and "DATASETS.NAMES" not in arguments.opts:
        file, found = labelling.label_table_alone(cfg, Path(arguments.embeddings), output)
        print(check_table({file.stem: found}))
        return
    items = {name: training_set(cfg, name, combineall=cfg.DATASETS.COMBINEALL)[1] for name in cfg.DATASETS.NAMES}
    if arguments.weights:
        labelling.make_labels(cfg, Path(arguments.weights), items, output)
    elif arguments.dil_stage1:
        from qsd_plugin.hosts.fastreid.dil_quality import make_severity_labels

        cfg.QUALITY.SEVERITY.STAGE1 = arguments.dil_stage1
        make_severity_labels(cfg, items, output)
    elif arguments.folds is not None:
        make_cross_fitted(cfg, arguments, items, output)
    elif arguments.onnx:
        labelling.make_onnx_labels(cfg, onnx_embedder(cfg, arguments), items, output, extractor=arguments.onnx)
    else:
        table = read_embeddings(Path(arguments.embeddings))
        labelling.make_table_labels(cfg, table, items, output, extractor=arguments.embeddings)
    print(check_table(check_files(cfg, {name: output / f"{name}.npz" for name in items})))


def make_cross_fitted(cfg: Any, arguments: argparse.Namespace, items: Any, output: Path) -> None:
    """Train the folds' networks below ``output``, or find them there, and let each label its own fold."""
    from qsd_plugin.hosts.fastreid import labelling, recipes

    if arguments.folds < 2:
        raise ConfigError("--folds", value=arguments.folds, expected="2 or more")
    cfg.QUALITY.FOLDS = arguments.folds
    cfg.QUALITY.FILES = ()  # labels that exist already are not looked at
    stages = recipes.fold_stages(cfg, output, arguments, items)
    run_recipe(stages, output, announce=lambda line: print(f"[qsd_plugin] {line}", flush=True))
    checkpoints = [output / stage.name / "model_final.pth" for stage in stages]
    labelling.make_fold_labels(cfg, checkpoints, items, output)


def onnx_embedder(cfg: Any, arguments: argparse.Namespace) -> Any:
    """The model of ``--onnx`` with its preprocessing."""
    from qsd_plugin.quality.onnx_embedder import OnnxEmbedder

    return OnnxEmbedder(
        Path(arguments.onnx),
        size=tuple(arguments.size) if arguments.size else None,
        default_size=tuple(cfg.INPUT.SIZE_TEST),
        mean=arguments.mean or cfg.MODEL.PIXEL_MEAN,
        std=arguments.std or cfg.MODEL.PIXEL_STD,
        colour=arguments.colour,
        batch=arguments.batch,
    )


def check(cfg: Any, arguments: argparse.Namespace) -> None:
    """Print coverage, saturation and spread of label files."""
    from qsd_plugin.hosts.fastreid.label_reports import check_files, draw_histogram, write_json
    from qsd_plugin.hosts.fastreid.quality import label_files
    from qsd_plugin.report.label_tables import check_table

    cfg.QUALITY.FILES = tuple(map(str, arguments.check))
    files = dict(zip(cfg.DATASETS.NAMES, label_files(cfg), strict=True))
    checks = check_files(cfg, files)
    print(check_table(checks))
    if arguments.json:
        write_json(Path(arguments.json), {name: asdict(found) for name, found in checks.items()})
    if arguments.picture:
        draw_histogram(files, Path(arguments.picture))


def compare(cfg: Any, arguments: argparse.Namespace) -> None:
    """Print how far label files agree."""
    from qsd_plugin.hosts.fastreid.label_reports import compare_files, write_json

    if len(arguments.compare) < 2 and not arguments.severity:
        raise ConfigError("--compare", value=len(arguments.compare), expected="two label files, or one with --severity")
    text, result = compare_files(cfg, arguments.compare, severity=arguments.severity)
    print(text)
    if arguments.json:
        write_json(Path(arguments.json), result)


if __name__ == "__main__":
    main()
