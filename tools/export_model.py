#!/usr/bin/env python
"""Export the network of a finished run.

    python tools/export_model.py RUN_OR_DEPLOY_FOLDER --onnx model.onnx [--check-batches 1 7]
    python tools/export_model.py RUN_OR_DEPLOY_FOLDER --safetensors model.safetensors --state-dict model.pth

The ONNX file takes normalised images, (pixel - mean) / std, as `images` [batch, 3, height, width] and returns
`embedding` [batch, dimension]. Size, colour order, mean, std, feature and metric are in its metadata, as in
deploy/contract.json. It is written only when onnxruntime computes what torch computes.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from tabulate import tabulate

from qsd_plugin.core.errors import QSDPluginError
from qsd_plugin.core.files import check_writable
from qsd_plugin.export.onnx import CHECK_BATCHES, TOLERANCE, export_onnx, require_onnx
from qsd_plugin.export.state_dicts import save_safetensors, save_state_dict


def main() -> None:
    """Entry point; plugin errors end the process with one paragraph and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of a finished run, or its deploy folder")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="write the network with its weights")
    parser.add_argument("--safetensors", type=Path, metavar="FILE", help="write the weights, with the host's names")
    parser.add_argument("--state-dict", type=Path, metavar="FILE", help="the same as torch's file")
    parser.add_argument(
        "--check-batches",
        type=int,
        nargs="+",
        metavar="N",
        default=list(CHECK_BATCHES),
        help="batch sizes at which the ONNX file is compared with torch (default: %(default)s)",
    )
    arguments = parser.parse_args()
    files = [file for file in (arguments.onnx, arguments.safetensors, arguments.state_dict) if file is not None]
    if not files:
        parser.error("name a file to write: --onnx, --safetensors or --state-dict")
    try:
        for file in files:
            check_writable(file.absolute().parent)
        export(arguments)
    except QSDPluginError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)


def export(arguments: argparse.Namespace) -> None:
    """Load the deployed network and write the requested files."""
    if arguments.onnx:
        require_onnx()
    from qsd_plugin.hosts import fastreid as host

    host.activate()
    from qsd_plugin.hosts.fastreid import deployed

    run = deployed.load(arguments.folder)
    metadata = deployed.metadata(run.contract)
    state = run.model.state_dict()
    if arguments.state_dict:
        save_state_dict(state, arguments.state_dict)
        print(f"{arguments.state_dict}: {len(state)} tensors")
    if arguments.safetensors:
        save_safetensors(state, arguments.safetensors, metadata=metadata)
        print(f"{arguments.safetensors}: {len(state)} tensors")
    if arguments.onnx:
        size = run.contract["input"]["height"], run.contract["input"]["width"]
        differences = export_onnx(
            deployed.without_normalisation(run.model, size),
            arguments.onnx,
            input_size=size,
            channels=len(run.contract["input"]["mean"]),
            metadata=metadata,
            check_batches=arguments.check_batches,
        )
        rows = [(batch, f"{difference:.1e}") for batch, difference in differences.items()]
        print(tabulate(rows, headers=["batch", "largest difference from torch"], tablefmt="simple"))
        print(f"accepted up to {TOLERANCE:.0e} of the largest embedding value, at least of 1")
        print(f"{arguments.onnx}: {json.dumps(metadata)}")


if __name__ == "__main__":
    main()
