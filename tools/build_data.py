"""Data from the command line: check a data folder, make the built-in synthetic set, face records and pairs.

python tools/build_data.py reid-check DIR        identities, cameras, leaks and damaged files of a folder or CSV list
python tools/build_data.py reid-list DIR OUT.csv list a folder's images without its split, to split by identity anew
python tools/build_data.py synthetic DIR         write the synthetic pedestrians below DIR
python tools/build_data.py mlr SRC DST           Market-1501, CUHK03, VIPeR with one camera shrunk; CAVIAR as it is
python tools/build_data.py folder2rec DIR OUT.rec  <identity>/*.jpg, aligned, to .rec, .idx and property
python tools/build_data.py rec2folder IN.rec DIR   and back to <class>/<key>.jpg
python tools/build_data.py pairs2bin CSV OUT.bin   pairs first,second,same to a verification set
python tools/build_data.py face-split DIR OUT      <identity>/*.jpg to train.csv and pairs.csv, with nobody in both
python tools/build_data.py pack-eval SET DIR OUT.rec  tinyface, scface, ijbb or ijbc as released to one record, aligned
python tools/build_data.py check FILE              what is in a .rec or .bin file and what is wrong with it
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def mlr(options: argparse.Namespace) -> int:
    """``mlr``: write the set and print what is in it."""
    from qsd_plugin.data.mlr import MLRSettings, build_mlr

    names = [field.name for field in dataclasses.fields(MLRSettings)]
    settings = MLRSettings(**{name: getattr(options, name) for name in names} | {"rates": tuple(options.rates)})
    done = build_mlr(Path(options.source), Path(options.folder), settings, kind=options.kind)
    shrunk = ", ".join(f"{count} by {rate}" if rate else f"{count} by nature" for rate, count in done.rates.items())
    print(f"{options.folder}: {', '.join(f'{count} {split}' for split, count in done.images.items())}")
    print(f"of low resolution: {shrunk}; manifest {done.digest}")
    return 0


def folder2rec(options: argparse.Namespace) -> int:
    """``folder2rec``: write the records and print how many there are."""
    from qsd_plugin.data.face_records import folder_to_records

    flags = ("size", "header", "listing", "convert", "skip_damaged")
    done = folder_to_records(options.folder, options.file, **{name: getattr(options, name) for name in flags})
    print(f"{options.file}: {done.images} images, {len(done.identities)} identities")
    for reason in done.skipped.values():
        print(f"left out: {reason}")
    return 0


def rec2folder(options: argparse.Namespace) -> int:
    """``rec2folder``: write the images and print how many there are."""
    from qsd_plugin.data.face_records import records_to_folder

    images, identities = records_to_folder(options.file, options.folder)
    print(f"{options.folder}: {images} images, {identities} identities")
    return 0


def pairs2bin(options: argparse.Namespace) -> int:
    """``pairs2bin``: write the verification set and print how many pairs it has."""
    from qsd_plugin.data.verification_bin import bin_from_pairs

    pairs = bin_from_pairs(
        options.pairs, options.file, size=options.size, interleave=options.interleave, convert=options.convert
    )
    print(f"{options.file}: {len(pairs.issame)} pairs, {int(pairs.issame.sum())} of them matching")
    return 0


def face_split(options: argparse.Namespace) -> int:
    """``face-split``: write the lists and print what is in them."""
    from qsd_plugin.data.face_split import PAIRS_FILE, TRAIN_FILE, split_faces

    names = ("test_fraction", "seed", "pairs", "quality_from_name")
    done = split_faces(options.folder, options.out, **{name: getattr(options, name) for name in names})
    print(f"{options.out}/{TRAIN_FILE}: {done.train_images} images of {done.train_identities} people")
    print(
        f"{options.out}/{PAIRS_FILE}: {done.pairs} pairs, half of them genuine, of {done.test_images} images of "
        f"{done.test_identities} other people"
    )
    if not done.own_people:
        print("Folds share people: for folds with people of their own, 20 or more have to be held out.")
    return 0


def pack_eval(options: argparse.Namespace) -> int:
    """``pack-eval``: write the packed set and print what is in it."""
    from qsd_plugin.data import face_packing

    flags = ("size", "landmarks", "quality", "convert")
    done = face_packing.pack_eval(
        options.set, options.folder, options.file, **{name: getattr(options, name) for name in flags}
    )
    roles = ", ".join(f"{len(done.rows(role))} {role}" for role in dict.fromkeys(done.role.tolist()))
    pairs = f", {len(done.pairs)} pairs of templates" if len(done.pairs) else ""
    print(f"{options.file}: {len(done.names)} images ({roles}){pairs}; colour test passed")
    return 0


def check(options: argparse.Namespace) -> int:
    """``check``: print what is in a record file or verification set and what is wrong with it."""
    from qsd_plugin.data.face_check import check_faces

    report = check_faces(options.file)
    print(report.json() if options.json else report.table())
    return 1 if report.problems else 0


def _add_face_commands(commands: Any) -> None:
    crops = argparse.ArgumentParser(add_help=False)
    crops.add_argument("--size", type=int, default=112, help="side of the aligned crops, pixels (default %(default)s)")
    crops.add_argument("--convert", action="store_true", help="store grey, transparent or turned images as RGB PNG")

    write = commands.add_parser("folder2rec", parents=[crops], help="write a folder of face crops as records")
    write.add_argument("folder", metavar="DIR", help="<identity>/*.jpg; classes follow the order of the names")
    write.add_argument("file", metavar="OUT.rec", help=".idx and property are written beside it")
    write.add_argument("--no-header", dest="header", action="store_false", help="layout without header and ranges")
    write.add_argument("--lst", dest="listing", action="store_true", help="also write .lst: key, class and file name")
    write.add_argument("--skip-damaged", action="store_true", help="leave out unusable images instead of stopping")
    write.set_defaults(run=folder2rec)

    read = commands.add_parser("rec2folder", help="write the images of a record file into folders")
    read.add_argument("file", metavar="IN.rec")
    read.add_argument("folder", metavar="DIR", help="empty, or to be made")
    read.set_defaults(run=rec2folder)

    pairs = commands.add_parser("pairs2bin", parents=[crops], help="write pairs of face crops as a verification set")
    pairs.add_argument("pairs", metavar="CSV", help="columns first,second,same (1 or 0); files relative to its folder")
    pairs.add_argument("file", metavar="OUT.bin")
    pairs.add_argument("--interleave", action="store_true", help="spread both kinds of pairs evenly over the folds")
    pairs.set_defaults(run=pairs2bin)

    pack = commands.add_parser("pack-eval", parents=[crops], help="write an evaluation set as one record with manifest")
    pack.add_argument("set", metavar="SET", help="tinyface, scface, ijbb or ijbc")
    pack.add_argument("folder", metavar="DIR", help="the set as released; TinyFace and SCface as aligned crops")
    pack.add_argument("file", metavar="OUT.rec", help=".idx and .manifest.npz are written beside it")
    pack.add_argument("--landmarks", metavar="FILE", help="scface: list of stem and 4 or 5 points, to align by")
    pack.add_argument("--quality", type=int, default=0, help="JPEG quality of crops aligned here; 0 (default): PNG")
    pack.set_defaults(run=pack_eval)

    split = commands.add_parser("face-split", help="write lists of face images: people to train on, others to verify")
    split.add_argument("folder", metavar="DIR", help="<identity>/*.jpg")
    split.add_argument(
        "out", metavar="OUT", help="folder for train.csv, pairs.csv and split.json; empty, or to be made"
    )
    split.add_argument("--test-fraction", type=float, default=0.5, help="share of the people (default %(default)s)")
    split.add_argument("--seed", type=int, default=0, help="of people and pairs (default %(default)s)")
    split.add_argument("--pairs", type=int, default=3000, help="a multiple of 20 (default %(default)s)")
    split.add_argument(
        "--quality-from-name",
        metavar="REGEX",
        help="quality of an image: minus the largest absolute number its groups find in the file's name",
    )
    split.set_defaults(run=face_split)

    faces = commands.add_parser("check", help="check a .rec or .bin file")
    faces.add_argument("file", metavar="FILE")
    faces.add_argument("--json", action="store_true", help="print everything as JSON")
    faces.set_defaults(run=check)


def _add_mlr_command(commands: Any) -> None:
    from qsd_plugin.data.mlr import KERNELS, MLRSettings
    from qsd_plugin.data.mlr_sources import KINDS

    default = MLRSettings()
    make = commands.add_parser("mlr", help="write a multi-low-resolution set: the images of one camera shrunk")
    make.add_argument("source", metavar="SRC", help="folder of the set as released")
    make.add_argument("folder", metavar="DST", help="mlr_market, mlr_cuhk03, ...; empty, or to be made")
    make.add_argument("--kind", default="", help=f"{' | '.join(KINDS)} (default: found out)")
    make.add_argument("--seed", type=int, default=default.seed, help="of rates and test people (default %(default)s)")
    make.add_argument("--kernel", default=default.kernel, help=f"{' | '.join(KERNELS)} (default %(default)s)")
    make.add_argument("--rates", type=int, nargs="+", default=default.rates, metavar="N", help="default 2 3 4")
    make.add_argument("--camera", default=default.camera, help="the one whose images shrink (default: the first)")
    make.add_argument("--quality", type=int, default=default.quality, help="of JPEGs (default %(default)s)")
    make.add_argument("--test-people", type=int, help="how many, where the source has no split (default: the paper's)")
    make.set_defaults(run=mlr)


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
    _add_mlr_command(commands)
    _add_face_commands(commands)
    return parser


if __name__ == "__main__":
    sys.exit(main())
