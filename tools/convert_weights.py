#!/usr/bin/env python
"""Turn published weights into a checkpoint that MODEL.WEIGHTS takes.

    python tools/convert_weights.py --from agw --config-file configs/Base-QSD-original.yml --weights FILE \\
        --output agw.pth [--check-accuracy 5] [KEY VALUE ...]

--from names where the file comes from: agw, qsd (the methods' authors), fastreid-zoo, arcface (backbones of
InsightFace's arcface_torch), qud (QUD's teachers and students), adaface or qgface (IR networks with their heads; they
see BGR, and are turned round to see RGB), dil (its authors' folder of outputs, with --stage 1 or 2 where it has files
of both). The config names the network it is for; a backbone, and DIL's networks, must be filled exactly.
Nothing in the file is run: of a pickled module the tensors are kept, and nothing else. What
fits and what does not is printed. With the training set at hand a classifier can be checked (--check-accuracy) and its
classes brought into fast-reid's order (--match-classes); a run on other identities does without (--drop-classifier).
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tabulate import tabulate

from qsd_plugin.core.errors import ConfigError, QSDPluginError
from qsd_plugin.core.files import check_writable, write_atomically
from qsd_plugin.export.weights import CLASSIFIER, SOURCES, Fit

#: A folder with a file per network, and not one file as :data:`SOURCES` have.
DIL = "dil"


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--from", dest="source", required=True, metavar="|".join([*SOURCES, DIL]), help="origin")
    parser.add_argument("--config-file", required=True, metavar="FILE", help="config of the network")
    parser.add_argument("--weights", required=True, metavar="FILE", help="the published file, or DIL's folder")
    parser.add_argument("--output", required=True, metavar="FILE", help="the checkpoint to write")
    parser.add_argument("--check-accuracy", type=int, default=0, metavar="N", help="classify N training batches")
    parser.add_argument("--stage", type=int, choices=(1, 2), help="of DIL; default: the one that has files")
    order = parser.add_mutually_exclusive_group()
    order.add_argument("--match-classes", action="store_true", help="reorder the classifier for DATASETS.NAMES")
    order.add_argument("--drop-classifier", action="store_true", help="leave the classifier out")
    parser.add_argument("opts", nargs=argparse.REMAINDER, help="KEY VALUE pairs for the config")
    arguments = parser.parse_args()
    try:
        run(arguments)
    except QSDPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def run(arguments: argparse.Namespace) -> None:
    """Convert, report, check and write."""
    output = Path(arguments.output)
    check_writable(output.parent)
    if arguments.source == DIL:
        run_dil(arguments, output)
        return
    cfg = load_config(arguments.config_file, arguments.opts)
    from qsd_plugin.hosts.fastreid import published

    conversion = published.convert_for(
        cfg, Path(arguments.weights), arguments.source, keep_classifier=not arguments.drop_classifier
    )
    print(describe(conversion.fit))
    if conversion.not_run:
        print(f"\nThe file wanted to call {', '.join(conversion.not_run)}; nothing was run.")
    for note in conversion.converted.notes:
        print(f"note: {note}")
    for problem in published.check_pixels(cfg, conversion.converted):
        print(f"ATTENTION: {problem}")
    state = conversion.state_dict()
    if arguments.match_classes:
        state[CLASSIFIER], accuracy = published.match_classes(cfg, conversion.model)
        conversion.model.get_parameter(CLASSIFIER).data.copy_(state[CLASSIFIER])
        print(f"Classes matched: {accuracy:.1%} of the training images looked at are classified as their identity.")
    if arguments.check_accuracy:
        print(judge(published.training_accuracy(cfg, conversion.model, arguments.check_accuracy)))
    write_checkpoint(output, state)
    print(f"\nWritten: {output}. Use it as MODEL.WEIGHTS {output}")


def run_dil(arguments: argparse.Namespace, output: Path) -> None:
    """Convert a folder of DIL's authors, report and write."""
    given = {
        "--check-accuracy": arguments.check_accuracy,
        "--match-classes": arguments.match_classes,
        "--drop-classifier": arguments.drop_classifier,
    }
    unused = [flag for flag, value in given.items() if value]
    if unused:
        raise ConfigError(unused[0], expected="other sources than dil")
    cfg = read_config(arguments.config_file, arguments.opts)
    from qsd_plugin.hosts.fastreid import published_dil

    done = published_dil.convert_folder(cfg, Path(arguments.weights), arguments.stage)
    print(describe(done.fit))
    for network, path in done.files.items():
        print(f"{network}: {path.name}")
    for note in done.notes:
        print(f"note: {note}")
    write_checkpoint(output, done.state)
    print(f"\nWritten: {output}, stage {done.stage}. Use it as {done.key} {output}")


def read_config(config_file: str, opts: list[str]) -> Any:
    """The host's config of a file and ``KEY VALUE`` pairs."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from fastreid.config import get_cfg

    cfg = get_cfg()
    cfg.merge_from_file(config_file)
    cfg.merge_from_list(opts)
    return cfg


def load_config(config_file: str, opts: list[str]) -> Any:
    """The host's config with the network that evaluation uses."""
    cfg = read_config(config_file, opts)
    from qsd_plugin.hosts.fastreid.compose import base_architecture

    cfg.MODEL.META_ARCHITECTURE = base_architecture(cfg)
    return cfg


def write_checkpoint(output: Path, state: Mapping[str, Any]) -> None:
    """Write tensors as the host's checkpoints hold them."""
    import torch

    write_atomically(output, functools.partial(torch.save, {"model": dict(state)}))


def describe(fit: Fit) -> str:
    """How the weights fit the model: the numbers, and every name that is not matched."""
    parts: dict[str, int] = {}
    for name in fit.matched:
        part = ".".join(name.split(".")[:2])
        parts[part] = parts.get(part, 0) + 1
    rows = [("matched", part, f"{count} entries") for part, count in parts.items()]
    rows += [("missing", name, "keeps its initial value") for name in fit.missing]
    rows += [("unexpected", name, "left out: the model has no such entry") for name in fit.unexpected]
    for name, (ours, model) in fit.reshaped.items():
        rows.append(("other shape", name, f"left out: {ours} in the file, {model} in the model"))
    counts = (
        f"{len(fit.matched)} matched, {len(fit.missing)} missing, {len(fit.unexpected)} unexpected, "
        f"{len(fit.reshaped)} of another shape"
    )
    return tabulate(rows, headers=["", "name", ""], tablefmt="simple") + f"\n\n{counts}"


def judge(result: Any) -> str:
    """What a training accuracy says about the classifier."""
    text = (
        f"Training accuracy: {result.accuracy:.1%} of {result.num_images} images; {result.agreement:.1%} are taken for "
        "the class that most images of their identity are taken for."
    )
    if result.accuracy >= 0.5:
        return text
    if result.agreement >= 0.8:
        return f"{text}\nATTENTION: the classes are in another order than fast-reid's. Convert with --match-classes."
    return f"{text}\nATTENTION: the classifier was trained on other images. Leave it out with --drop-classifier."


if __name__ == "__main__":
    main()
