#!/usr/bin/env python
"""Export the network of a finished run, or a face network from a file of its weights.

    python tools/export_model.py SOURCE --onnx model.onnx [--check-batches 1 7]
    python tools/export_model.py SOURCE --safetensors model.safetensors --state-dict model.pth
    python tools/export_model.py SOURCE --face-package models/NAME --license FILE [--detector det.onnx]
    python tools/export_model.py SOURCE --person-package models/NAME --license FILE [--projection pca --evaluate]

SOURCE is the folder of a finished run (of persons, of a face network, of DIL), a deploy folder, or a face network's
weights (arcface_torch, QUD, AdaFace, QGFace). Weights are written under the host's names: fast-reid's deploy keys for
persons, the published ones for faces.

ONNX files take normalised images, (pixel - mean) / std, as `images` (faces: `data`) [batch, 3, height, width] and
return `embedding` [batch, dimension]. Size, colour order, mean, std, feature and metric are in the metadata. A file is
written only when onnxruntime computes what torch computes.

Packages are for the insightface runtime 2.1: FaceAnalysis, PersonReID, PersonAnalysis. They are loaded back through it,
compared with torch, and only then get their name. PersonReID takes 256 numbers: --projection.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from qsd_plugin.core.errors import ExportError, QSDPluginError
from qsd_plugin.core.files import check_writable
from qsd_plugin.export import packages
from qsd_plugin.export.face_networks import FACE_SIZE, FaceModel, read_face_model
from qsd_plugin.export.onnx import CHECK_BATCHES, TOLERANCE, Form, export_onnx, require_onnx
from qsd_plugin.export.state_dicts import save_safetensors, save_state_dict

_PACKAGE_OPTIONS = ("license", "model_id", "base", "evaluate")
_FACE_OPTIONS = ("detector", "quality_network", "quality_weights")
_PERSON_OPTIONS = ("projection", "images")

#: What a host that reads weight files must know about those with other names than arcface_torch's.
_OTHER_NAMES = {
    "qud": "QUD's, which arcface_torch does not have",
    "ir": "AdaFace's, for BGR images as in its files; ONNX files and packages are for RGB",
}


def main() -> None:
    """Entry point; plugin errors end the process with one paragraph and exit code 2."""
    parser = _parser()
    arguments = parser.parse_intermixed_args()  # options of the config follow others
    files = [file for file in (arguments.onnx, arguments.safetensors, arguments.state_dict) if file is not None]
    folders = [folder for folder in (arguments.face_package, arguments.person_package) if folder is not None]
    if not files and not folders:
        parser.error("name a file to write: --onnx, --safetensors or --state-dict, --face-package or --person-package")
    _check_options(parser, arguments)
    try:
        for file in (*files, *folders):
            check_writable(file.absolute().parent)
        if arguments.onnx:
            require_onnx()
        face = _face_source(arguments)
        if face is not None:
            export_face(arguments, face)
        else:
            export_person(arguments)
    except QSDPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def export_face(arguments: argparse.Namespace, model: FaceModel) -> None:
    """Write the requested files of a face network."""
    if arguments.person_package:
        raise ExportError(str(arguments.source), value="a face network", expected="a person network")
    license_text = packages.read_license(arguments.license) if arguments.face_package else ""
    if arguments.evaluate and not arguments.source.is_dir():
        raise ExportError("--evaluate", value=str(arguments.source), expected="a run, whose config names test sets")
    metadata = model.metadata()
    if model.names != "arcface" and (arguments.safetensors or arguments.state_dict):
        print(f"names in the weight files: {_OTHER_NAMES[model.names]}", file=sys.stderr)
    order = {"colour_order": "BGR"} if model.names == "ir" else {}
    _write_weights(arguments, model.weights(), metadata | order)
    if arguments.onnx:
        from qsd_plugin.hosts.insightface.packaging import FACE_FORM

        _write_onnx(arguments, model.network, model.input_size, metadata, FACE_FORM)
    if arguments.face_package:
        from qsd_plugin.hosts.insightface.packaging import face_package

        quality = _quality(arguments)
        comparisons = face_package(
            model,
            arguments.face_package,
            license_text=license_text,
            model_id=arguments.model_id,
            quality=quality,
            detector=arguments.detector,
            base=arguments.base,
            notes=metadata,
            check_batches=arguments.check_batches,
        )
        _print_package(arguments.face_package, comparisons)
        if arguments.evaluate:
            _score_face_package(arguments, model, quality)


def _score_face_package(arguments: argparse.Namespace, model: FaceModel, quality: nn.Module | None) -> None:
    """The package in the runtime, and the network in torch, on the test sets of the run."""
    from qsd_plugin.hosts.fastreid import face_runs
    from qsd_plugin.hosts.fastreid.face_runtimes import score_runtimes
    from qsd_plugin.hosts.insightface.embedders import recogniser
    from qsd_plugin.hosts.insightface.packaging import packaged_network
    from qsd_plugin.hosts.insightface.runtime import Reference

    cfg = face_runs.config(arguments.source)
    cfg.merge_from_list(arguments.opts)
    cfg.TEST.FLIP.ENABLED = False  # the runtime embeds an image once
    package: Path = arguments.face_package
    picture = package.with_name(f"{package.name}.png")
    picture.unlink(missing_ok=True)
    reference = Reference(packaged_network(model, quality), model.input_size, model.mean, model.std)
    rows = score_runtimes(cfg, {"torch": reference, "insightface": recogniser(package)}, picture=picture)
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True))
    if picture.is_file():
        print(f"Pairs with the cosines of both: {picture}")


def export_person(arguments: argparse.Namespace) -> None:
    """Load the deployed network and write the requested files."""
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from qsd_plugin.hosts.fastreid import deployed, dil_runs

    dil = dil_runs.is_dil_run(arguments.source)
    run = dil_runs.load(arguments.source, arguments.opts) if dil else deployed.load(arguments.source)
    if arguments.face_package:
        raise ExportError(str(arguments.source), value="a person network", expected="a face network")
    license_text = packages.read_license(arguments.license) if arguments.person_package else ""
    metadata = deployed.metadata(run.contract)
    _write_weights(arguments, run.model.state_dict(), metadata)
    size = run.contract["input"]["height"], run.contract["input"]["width"]
    if arguments.onnx:
        _write_onnx(arguments, deployed.without_normalisation(run.model, size), size, metadata, Form())
    if arguments.person_package:
        _person_package(arguments, run, size, metadata, license_text)


def _person_package(
    arguments: argparse.Namespace, run: Any, size: tuple[int, int], metadata: dict[str, str], license_text: str
) -> None:
    from qsd_plugin.export.projection import Projected
    from qsd_plugin.hosts.fastreid import deployed, projections
    from qsd_plugin.hosts.insightface.embedders import person_embedder
    from qsd_plugin.hosts.insightface.packaging import person_package

    cfg = projections.with_options(run, arguments.opts)
    projection = projections.projection_for(run, arguments.projection, cfg, arguments.images)
    rows = projections.ranking_table(cfg, run, projection) if arguments.evaluate else []
    network: nn.Module = deployed.without_normalisation(run.model, size)
    dimension = run.contract["embedding"]["dimension"]
    if projection is not None:
        network, dimension = Projected(network, projection).eval(), len(projection.matrix)
        metadata = metadata | projection.describe() | {"feature_dimension": str(dimension), "metric": "cosine"}
    comparisons = person_package(
        network,
        arguments.person_package,
        input_size=size,
        mean=run.contract["input"]["mean"],
        std=run.contract["input"]["std"],
        dimension=dimension,
        license_text=license_text,
        model_id=arguments.model_id,
        base=arguments.base,
        notes=metadata,
        check_batches=arguments.check_batches,
    )
    _print_package(arguments.person_package, comparisons)
    if arguments.evaluate:
        rows += projections.ranking_in_runtime(cfg, "PersonReID", person_embedder(arguments.person_package))
        print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".2f"))
        if projection is not None:
            print(json.dumps(projection.describe()))


def _face_source(arguments: argparse.Namespace) -> FaceModel | None:
    """The face network that SOURCE is, or ``None`` for a deployed run."""
    source: Path = arguments.source
    if source.is_file():
        return read_face_model(source, input_size=arguments.input_size)
    if not (source / "config.yaml").is_file():
        return None
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from qsd_plugin.hosts.fastreid import face_runs

    return face_runs.load(source) if face_runs.is_face_run(source) else None


def _quality(arguments: argparse.Namespace) -> nn.Module | None:
    if not arguments.quality_network:
        return None
    from qsd_plugin.quality.sources import NetworkSource

    return NetworkSource(arguments.quality_network, arguments.quality_weights).network


def _write_weights(arguments: argparse.Namespace, state: dict[str, Tensor], metadata: dict[str, str]) -> None:
    if arguments.state_dict:
        save_state_dict(state, arguments.state_dict)
        print(f"{arguments.state_dict}: {len(state)} tensors")
    if arguments.safetensors:
        save_safetensors(state, arguments.safetensors, metadata=metadata)
        print(f"{arguments.safetensors}: {len(state)} tensors")


def _write_onnx(
    arguments: argparse.Namespace, network: nn.Module, size: tuple[int, int], metadata: dict[str, str], form: Form
) -> None:
    differences = export_onnx(
        network,
        arguments.onnx,
        input_size=size,
        channels=len(json.loads(metadata["mean"])),
        metadata=metadata,
        check_batches=arguments.check_batches,
        form=form,
    )
    rows = [(batch, f"{difference:.1e}") for batch, difference in differences.items()]
    print(tabulate(rows, headers=["batch", "largest difference from torch"], tablefmt="simple"))
    print(f"accepted up to {TOLERANCE:.0e} of the largest embedding value, at least of 1")
    print(f"{arguments.onnx}: {json.dumps(metadata)}")


def _print_package(folder: Path, comparisons: list[Any]) -> None:
    rows = [(one.way, one.batch, f"{one.cosine:.8f}", f"{one.difference:.1e}") for one in comparisons]
    headers = ["insightface", "batch", "smallest cosine with torch", "largest relative difference"]
    print(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
    print(f"{folder}: {', '.join(sorted(file.name for file in folder.iterdir()))}")


def _check_options(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    """Options that would be ignored are refused."""
    package = arguments.face_package or arguments.person_package
    for options, needed, name in (
        (_PACKAGE_OPTIONS, package, "--face-package or --person-package"),
        (_FACE_OPTIONS, arguments.face_package, "--face-package"),
        (_PERSON_OPTIONS, arguments.person_package, "--person-package"),
    ):
        for option in options:
            if getattr(arguments, option) and not needed:
                parser.error(f"--{option.replace('_', '-')} needs {name}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, metavar="SOURCE", help="folder of a finished run, or face weights")
    parser.add_argument(
        "opts", nargs="*", metavar="KEY VALUE", help="config options for --projection and --evaluate, and DIL's FEATURE"
    )
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write the network with its weights")
    parser.add_argument("--safetensors", type=Path, metavar="FILE", help="write the weights, with the host's names")
    parser.add_argument("--state-dict", type=Path, metavar="FILE", help="the same as torch's file")
    parser.add_argument("--face-package", type=Path, metavar="FOLDER", help="write a package for FaceAnalysis")
    parser.add_argument("--person-package", type=Path, metavar="FOLDER", help="write a package for PersonReID")
    parser.add_argument("--license", type=Path, metavar="FILE", help="terms of use of the weights; packages need them")
    parser.add_argument("--model-id", default="", metavar="NAME", help="name of the package (default: its folder's)")
    parser.add_argument("--base", type=Path, metavar="PACKAGE", help="package whose other models are taken over")
    parser.add_argument("--detector", type=Path, metavar="FILE", help="face detector for the package (ONNX)")
    parser.add_argument(
        "--quality-network",
        default="",
        metavar="import:MODULE:FUNCTION",
        help="quality network as for QUALITY.NETWORK; its score becomes the length of the embedding",
    )
    parser.add_argument("--quality-weights", default="", metavar="FILE", help="weights of the quality network")
    parser.add_argument(
        "--projection",
        default="",
        metavar="pca|trained|FILE",
        help="to 256 numbers: fitted to the training images of the run, trained on their identities, or a linear layer",
    )
    parser.add_argument("--images", type=Path, metavar="FOLDER", help="fit the projection to these images instead")
    parser.add_argument(
        "--evaluate",
        action="store_true",
        help="on DATASETS.TESTS: persons before and after the projection, faces in torch and in the runtime",
    )
    parser.add_argument(
        "--input-size",
        type=int,
        default=FACE_SIZE,
        metavar="PIXELS",
        help="side of the images that face weights were trained with (default: %(default)s)",
    )
    parser.add_argument(
        "--check-batches",
        type=int,
        nargs="+",
        metavar="N",
        default=list(CHECK_BATCHES),
        help="batch sizes at which exports are compared with torch (default: %(default)s)",
    )
    return parser


if __name__ == "__main__":
    main()
