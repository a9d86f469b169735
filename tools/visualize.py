#!/usr/bin/env python
"""Pictures from the command line.

python tools/visualize.py degradations IMAGE [--output FILE]   one image through every degradation, over severities

Of a trained stage 1 of DIL; RUN is a recipe's folder, the folder of one training, or a checkpoint with its config.yaml:

python tools/visualize.py swap RUN [IMAGE ...]      contents against degradations, and what swapped codes do, measured
python tools/visualize.py replay RUN [IMAGE ...]    images rendered with codes of the bank
python tools/visualize.py slider RUN [IMAGE ...]    images rendered along the axis from clean to degraded codes
python tools/visualize.py codes RUN                 the codes in the plane, coloured by severity and camera
python tools/visualize.py enhance RUN IMAGE ...     images with the code of clean ones; --synthetic measures it

They write PNG and JSON files to --output, RUN/pictures where it is not given.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qsd_plugin.core.errors import ConfigError, QSDPluginError

if TYPE_CHECKING:
    from qsd_plugin.hosts.fastreid.dil_run import Stage1Run


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code is 2 for input that cannot be used."""
    options = _parser().parse_args(argv)
    try:
        options.run(options)
    except QSDPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0


def degradations(options: argparse.Namespace) -> None:
    """``degradations``: write the contact sheet and print where."""
    import numpy as np

    from qsd_plugin.core.panels import save_png
    from qsd_plugin.data.images import read_rgb
    from qsd_plugin.degradations.sheet import contact_sheet

    sheet = contact_sheet(
        np.asarray(read_rgb(options.image)),
        degradations=options.names,
        severities=options.severities,
        seed=options.seed,
        longest=options.longest,
    )
    save_png(sheet.picture, options.output)
    print(f"{options.output}: {len(sheet.panels)} panels")


def swap(options: argparse.Namespace) -> None:
    """``swap``: the matrix, and the table of what was measured."""
    stage, common = _loaded(options)
    from qsd_plugin.hosts.fastreid import dil_pictures

    found = dil_pictures.swap(stage, common, rows=options.rows, pairs=options.pairs, mixes=options.measure)
    if found:
        print(f"{found['pairs']} pairs, codes of the {found['head']} head, 95 % intervals\n\n{found['table']}\n")
    print(f"{common.output / 'swap.png'}")


def replay(options: argparse.Namespace) -> None:
    """``replay``: the sheet."""
    stage, common = _loaded(options)
    from qsd_plugin.hosts.fastreid import dil_pictures

    bank = dil_pictures.replay(stage, common, rows=options.rows, codes=options.codes, bank_size=options.bank)
    print(f"{common.output / 'replay.png'}: from {bank.extra_repr()}")


def slider(options: argparse.Namespace) -> None:
    """``slider``: the sheet, and what changes along it."""
    stage, common = _loaded(options)
    from qsd_plugin.hosts.fastreid import dil_pictures

    steps = dil_pictures.slider(stage, common, rows=options.rows, positions=options.positions, images=options.count)
    print(f"{dil_pictures.slider_table(steps)}\n\n{common.output / 'slider.png'}")


def codes(options: argparse.Namespace) -> None:
    """``codes``: the plot."""
    stage, common = _loaded(options)
    from qsd_plugin.hosts.fastreid import dil_pictures

    found = dil_pictures.plot_codes(stage, common, images=options.count, severities=options.severities)
    print(
        f"{common.output / 'codes.png'}: {found['images']} images, {found['mix']}; two components hold "
        f"{sum(found['explained']):.0%} of the variance; rank correlation of severity with the axis from clean to "
        f"degraded, on other images: {found['axis_correlation']:.2f}"
    )


def enhance(options: argparse.Namespace) -> None:
    """``enhance``: the images and the table."""
    stage, common = _loaded(options)
    from qsd_plugin.hosts.fastreid import dil_enhance

    chosen = dil_enhance.EnhanceOptions(
        output=common.output,
        mode=options.clean,
        centres=options.centres,
        clean_images=options.clean_images,
        clean_count=options.clean_count,
        size=_size(options.size),
        own_size=options.size == "own",
        mix=options.mix,
        seed=options.seed,
    )
    if options.synthetic:
        found = dil_enhance.enhance_synthetic(stage, chosen, options.synthetic)
    else:
        found = dil_enhance.enhance_files(stage, chosen, options.images, options.reference)
    print(f"{found['images']} images; in brackets 95 % intervals of the change\n\n{found['table']}\n\n{common.output}")


def _loaded(options: argparse.Namespace) -> tuple[Stage1Run, Any]:
    """The run, and what all of its commands take; activates the host."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from qsd_plugin.hosts.fastreid import dil_pictures, dil_run

    stage = dil_run.load_run(options.folder)
    output = options.output or (options.folder if options.folder.is_dir() else options.folder.parent) / "pictures"
    images = dil_run.image_paths(options.images) if options.images and options.run is not enhance else []
    return stage, dil_pictures.Options(
        output, [str(path) for path in images], mix=options.mix, head=options.head, seed=options.seed
    )


def _size(text: str) -> tuple[int, int] | None:
    if text in ("", "own"):
        return None
    try:
        height, width = map(int, text.split("x"))
    except ValueError:
        raise ConfigError("--size", value=text, expected="HEIGHTxWIDTH in pixels, such as 256x128, or own") from None
    return height, width


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_degradations(commands)
    _add_dil(commands)
    return parser


def _add_degradations(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from qsd_plugin.degradations.sheet import LONGEST, SEVERITIES

    command = commands.add_parser("degradations", help="one image through every degradation, over severities")
    command.set_defaults(run=degradations)
    command.add_argument("image", metavar="IMAGE", help="an image file, or a place in a record file (train.rec#17)")
    command.add_argument("--output", type=Path, default=Path("degradations.png"), metavar="FILE")
    command.add_argument("--names", nargs="+", metavar="NAME", help="rows (default: all)")
    command.add_argument("--severities", nargs="+", type=float, default=SEVERITIES, metavar="S", help="in [0, 1]")
    command.add_argument("--seed", type=int, default=0, help="of the random choices (default %(default)s)")
    command.add_argument(
        "--longest", type=int, default=LONGEST, metavar="PIXELS", help="larger images are shrunk (default %(default)s)"
    )


def _add_dil(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from qsd_plugin.degradations.sheet import SEVERITIES

    command = _of_run(commands, swap, "contents against degradations, and what swapped codes do, measured")
    _add_images(command)
    _add_head(command)
    command.add_argument("--pairs", type=int, default=150, metavar="N", help="to measure; 0: none (%(default)s)")
    command.add_argument("--measure", nargs="+", default=[], metavar="MIX", help="default: the run's own, res and ill")
    command = _of_run(commands, replay, "images rendered with codes of the bank")
    _add_images(command)
    command.add_argument("--codes", type=int, default=8, metavar="N", help="renderings of each (%(default)s)")
    command.add_argument("--bank", type=int, default=500, metavar="N", help="images of a bank made here (%(default)s)")
    command = _of_run(commands, slider, "images rendered along the axis from clean to degraded codes")
    _add_images(command)
    _add_head(command)
    command.add_argument(
        "--positions", nargs="+", type=float, default=SEVERITIES, metavar="P", help="0: clean centre, 1: degraded one"
    )
    command.add_argument("--count", type=int, default=200, metavar="N", help="images behind the axis (%(default)s)")
    command = _of_run(commands, codes, "the codes in the plane, coloured by severity and camera")
    command.add_argument("--severities", nargs="+", type=float, default=SEVERITIES, metavar="S", help="in [0, 1]")
    command.add_argument("--count", type=int, default=200, metavar="N", help="images (%(default)s)")
    _add_enhance(_of_run(commands, enhance, "images with the code of clean ones"))


def _add_enhance(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="files, or folders of images")
    command.add_argument("--reference", type=Path, metavar="DIR", help="the true images, by the same names")
    command.add_argument("--synthetic", type=int, default=0, metavar="N", help="darken N images of the run instead")
    command.add_argument("--clean", default="mean", metavar="MODE", help="clean code: mean or nearest (%(default)s)")
    command.add_argument("--centres", type=int, default=128, metavar="N", help="clusters of nearest (%(default)s)")
    command.add_argument("--clean-images", nargs="+", type=Path, default=[], metavar="PATH", help="default: the run's")
    command.add_argument("--clean-count", type=int, default=500, metavar="N", help="of the run's (%(default)s)")
    command.add_argument("--size", default="", metavar="HxW|own", help="of the result (default: INPUT.SIZE_TEST)")


def _add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="default: images of the run's data")
    command.add_argument("--rows", type=int, default=4, metavar="N", help="images where none are named (%(default)s)")


def _add_head(command: argparse.ArgumentParser) -> None:
    from qsd_plugin.methods.dil.encoders import DEGRADATION_HEADS

    command.add_argument(
        "--head",
        choices=list(DEGRADATION_HEADS),
        default="syn",
        help="of the encoder, for images degraded here: syn as in stage 1's paired steps (default), or real",
    )


def _of_run(
    commands: argparse._SubParsersAction[argparse.ArgumentParser], run: Any, text: str
) -> argparse.ArgumentParser:
    command = commands.add_parser(run.__name__, help=text)
    command.set_defaults(run=run, images=[], head="real")
    command.add_argument("folder", type=Path, metavar="RUN")
    command.add_argument("--output", type=Path, metavar="DIR")
    command.add_argument("--mix", default="", help="degradation, such as res or ill+noise_0.5 (default: the run's)")
    command.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    return command


if __name__ == "__main__":
    sys.exit(main())
