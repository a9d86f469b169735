"""Data from the command line: check a data folder, make the built-in synthetic set.

python tools/build_data.py reid-check DIR        identities, cameras, leaks and damaged files of a folder or CSV list
python tools/build_data.py reid-list DIR OUT.csv list a folder's images without its split, to split by identity anew
python tools/build_data.py synthetic DIR         write the synthetic pedestrians below DIR
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence

from qsd_plugin.core.errors import QSDPluginError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; the exit code is 0, 1 for problems found in the data, 2 for input that cannot be used."""
    options = _parser().parse_args(argv)
    try:
        return int(options.run(options))
    except QSDPluginError as error:
        print(error, file=sys.stderr)
        return 2


def reid_check(options: argparse.Namespace) -> int:
    """``reid-check``: print what is in a data set and what is wrong with it."""
    from qsd_plugin.data.reid_check import check_data

    report = check_data(options.source, test_fraction=options.test_fraction, split_seed=options.split_seed)
    print(json.dumps(report.as_dict(), indent=1) if options.json else report.table())
    return 1 if report.problems else 0


def reid_list(options: argparse.Namespace) -> int:
    """``reid-list``: write the list and print what is in it."""
    from qsd_plugin.data.reid_lists import write_list

    items = write_list(options.folder, options.file).train
    identities, cameras = len({item.identity for item in items}), len({item.camera for item in items} - {None})
    print(f"{options.file}: {len(items)} images, {identities} identities, {cameras} cameras")
    return 0


def synthetic(options: argparse.Namespace) -> int:
    """``synthetic``: write the synthetic pedestrians and print where."""
    from qsd_plugin.data.synthetic import SyntheticPedestrians, build

    names = [field.name for field in dataclasses.fields(SyntheticPedestrians)]
    spec = SyntheticPedestrians(**{name: getattr(options, name) for name in names})
    print(build(options.folder, spec, workers=options.workers))
    return 0


def _parser() -> argparse.ArgumentParser:
    from qsd_plugin.data.synthetic import SyntheticPedestrians

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    check = commands.add_parser("reid-check", help="check a folder or list of person images")
    check.add_argument("source", metavar="DIR", help="data-set folder, or a CSV file path,pid,camid[,split]")
    check.add_argument("--json", action="store_true", help="print everything as JSON")
    check.add_argument("--test-fraction", type=float, default=0.5, help="as DATA.TEST_FRACTION (default %(default)s)")
    check.add_argument("--split-seed", type=int, default=0, help="as DATA.SPLIT_SEED (default %(default)s)")
    check.set_defaults(run=reid_check)

    pool = commands.add_parser("reid-list", help="write a folder's images as a CSV list path,pid,camid")
    pool.add_argument("folder", metavar="DIR", help="data-set folder; junk and distractors (-1, 0) are left out")
    pool.add_argument("file", metavar="OUT.csv", help="for DATA.LIST")
    pool.set_defaults(run=reid_list)

    make = commands.add_parser("synthetic", help="write the built-in synthetic pedestrians")
    make.add_argument("folder", metavar="DIR", help="cache folder; the set gets a folder of its own below it")
    make.add_argument("--workers", type=int, default=2, help="processes (default %(default)s)")
    for field in dataclasses.fields(SyntheticPedestrians):
        flag = "--" + field.name.replace("_", "-")
        make.add_argument(flag, type=type(field.default), default=field.default, help="default %(default)s")
    make.set_defaults(run=synthetic)
    return parser


if __name__ == "__main__":
    sys.exit(main())
