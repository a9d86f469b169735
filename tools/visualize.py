#!/usr/bin/env python
"""Pictures from the command line.

python tools/visualize.py degradations IMAGE [--output FILE]   one image through every degradation, over severities
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from qsd_plugin.core.errors import QSDPluginError


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
    import io

    import numpy as np
    from PIL import Image

    from qsd_plugin.core.files import write_atomically
    from qsd_plugin.data.images import read_rgb
    from qsd_plugin.degradations.sheet import contact_sheet

    sheet = contact_sheet(
        np.asarray(read_rgb(options.image)),
        degradations=options.names,
        severities=options.severities,
        seed=options.seed,
        longest=options.longest,
    )
    packed = io.BytesIO()
    Image.fromarray(sheet.picture).save(packed, format="PNG")
    write_atomically(options.output, packed.getvalue())
    print(f"{options.output}: {len(sheet.panels)} panels")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_degradations(commands)
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


if __name__ == "__main__":
    sys.exit(main())
