"""InsightFace model packages, version 2: a folder with ``manifest.json``, the ONNX files it names, and a licence.

The runtime (``insightface`` 2.1) reads them by folder or by name below ``ROOT/models``. Tasks and keys that it does not
know are ignored, so one folder serves ``FaceAnalysis`` and ``PersonAnalysis`` and says where its models come from.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from qsd_plugin.core.errors import DataError, ExportError
from qsd_plugin.core.files import write_atomically

MANIFEST, LICENSE = "manifest.json", "MODEL.LICENSE"

RECOGNITION, DETECTION, PERSON_REID = "recognition", "detection", "person_reid"

#: Tasks without which ``FaceAnalysis`` and ``PersonAnalysis`` do not start.
FACE_ANALYSIS = (DETECTION, RECOGNITION)
PERSON_ANALYSIS = ("person_detection", PERSON_REID, DETECTION, RECOGNITION)

#: Length of a person's embedding, fixed in the runtime.
PERSON_DIMENSION = 256

#: Where the plugin's own words stand in the manifest.
NOTES = "qsd_plugin"

_MODEL_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def check_model_id(name: str) -> None:
    """Refuse a package name that the runtime refuses.

    Raises:
        ExportError: It is one.
    """
    if not _MODEL_ID.fullmatch(name):
        raise ExportError(
            "Name of the package",
            value=name,
            expected="at most 128 letters, digits, dots, dashes and underscores, the first a letter or digit",
            remedy="Rename the folder, or pass --model-id NAME.",
        )


def check_face_size(size: tuple[int, int]) -> None:
    """Refuse an input size to which the runtime cannot align faces.

    Args:
        size: Height and width in pixels.

    Raises:
        ExportError: Not square, or no multiple of 112 or 128.
    """
    height, width = size
    if height != width or (height % 112 and height % 128):
        raise ExportError(
            "Input size of the face network",
            value=size,
            expected="a square with a side that is a multiple of 112 or 128; insightface aligns faces to no other",
            remedy="Train with INPUT.SIZE_TRAIN and SIZE_TEST [112, 112].",
        )


def check_person_dimension(dimension: int) -> None:
    """Refuse an embedding that the runtime refuses.

    Raises:
        ExportError: Not :data:`PERSON_DIMENSION` numbers.
    """
    if dimension != PERSON_DIMENSION:
        raise ExportError(
            "Embedding of the person network",
            value=dimension,
            expected=f"{PERSON_DIMENSION} numbers, which insightface's PersonReID demands",
            remedy="Pass --projection pca (fitted to your training images), trained (on their identities) or FILE (a "
            f"linear layer), or train with MODEL.HEADS.EMBEDDING_DIM {PERSON_DIMENSION}.",
        )


def check_not_shadowed(folder: Path) -> None:
    """Refuse ``ROOT/models/NAME`` while the working directory holds another folder NAME.

    ``FaceAnalysis(NAME, root=ROOT)`` and ``get_model(NAME, root=ROOT)`` would take that one.

    Raises:
        ExportError: It does.
    """
    here = Path.cwd() / folder.name
    if folder.absolute().parent.name == "models" and here.is_dir() and here.resolve() != folder.resolve():
        raise ExportError(
            f"Package {folder.name}",
            value=f"{here} has the same name",
            expected="a name that no folder in the working directory has: insightface looks there first",
            remedy="Choose another name or another working directory.",
        )


def read_license(path: Path | None) -> str:
    """The text that becomes ``MODEL.LICENSE``.

    Raises:
        ExportError: There is none.
    """
    text = path.read_text(encoding="utf-8") if path is not None and path.is_file() else ""
    if not text.strip():
        raise ExportError(
            "Licence of the model",
            value=None if path is None else str(path),
            expected="a file with the terms under which others may use these weights",
            remedy="Pass --license FILE. The terms of the training images bind you, too.",
        )
    return text


def recognition_task(
    file: Path, *, mean: Sequence[float], std: Sequence[float], size: tuple[int, int], dimension: int
) -> dict[str, Any]:
    """The manifest's entry of a face recogniser that lies beside the manifest.

    Args:
        file: Its ONNX file.
        mean: Subtracted from pixel values of 0 to 255, per channel.
        std: Then divided by.
        size: Height and width in pixels.
        dimension: Of its embedding.

    Raises:
        ExportError: A size that faces are not aligned to, or statistics that differ between the channels.
    """
    check_face_size(size)
    if len(set(mean)) > 1 or len(set(std)) > 1:
        raise ExportError(
            "Mean and deviation of the face network's pixels",
            value=(*mean, *std),
            expected="one number for all channels each; insightface's manifest holds no more",
        )
    return {
        "file": file.name,
        "sha256": sha256(file),
        "preprocessing": {"mean": float(mean[0]), "std": float(std[0])},
        "preprocessing_version": "insightface-arcface-1",
        "input_size": list(size),
        "embedding_dimension": dimension,
    }


def person_task(
    file: Path, *, mean: Sequence[float], std: Sequence[float], size: tuple[int, int], dimension: int
) -> dict[str, Any]:
    """The manifest's entry of a person network; its arguments are those of :func:`recognition_task`.

    Raises:
        ExportError: Another dimension than :data:`PERSON_DIMENSION`.
    """
    check_person_dimension(dimension)
    return {
        "file": file.name,
        "sha256": sha256(file),
        "preprocessing": {"mean": [float(value) for value in mean], "std": [float(value) for value in std]},
        "input_size": list(size),
    }


def person_descriptor(package: Path) -> dict[str, Any]:
    """What ``insightface``'s ``PersonReID`` is constructed with, from a package that holds one.

    Raises:
        DataError: It does not.
    """
    task = read_manifest(package)["tasks"].get(PERSON_REID)
    if task is None:
        raise DataError(f"Package {package}", value="no person_reid", expected="a person network among its tasks")
    return {"path": str((package / task["file"]).resolve()), **task}


def take_over(base: Path, folder: Path, *, without: Sequence[str]) -> dict[str, Any]:
    """Copy the models of another package for the tasks that are not ``without``; its licence comes along.

    Args:
        base: A package of version 2, such as a downloaded one.
        folder: Where the files go.
        without: Tasks that the new package has models of its own for.

    Returns:
        Their entries in the manifest.

    Raises:
        DataError: ``base`` is no such package, a file is missing, or one has the name of a file in ``folder``.
    """
    manifest = read_manifest(base)
    tasks = {name: dict(task) for name, task in manifest["tasks"].items() if name not in without}
    for name, task in tasks.items():
        file = base / task["file"]
        if not file.is_file():
            raise DataError(f"Package {base}: {name}", value=str(file), expected="an existing file")
        task["file"] = f"{name}.onnx"
        shutil.copyfile(file, folder / task["file"])
        task["sha256"] = sha256(folder / task["file"])
    terms = base / manifest["license"]
    if terms.is_file():
        shutil.copyfile(terms, folder / f"{manifest['model_id']}.LICENSE")
    return tasks


def write_manifest(
    folder: Path, *, model_id: str, license_text: str, tasks: Mapping[str, Any], notes: Mapping[str, Any]
) -> None:
    """Write ``manifest.json`` and ``MODEL.LICENSE`` beside the models.

    Args:
        folder: Holds the files of ``tasks``.
        model_id: Name of the package.
        license_text: Of :func:`read_license`.
        tasks: Entries by task.
        notes: What the package says about its own models, for readers; hosts ignore it.

    Raises:
        ExportError: A name that the runtime refuses.
        DataError: The folder cannot be written.
    """
    check_model_id(model_id)
    manifest = {
        "manifest_version": 2,
        "model_id": model_id,
        "license": LICENSE,
        "tasks": dict(tasks),
        NOTES: dict(notes),
    }
    write_atomically(folder / LICENSE, license_text.encode())
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())


def read_manifest(package: Path) -> dict[str, Any]:
    """The manifest of a package of version 2.

    Raises:
        DataError: There is none.
    """
    path = package / MANIFEST
    try:
        manifest: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError("Package", value=str(package), expected=f"a folder with {MANIFEST}") from error
    complete = isinstance(manifest, dict) and {"model_id", "license", "tasks"} <= manifest.keys()
    if not complete or manifest.get("manifest_version") != 2 or not isinstance(manifest["tasks"], dict):
        raise DataError(
            f"Package {package}", value=MANIFEST, expected="manifest_version 2, model_id, license and tasks"
        )
    document: dict[str, Any] = manifest
    return document


def sha256(file: Path) -> str:
    """Digest of a file, as the manifest holds it."""
    digest = hashlib.sha256()
    with file.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
